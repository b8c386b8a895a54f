"""Optimizer, step, sharding, checkpoints and metrics_writer."""
