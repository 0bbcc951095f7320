"""The versions and the git commit of the code that runs."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

from mnist_dist import __version__


def versions() -> dict[str, str]:
    """Returns the version of Python and of every package that can change a result, by name."""
    packages = ("torch", "torchvision", "accelerate", "wandb", "numpy")
    return {
        "mnist_dist": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def git_commit() -> str | None:
    """Returns the commit of the code, with "-dirty" if it was changed since; None outside a git repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
