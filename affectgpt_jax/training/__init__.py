"""Optimizer, step, sharding, checkpoints and telemetry."""
