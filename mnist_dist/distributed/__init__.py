"""Distributed training: launcher, devices, collectives, signals, watchdog, gradients, FSDP2, batch norm and shards."""
