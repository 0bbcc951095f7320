"""Imports code of the user's own, written as `package.module:Name`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path, PurePath
from types import ModuleType


def import_user_module(path: str) -> tuple[ModuleType, str]:
    """Imports the module of `package.module:Name` from an installed package or the current directory.

    Only a person may give such a path, never a file that a command reads.

    Returns:
        The module and the name.

    Raises:
        ImportError: the module cannot be imported; the message says why and what to do.
    """
    module_name, _, attribute = path.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        return importlib.import_module(module_name), attribute
    except (Exception, SystemExit) as error:  # a user's own module may raise any exception
        advice = f"run the command in the folder that holds the module (this folder is {here}), or install its package"
        if (dotted := as_dotted(path)) != path:
            advice = f"write a module, not a file: {dotted}"
        reason = str(error) or type(error).__name__
        raise ImportError(f"{path!r}: cannot import {module_name!r} ({reason})\n{advice}") from error


def as_dotted(path: str) -> str:
    """Returns `package.module:Name` for a path to a file, such as `package/module.py:Name` or `package/module.py`."""
    file, _, attribute = path.partition(":")
    if "/" not in file and not file.endswith(".py"):
        return path
    dotted = ".".join(part for part in PurePath(file.removesuffix(".py")).parts if part not in ("/", ".."))
    return f"{dotted}:{attribute or 'MyNet'}"
