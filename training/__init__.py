"""Optimizer, schedules of the learning rate, checkpoints, metrics and logs."""
