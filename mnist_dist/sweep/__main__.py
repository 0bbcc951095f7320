"""Hyperparameter search on this machine: `python -m mnist_dist.sweep lenet5 optimizer.lr=0.001,0.01 batch_size=64,128`.

Takes a W&B sweep file too, and searches as `wandb agent` would, without a server. Every trial is a run folder of its
own, trained by a process of its own, and judged on held-out training images: the test set has no say in the choice.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mnist_dist.cli import FAILED, answer_early, parser_of, run_command
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.engine.files import write_text
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.file import find_recipe, read_recipe
from mnist_dist.run.tables import markdown_table, table_console
from mnist_dist.sweep.search_space import Sweep, read_file, read_words
from mnist_dist.sweep.trials import plan, result, train_trial, word

if __name__ == "__main__":
    answer_early("sweep")  # before the imports below load torch


# --- the table ----------------------------------------------------------------------------------------------------


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best validation accuracy first, lower loss where equal, failed ones last."""
    return sorted(rows, key=lambda row: (-row.get("eval.best.accuracy", -1.0), row.get("eval.last.loss", 0.0)))


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table as text, headings first."""
    keys = list(rows[0]["values"])
    lines = [[*keys, "validation", "at epoch", "last epoch", "loss", "time", "trial"]]
    for row in rows:
        figures = [f"failed: {row['failed'][:80]}", "", "", "", ""] if "failed" in row else _figures(row)
        lines.append([*(str(row["values"][key]) for key in keys), *figures, row["trial"]])
    return lines


def _figures(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['eval.best.accuracy']:.2f} %",
        f"{row['eval.best.epoch']:g}",
        f"{row['eval.last.accuracy']:.2f} %",
        f"{row['eval.last.loss']:.4f}",
        f"{row['train_seconds']:.0f} s",
    ]


def write(directory: Path, sweep: Sweep, rows: list[dict[str, Any]]) -> str:
    """Writes sweep.json and sweep.md; returns what is to be said of the best trial."""
    rows = ranked(rows)
    best, lines = rows[0], cells(rows)
    said = "every trial failed"
    if "failed" not in best:
        # The recipe and the sweep file's command may hold images out too; the last word counts.
        words = [*sweep.words, *(word(*pair) for pair in best["values"].items()), "data.validation=0"]
        said = (
            f"best: {best['trial']}, {best['eval.best.accuracy']:.2f} % of the validation images "
            f"({best['test.accuracy']:.2f} % of the test images, after its last epoch)\n\n"
            f"on all training images: python -m mnist_dist.train --recipe {sweep.recipe} {shlex.join(words)}"
        )
    write_text(
        directory / "sweep.json", json.dumps({"sweep": sweep.name, "recipe": sweep.recipe, "trials": rows}, indent=2)
    )
    write_text(directory / "sweep.md", f"# {sweep.name}\n\n{markdown_table(lines)}\n\n{said}\n")
    return said


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, 1 if every trial failed, 2 for bad input, 75 when asked to stop (run me again)."""
    parser = parser_of("sweep")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.count is not None and arguments.count < 1:
        parser.error("--count is at least 1")
    if launched_world().num_processes > 1:
        parser.error("start a sweep as one process; a W&B sweep file's command may start each trial with several")
    path, words = find_recipe(arguments.sweep), arguments.overrides
    if read_recipe(path)[0].keys() & {"parameters", "method"}:
        sweep = read_file(path, words, arguments.count, arguments.seed)
    else:
        sweep = read_words(arguments.sweep, words, arguments.count)
    directory = arguments.run_dir or Path("runs", "sweeps", sweep.name)
    trials = plan(sweep, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError([Problem("command line: --run-dir", "", f"{directory}: {error.strerror}")]) from error

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(trials)} trials of {sweep.recipe} in {directory}")
    rows: list[dict[str, Any]] = []
    said = ""
    for number, trial in enumerate(trials, start=1):
        log = directory / f"{trial.name}.log"
        again = trial.folder.is_done
        if not again:
            with console.status(f"{number}/{len(trials)}  {trial.name}: tail -f {log}"):
                code = train_trial(sweep, trial, log)
            if code == PREEMPTED:
                console.print(f"{trial.name} was asked to stop and has saved; the same command goes on from there")
                return PREEMPTED
        rows.append(result(trial, log))
        failed = rows[-1].get("failed")
        what = f"failed: {failed}; see {log}" if failed else f"{rows[-1]['eval.best.accuracy']:.2f} %"
        console.print(f"{number}/{len(trials)}  {trial.name}: {what}{' (was done)' if again else ''}")
        if not failed:
            log.unlink(missing_ok=True)
        said = write(directory, sweep, rows)
    heads, *lines = cells(ranked(rows))
    table = Table(*heads, box=None)
    for line in lines:
        table.add_row(*line)
    table_console(highlight=False, markup=False).print(table)
    console.print(f"{said}\n{directory / 'sweep.md'}")
    return FAILED if all("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
