"""Versions and commit of the code that runs."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from mnist_dist import __version__

# --- what ran ---------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a result."""
    packages = ("torch", "torchvision", "accelerate", "wandb", "numpy")
    return {
        "mnist_dist": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def git_commit() -> str | None:
    """The commit of the code that runs, "-dirty" where it was changed since; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
