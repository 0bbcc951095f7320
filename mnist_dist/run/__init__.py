"""A run: its folder, its components built from a recipe, its checkpoints and its summary."""
