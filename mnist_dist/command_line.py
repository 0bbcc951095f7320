"""What the doors' command lines share: one parser, one way to refuse, one exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable

from mnist_dist.recipe_file import Problem, RecipeError

FAILED = 1
BAD_INPUT = 2
LAST_WORD = 30.0


class RunError(Exception):
    """A run that began cannot go on; the message is for the user, exit code 1."""


class Parser(argparse.ArgumentParser):
    """argparse, whose refusals come out like every other problem: once, not once per process."""

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
        if not is_main_process():
            time.sleep(LAST_WORD)  # when one process ends, a launcher ends the others: let rank 0 speak first
        print(f"mnist_dist: {error}", file=sys.stderr)
        return BAD_INPUT
    except RunError as error:
        if not is_main_process():
            time.sleep(LAST_WORD)
        print(f"mnist_dist: {error}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        if is_main_process():
            print("mnist_dist: interrupted", file=sys.stderr)
        return 130


def is_main_process() -> bool:
    """Rank 0 by the launcher's environment: known before any process group is."""
    names = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "SLURM_PROCID")
    return next((os.environ[name] for name in names if name in os.environ), "0") == "0"
