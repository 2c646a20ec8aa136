"""What both training loops share: processes, optimizers, checkpoints, metrics."""
