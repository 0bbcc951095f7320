"""One update, the learning rate, evaluation, counters and weights on disk."""
