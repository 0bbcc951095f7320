"""The training step (eager or captured), optimizers, schedules, evaluation, counters and checkpoints."""
