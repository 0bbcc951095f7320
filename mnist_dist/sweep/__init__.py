"""Searches hyperparameters on this machine: `mnist-dist sweep`."""
