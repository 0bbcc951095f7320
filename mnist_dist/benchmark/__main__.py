"""The command `benchmark`: training speed, inference speed, time to accuracy, operations of a step.

`accelerate launch -m mnist_dist.benchmark --recipe model_v1_onecycle` compares the trainer with the bare step and with
the training loops of other frameworks. Speeds are images/s, summed over all processes.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("benchmark")  # before the imports below load torch

import argparse
import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from accelerate.utils import patch_environment

from mnist_dist.benchmark import time_to_accuracy
from mnist_dist.benchmark.epochs import measure_epochs
from mnist_dist.benchmark.inference import measure_inference
from mnist_dist.benchmark.report import print_floors, print_table, to_markdown
from mnist_dist.benchmark.training import measure
from mnist_dist.distributed.launcher import end_process, launched_world
from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.recipe.file import bundled_recipes, find_recipe
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.timed_training import ENDLESS


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 the training failed, 2 bad input."""
    words = sys.argv[1:] if argv is None else argv
    arguments = parse("benchmark", argv)
    _check_arguments(arguments)
    command = shlex.join(["python", "-m", "mnist_dist.benchmark", *words])
    if arguments.floors:
        print_floors(arguments.floors)
    elif arguments.operations is not None:
        _operations(arguments, command)
    elif arguments.time_to_accuracy:
        _time_to_accuracy(arguments, command)
    else:
        _speed(arguments, command)
    return 0


# --- checking the arguments ---------------------------------------------------------------------------------------


def _check_arguments(arguments: argparse.Namespace) -> None:
    """Checks what argparse does not check, before anything is measured.

    Raises:
        RecipeError: a number is out of range, options exclude each other, or a file cannot be written.
    """
    for key in ("rounds", "steps", "seeds"):
        if (number := getattr(arguments, key)) < 1:
            raise _refuse(f"--{key}", f"expected at least 1, got {number}", "range")
    if arguments.time_to_accuracy or arguments.operations is not None:
        chosen = "--time-to-accuracy" if arguments.time_to_accuracy else "--operations"
        for key in ("sweep", "inference", "whole_epochs"):
            if getattr(arguments, key):
                raise _refuse(f"--{key.replace('_', '-')}", f"cannot be combined with {chosen}", "conflict")
    if arguments.whole_epochs and arguments.inference:
        raise _refuse("--whole-epochs", "cannot be combined with --inference", "conflict")
    if arguments.note and not arguments.time_to_accuracy:
        raise _refuse("--note", "needs --time-to-accuracy", "conflict")
    if arguments.plot and arguments.sweep is None:
        raise _refuse("--plot", "draws a sweep; add --sweep KEY=a,b,c", "conflict")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", arguments.batches):
        raise _refuse("--batches", f"expected numbers of images, e.g. 1,32, got {arguments.batches!r}", "type")
    for key in ("json", "markdown", "plot"):
        _check_file(f"--{key}", getattr(arguments, key))


def _check_file(key: str, file: Path | None) -> None:
    if file is None:
        return
    if file.is_dir():
        raise _refuse(key, f"{file} is a folder; name a file", "unwritable")
    if not file.absolute().parent.is_dir():
        raise _refuse(key, f"the folder {file.absolute().parent} does not exist", "missing")


def _refuse(key: str, message: str, kind: Kind) -> RecipeError:
    return RecipeError([Problem("command line", key, message, kind)])


# --- training and inference speed ---------------------------------------------------------------------------------


def _speed(arguments: argparse.Namespace, command: str) -> None:
    """Measures one recipe, or each value of a sweep; prints and writes every result as soon as it is complete."""
    results: list[dict[str, Any]] = []
    for change, recipe in _recipes(arguments).items():
        if arguments.inference:
            batch_sizes = [int(size) for size in arguments.batches.split(",")]
            result = measure_inference(recipe, batch_sizes, arguments.rounds, arguments.steps)
        else:
            timed = measure_epochs if arguments.whole_epochs else measure
            result = timed(recipe, arguments.rounds, arguments.steps)
        if change:
            result["sweep"] = change
            if results:  # the time since the process started would include the earlier measurements
                result["seconds_from_process_start_to_first_step"] = None
        results.append(result)
        if launched_world().is_main_process:
            print_table(result)
            _write(arguments, results, command)
    launched_world().destroy_process_group()


def _recipes(arguments: argparse.Namespace) -> dict[str, Recipe]:
    """Returns the recipes to measure: one with the key "", or one for each `key=value` of the sweep."""
    overrides = list(arguments.overrides)
    if not any(word.startswith("tracking.wandb.mode=") for word in overrides):
        overrides.append("tracking.wandb.mode=offline")
    overrides += [f"{key}={value}" for key, value in ENDLESS.items()]
    changes = [""] if arguments.sweep is None else _changes(arguments)
    return {change: load_recipe(arguments.recipe, *overrides, *([change] if change else [])) for change in changes}


def _changes(arguments: argparse.Namespace) -> list[str]:
    """Returns the overrides `key=value` of a sweep, each once."""
    key, _, text = arguments.sweep.partition("=")
    values = text.split(",")
    if not key or "" in values:
        message = f"expected a key and its values, e.g. batch_size=32,128, got {arguments.sweep!r}"
        raise _refuse("--sweep", message, "syntax")
    if key in ENDLESS:
        raise _refuse("--sweep", f"{key} has no effect on the measurement", "conflict")
    if arguments.inference:
        raise _refuse("--sweep", "cannot be combined with --inference; use --batches for batch sizes", "conflict")
    return [f"{key}={value}" for value in dict.fromkeys(values)]


def _write(arguments: argparse.Namespace, results: list[dict[str, Any]], command: str) -> None:
    """Writes the requested files. Of `results`, only the last one is new."""
    last = results[-1]
    if arguments.json:
        content = {"sweep": arguments.sweep, "results": results} if arguments.sweep else last
        _write_json(arguments.json, content)
    if arguments.markdown:
        _append(arguments.markdown, to_markdown(last, command))
    if arguments.sweep:
        from mnist_dist.benchmark.sweep_plot import (
            plot_sweep,  # imported late: the time to the first step must not include matplotlib
        )

        key, values = arguments.sweep.partition("=")[0], [each["sweep"].partition("=")[2] for each in results]
        title = f"{last['recipe']}, {last['device']}, {last['world_size']} process(es)"
        speeds = [each["images_per_second"] for each in results]
        plot_sweep(values, speeds, arguments.plot or Path("sweep.png"), key=key, title=title)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2) + "\n")


def _append(path: Path, text: str) -> None:
    old = path.read_text(encoding="utf-8") if path.is_file() else ""
    write_atomically(path, old + text)


# --- operations ---------------------------------------------------------------------------------------------------


def _operations(arguments: argparse.Namespace, command: str) -> None:
    """Counts the operations of recipes, prints them, and writes them to the requested files."""
    from mnist_dist.benchmark import operations  # imported late: it needs parts of PyTorch that may change

    words = [*arguments.operations, *arguments.overrides]
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word] or list(bundled_recipes())
    with patch_environment(CUDA_VISIBLE_DEVICES=""):  # where fake CUDA tensors find a GPU, they allocate memory on it
        result = operations.measure([load_recipe(name, *overrides) for name in names])
    operations.print_table(result)
    if arguments.json:
        _write_json(arguments.json, result)
    if arguments.markdown:
        _append(arguments.markdown, operations.to_markdown(result, command))


# --- time to accuracy ---------------------------------------------------------------------------------------------


def _time_to_accuracy(arguments: argparse.Namespace, command: str) -> None:
    """Measures the time to accuracy of a recipe, prints it, and writes it to the requested files."""
    result = time_to_accuracy.measure(load_recipe(arguments.time_to_accuracy, *arguments.overrides), arguments.seeds)
    time_to_accuracy.print_lines(result)
    if arguments.note:
        time_to_accuracy.note_in_recipe(find_recipe(arguments.time_to_accuracy), result)
    if arguments.json:
        _write_json(arguments.json, result)
    if arguments.markdown:
        _append(arguments.markdown, time_to_accuracy.to_markdown(result, command))


if __name__ == "__main__":
    end_process(run_command(main))
