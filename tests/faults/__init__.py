"""Kills, signals and damages runs, and compares what they end in: `python -m tests.faults --kills 200`."""
