"""Processes: launcher, devices, collectives, signals, gradients."""
