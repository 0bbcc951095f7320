"""Golden screens: the exact text that commands print, one file per screen. `python -m tests.screens` rewrites them."""
