"""The command `sweep` searches hyperparameters: `mnist-dist sweep lenet5 optimizer.lr=0.001,0.01 batch_size=64,128`.

It also reads a W&B sweep file and searches as `wandb agent` would, without a server. Every trial has its own process
and run folder. Trials are compared by their accuracy on held-out training images, so the test set does not influence
the choice.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("sweep")  # before the imports below load torch

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from mnist_dist.distributed.launcher import end_process, launched_world
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.errors import FAILED, Problem, RecipeError
from mnist_dist.recipe.file import find_recipe, read_recipe
from mnist_dist.sweep.search_space import Sweep, read_file, read_words
from mnist_dist.sweep.table import describe_best, print_table, write_results
from mnist_dist.sweep.trials import Trial, plan, result, train_trial


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0 done, 1 every trial failed, 2 bad input, 75 stopped by a signal."""
    arguments = parse("sweep", argv)
    sweep = _read_sweep(arguments)
    directory = arguments.run_dir or Path("runs", "sweeps", sweep.name)
    trials = plan(sweep, directory)
    _make_folder(directory)
    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(trials)} trials of {sweep.recipe} in {directory}")
    rows = search(sweep, trials, directory, console)
    if rows is None:
        return PREEMPTED
    print_table(rows)
    console.print(f"{describe_best(sweep, rows)}\n{directory / 'sweep.md'}")
    return FAILED if all("failed" in row for row in rows) else 0


def _read_sweep(arguments: argparse.Namespace) -> Sweep:
    """Reads the search from the command line or from a W&B sweep file."""
    if arguments.count is not None and arguments.count < 1:
        message = f"expected at least 1, got {arguments.count}"
        raise RecipeError([Problem("command line", "--count", message, "range")])
    if launched_world().num_processes > 1:
        message = "start a sweep as one process; the command in a W&B sweep file may start each trial with several"
        raise RecipeError([Problem("the launcher", "", message, "unsupported")])
    path, words = find_recipe(arguments.sweep), arguments.overrides
    if read_recipe(path)[0].keys() & {"parameters", "method"}:
        sweep = read_file(path, words, arguments.count, arguments.seed)
    else:
        sweep = read_words(arguments.sweep, words, arguments.count)
    return replace(sweep, typed=words, allow_code=arguments.allow_code)


def _make_folder(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{directory} cannot be created: {error.strerror}; give another folder"
        raise RecipeError([Problem("command line", "--run-dir", message, "unwritable")]) from error


def search(sweep: Sweep, trials: list[Trial], directory: Path, console: Console) -> list[dict[str, Any]] | None:
    """Trains the trials that are not done, one after another, and writes the table after each.

    Returns:
        One row per trial, as `result` returns it; None if a signal stopped the search.
    """
    rows: list[dict[str, Any]] = []
    for number, trial in enumerate(trials, start=1):
        log = directory / f"{trial.name}.log"
        was_done = trial.folder.is_done
        if not was_done:
            with console.status(f"{number}/{len(trials)}  {trial.name}: tail -f {log}"):
                code = train_trial(sweep, trial, log)
            if code == PREEMPTED:
                console.print(f"stop requested; {trial.name} has saved a checkpoint. Rerun the same command to resume.")
                return None
        rows.append(result(trial, log))
        failed = rows[-1].get("failed")
        outcome = f"failed: {failed}; see {log}" if failed else f"{rows[-1]['eval.best.accuracy']:.2f} %"
        console.print(f"{number}/{len(trials)}  {trial.name}: {outcome}{' (already done)' if was_done else ''}")
        if not failed:
            log.unlink(missing_ok=True)
        write_results(directory, sweep, rows)
    return rows


if __name__ == "__main__":
    end_process(run_command(main))
