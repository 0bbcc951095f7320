"""Pictures of a run, one module for each kind."""

import logging

# Where the home folder cannot be written, matplotlib warns that its fonts are cached in a temporary folder.
logging.getLogger("matplotlib").setLevel(logging.ERROR)
