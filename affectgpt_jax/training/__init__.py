"""The loop, the step, losses, optimizer, sharding, checkpoints and metrics of training."""
