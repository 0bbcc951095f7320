"""The console script `mnist-dist COMMAND …`, also `python -m mnist_dist COMMAND …`: lists and starts commands."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec

from mnist_dist.cli import COMMANDS, parse, run_command
from mnist_dist.distributed.signals import exit_on_signals
from mnist_dist.errors import Problem, RecipeError, did_you_mean


def usage() -> str:
    """Returns the list of commands, one line each."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {description}" for name, (description, *_) in COMMANDS.items()]
    return "\n".join(["usage: mnist-dist COMMAND …", "", *lines, "", "mnist-dist COMMAND --help explains a command."])


def main(argv: list[str] | None = None) -> int:
    """Runs the command that the first argument names. Returns its exit code.

    Args:
        argv: without the program's name; None for `sys.argv[1:]`.

    Raises:
        RecipeError: there is no such command, or its arguments are wrong.
    """
    command, *rest = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if command in ("--help", "-h", "help"):
        print(usage())
        return 0
    if command not in COMMANDS:
        message = f"unknown command{did_you_mean(command, COMMANDS) or '; known: ' + ', '.join(COMMANDS)}"
        raise RecipeError([Problem("command line", command, message, "unknown")])
    parse(command, rest)  # handles --help and a wrong argument before torch is imported
    if command == "train":
        exit_on_signals()  # before torch is imported
    name = f"mnist_dist.{command}"
    is_package = (spec := find_spec(name)) is not None and spec.submodule_search_locations is not None
    return import_module(f"{name}.__main__" if is_package else name).main(rest)


def entry_point() -> int:
    """Runs the console script `mnist-dist`; returns its exit code."""
    code = run_command(main)
    if "mnist_dist.distributed.launcher" in sys.modules:  # the command may have joined a world
        import_module("mnist_dist.distributed.launcher").end_process(code)
    return code


if __name__ == "__main__":
    sys.exit(entry_point())
