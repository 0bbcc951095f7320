"""One update (eager, captured, sharded), the learning rate, evaluation, counters, checkpoints, signals, a watchdog."""
