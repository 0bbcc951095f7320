"""Measures training speed, inference speed and time to accuracy: `mnist-dist benchmark`."""
