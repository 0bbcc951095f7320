"""Measures where the time of a training step goes: the command `profile`."""
