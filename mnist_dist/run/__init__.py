"""A run: its folder, how a recipe is built into one, checkpoints, summary."""
