"""Kills, signals and damages runs, and compares their results: `python -m tests.faults --kills 200`."""
