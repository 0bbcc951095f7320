"""One update (eager, captured, in shards), the learning rate, evaluation, counters, checkpoints, signals, a watchdog."""
