"""What the doors' command lines share: one parser, one way to refuse, one exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console

from mnist_dist.recipe.file import Problem, RecipeError

FAILED = 1
BAD_INPUT = 2
LAST_WORD = 30.0
"""Seconds in which rank 0 speaks and a launcher then ends the other ranks, before these would say the same."""


class RunError(Exception):
    """A run that began cannot go on; the message is for the user, exit code 1."""


class Parser(argparse.ArgumentParser):
    """argparse, whose refusals come out like every other problem: by rank 0 alone."""

    def __init__(self, door: str, description: str, examples: str):
        super().__init__(
            prog=f"python -m {door}",
            description=description,
            epilog=examples,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str):  # argparse declares it NoReturn, and so it is
        raise RecipeError([Problem("command line", "", f"{message}; see --help")])


def run_door(main: Callable[[], int]) -> int:
    """Runs a door; what the user can put right becomes one screen on rank 0's stderr and exit code 2."""
    try:
        return main()
    except RecipeError as error:
        return _say(error, BAD_INPUT)
    except RunError as error:
        return _say(error, FAILED)
    except KeyboardInterrupt:
        if is_main_process():
            print("mnist_dist: interrupted", file=sys.stderr)
        return 130


def _say(error: Exception, code: int) -> int:
    if not is_main_process():
        time.sleep(LAST_WORD)
    print(f"mnist_dist: {error}", file=sys.stderr)
    return code


def printable(path: Path) -> str:
    """A path as any console takes it: a name on disk may be no text."""
    return str(path).encode(errors="replace").decode()


def table_console(**keywords: Any) -> Console:
    """A rich console that cuts no table where there is no terminal, whose width rich would guess at 80."""
    console = Console(**keywords)
    return console if console.is_terminal else Console(width=200, **keywords)


def is_main_process() -> bool:
    """Rank 0 by the launcher's environment: known before any process group is."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
