"""Run folders -> one table and one page: what was claimed, what was measured, over seeds.

`python -m mnist_dist.compare runs` prints the table and writes the page, curves and all; `--live` serves the page and
follows the runs that are still training. `--keep FILE` adds the runs' summaries to a file of JSON lines, which can
stand in for run folders in the table, and `--markdown FILE` writes the table between a Markdown file's marks.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parser_of, run_command

if __name__ == "__main__":
    answer_early("compare")  # before the imports below load torch

import json
import re
import statistics
import sys
from collections.abc import Callable, Hashable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mnist_dist.compare.live import LiveServer
from mnist_dist.compare.page import Page, PageRun, differing_keys, embedded, render, say
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.file import bundled_recipes, note_measured, recipe_notes
from mnist_dist.recipe.schema import load_recipe
from mnist_dist.run.folder import write_text
from mnist_dist.run.reader import RunReader, find_runs, is_summary, numbers
from mnist_dist.run.tables import markdown_table, table_console

MARKS = ("<!-- results: made by mnist_dist.compare -->", "<!-- end of results -->")
COLUMNS = (
    "recipe",
    "parameters",
    "claim",
    "last epoch",
    "best epoch",
    "n",
    "epochs",
    "time",
    "precision",
    "ran on",
    "commit",
    "verdict",
)
"""Of the Markdown table, whose rows are finished runs."""
WIDE_COLUMNS = (
    "recipe",
    "parameters",
    "last epoch",
    "best epoch",
    "test",
    "n",
    "epochs",
    "images/s",
    "time",
    "world size",
    "precision",
    "status",
    "verdict",
    "device",
)
"""Of the printed table and the page; those that no row has anything in are left out."""

# --- the table ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The summary of a run, and the run folder it comes from; None for a kept summary."""

    summary: dict[str, Any]
    run: RunReader | None = None

    @property
    def is_finished(self) -> bool:
        return self.run is None or self.run.is_finished

    @property
    def key(self) -> Hashable:
        """Equal for runs that differ only in the seed; an unfinished one is alone. Kept summaries have no recipe."""
        if self.run and not self.is_finished:
            return self.run.name
        keys = ("recipe", "epochs", "mixed_precision", "world_size", "device")
        return self.run and self.run.key, *(self.summary.get(key) for key in (keys[2:] if self.run else keys))


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed."""

    runs: list[Measured]
    label: str = ""
    """The recipe, and its keys that set it apart from other rows of the same name."""

    @property
    def recipe(self) -> str:
        return self.runs[0].summary["recipe"]

    def values(self, key: str) -> list[float]:
        return numbers([run.summary for run in self.runs], key)

    def mean(self, key: str) -> float | None:
        return statistics.mean(self.values(key)) if self.values(key) else None

    def cells(self) -> dict[str, tuple[str, float | str | None]]:
        """For each column its text, and what to sort it by; None where there is nothing."""
        times, speeds = self.values("train_seconds"), self.values("images_per_second")
        seconds = statistics.median(times) if times else None  # a run that stood still for a while says little
        world, parameters, epochs = self.mean("world_size"), self.mean("parameters"), self.mean("epochs") or 0.0
        device, precision = (str(self.runs[0].summary.get(key) or "") for key in ("device", "mixed_precision"))
        statuses = [run.run.status for run in self.runs if run.run]
        commits = [_short(str(run.summary.get("git_commit") or "")) for run in self.runs]
        accuracy = {which: self.values(f"{which}.accuracy") for which in ("eval.last", "eval.best", "test")}
        texts: dict[str, tuple[str, Any]] = {
            "recipe": (self.label or self.recipe, None),
            "parameters": (f"{parameters:,.0f}" if parameters else "", parameters),
            "claim": (_claimed(self.recipe)[1], None),
            "last epoch": (mean_and_deviation(accuracy["eval.last"]), self.mean("eval.last.accuracy")),
            "best epoch": (mean_and_deviation(accuracy["eval.best"]), self.mean("eval.best.accuracy")),
            "test": (mean_and_deviation(accuracy["test"]), self.mean("test.accuracy")),
            "n": (str(len(self.runs)), len(self.runs)),
            "epochs": (f"{epochs:.4g}", epochs),
            "images/s": (mean_and_deviation(speeds, ",.0f"), self.mean("images_per_second")),
            "time": ("" if seconds is None else _time(seconds), seconds),
            "world size": ("" if world is None else f"{world:g}", world),
            "precision": ({"no": "fp32"}.get(precision, precision), None),
            "device": (device, None),
            "ran on": (f"{world} × {device}" if world and world > 1 else device, None),
            "commit": (", ".join(dict.fromkeys(filter(None, commits))), None),
            "status": (", ".join(dict.fromkeys(statuses)), None),
            "verdict": (self.verdict(), None),
        }
        return {name: (text, (text or None) if value is None else value) for name, (text, value) in texts.items()}

    def verdict(self) -> str:
        """The claimed accuracy against the mean of the last epochs, and of the best: how the documents judge."""
        path, claim, full = _claimed(self.recipe)
        if not self.runs[0].is_finished or path is None or not (claimed := re.search(r"(\d+(?:\.\d+)?) %", claim)):
            return ""
        if (epochs := self.mean("epochs") or 0.0) < full:
            return f"{epochs:.4g} of {full} epochs"
        target = float(claimed[1]) - (0.05 if "~" in claim.split("%")[0] else 0)  # "~99.4" has no second decimal
        if "training accuracy" in claim:
            training = self.mean("train.last.accuracy") or 0.0
            return f"{'met' if training >= target else 'not met'}: {training:.2f} over the epoch's training batches"
        last, best = self.mean("eval.last.accuracy") or 0.0, self.mean("eval.best.accuracy") or 0.0
        return "met" if last >= target else "met at the best epoch" if best >= target else "not met"

    def measured(self) -> str:
        """One line for a recipe's head comment."""
        columns = ("last epoch", "best epoch", "n", "epochs", "precision", "ran on")
        last, best, count, epochs, precision, device = (self.cells()[column][0] for column in columns)
        return f"{last} % last epoch, {best} % best (n = {count}, {epochs} epochs, {precision}, {device})"


def _shipped() -> dict[str, Path]:
    """The file of each shipped recipe by its runs' name, which is without the folder."""
    return {path.stem: path for path in bundled_recipes().values()}


def _short(commit: str) -> str:
    """As git shortens it, with what may follow it, e.g. -dirty."""
    name, dash, rest = commit.partition("-")
    return f"{name[:7]}{dash}{rest}"


@cache  # a live page asks every two seconds
def _claimed(recipe: str) -> tuple[Path | None, str, float]:
    """Of a bundled recipe its file, the document's claim and the full number of epochs."""
    path = _shipped().get(recipe)
    return (path, recipe_notes(path).get("claim", ""), load_recipe(path).epochs) if path else (None, "", 0.0)


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def mean_and_deviation(values: list[float], form: str = ".2f") -> str:
    """Mean ± standard deviation; empty for no values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def group(measured: list[Measured]) -> list[Row]:
    """Rows in the order of the shipped recipes; a seed that ran twice counts once, the later one."""
    groups: dict[Hashable, dict[Any, Measured]] = {}
    for run in measured:
        groups.setdefault(run.key, {})[run.summary["seed"]] = run
    label = labels(measured)
    rows = [list(runs.values()) for runs in groups.values()]
    return in_order([Row(runs, label(runs[0])) for runs in rows])


def in_order(rows: list[Row]) -> list[Row]:
    """Sorted by the place of their recipe among the shipped ones; others behind them."""
    rank = {name: place for place, name in enumerate(_shipped())}
    return sorted(rows, key=lambda row: rank.get(row.recipe, len(rank)))


def labels(measured: list[Measured]) -> Callable[[Measured], str]:
    """Names a run by its recipe, and by up to three keys that set it apart from runs of other recipes of that name."""
    recipes: dict[str, dict[Hashable, dict[str, Any]]] = {}
    for each in measured:
        if each.run:
            recipes.setdefault(each.summary["recipe"], {})[each.run.key] = each.run.result_keys
    differ = {name: differing_keys(list(families.values())) for name, families in recipes.items()}

    def label(each: Measured) -> str:
        recipe = each.run.result_keys if each.run else {}
        words = [f"{key}={say(recipe[key])}" for key in differ.get(each.summary["recipe"], []) if key in recipe]
        return " ".join([each.summary["recipe"], *words[:3], *(["…"] if len(words) > 3 else [])])

    return label


def to_markdown(rows: list[Row]) -> str:
    cells = [row.cells() for row in rows]
    return markdown_table([COLUMNS, *(tuple(row[column][0] for column in COLUMNS) for row in cells)])


def replace_between_marks(path: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Writes `text` between a file's two marks, and leaves the rest as it is; a new file has nothing else.

    Raises:
        RecipeError: the file lacks the marks.
    """
    content = path.read_text(encoding="utf-8") if path.exists() else "\n".join(marks) + "\n"
    before, start, rest = content.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not start or not end:
        raise RecipeError([Problem(str(path), "", f"has no lines {marks[0]} and {marks[1]} to write between")])
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def note_in_recipes(rows: list[Row]) -> None:
    """Writes each row into the `# measured:` line of its recipe; of several rows the last, the longest, stays."""
    for row in rows:
        path = _shipped().get(row.recipe)
        if path is not None:
            note_measured(path, row.measured())


def print_table(rows: list[Row]) -> None:
    cells = [row.cells() for row in rows]
    columns = [column for column in WIDE_COLUMNS if any(row[column][0] for row in cells)]
    table = Table(*columns, box=None)
    for row in cells:
        table.add_row(*(Text(row[column][0]) for column in columns))
    table_console().print(table)


# --- the page -----------------------------------------------------------------------------------------------------


class Comparison:
    """Run folders, folders that hold some, and files of kept summaries, to be read as often as one likes.

    Args:
        may_wait: a folder need not hold a run yet.

    Raises:
        RecipeError: a path is none of these.
    """

    def __init__(self, paths: list[Path], *, may_wait: bool = False):
        self._kept = [kept for path in paths if path.is_file() for kept in _read_kept(path)]
        self._folders = [path for path in paths if not path.is_file()]
        self._readers: dict[Path, RunReader] = {}
        for path in self._folders:
            if not path.is_dir():
                raise RecipeError([Problem(str(path), "", "there is no such file or folder")])
            if not may_wait and not any(find_runs(path)):
                what = "not a run folder, and no folder in it is one: what makes one is its recipe.yaml"
                raise RecipeError([Problem(str(path), "", what)])

    def read(self) -> list[Measured]:
        """All runs as they are now, with those that have come into a folder of runs since."""
        paths = dict.fromkeys(path for folder in self._folders for path in find_runs(folder))
        for path in paths:
            if path in self._readers:
                self._readers[path].refresh()
            else:
                self._readers[path] = RunReader(path)
        return [*self._kept, *(Measured(self._readers[path].summary, self._readers[path]) for path in paths)]

    def page_values(self, page: Page) -> dict[str, Any]:
        """The page's values as the runs are now."""
        measured = self.read()
        label = labels(measured)
        single = in_order([Row([each], label(each)) for each in measured])
        runs = [
            PageRun(
                name=run.name,
                label=row.label,
                family=run.key,
                recipe=run.result_keys,
                seed=run.summary["seed"],
                status=run.status,
                accuracy=run.summary["eval.last.accuracy"] if run.is_finished else None,
                lines=run.lines,
                changes=run.changes,
                plots=run.folder.plots,
            )
            for row in single
            if (run := row.runs[0].run)
        ]
        return page.data(runs, tables={"groups": plain(group(measured)), "single": plain(single)})


def plain(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as the page takes them: their runs' names, and the cells of the wide columns."""
    taken = []
    for row in rows:
        cells = row.cells()
        names = [each.run.name for each in row.runs if each.run]
        taken.append({"runs": names, "cells": {column: cells[column] for column in WIDE_COLUMNS}})
    return taken


def _read_kept(path: Path) -> list[Measured]:
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            values = json.loads(line)
            if not is_summary(values):
                raise ValueError(f"line {number} is not the summary of a run")
            found.append(Measured(values))
    except (OSError, ValueError) as error:
        what = f"not a file of kept summaries: {error}\ngive run folders, or a file that --keep has written"
        raise RecipeError([Problem(str(path), "", what)]) from error
    return found


# --- the command line ---------------------------------------------------------------------------------------------


def follow(comparison: Comparison, port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        RecipeError: the port cannot be had.
    """
    try:
        server = LiveServer(port, comparison.page_values)
    except (OSError, OverflowError) as error:
        what = f"cannot serve on port {port}: {getattr(error, 'strerror', None) or error}; give another, or 0 for any"
        raise RecipeError([Problem("command line", "--port", what)]) from error
    with server, suppress(KeyboardInterrupt):
        print(f"{server.url} follows these runs; Ctrl-C ends it", flush=True)
        server.serve_forever()


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, or 2 for what is no run, a file that cannot be written, or a port that is taken."""
    parser = parser_of("compare")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.html and arguments.html.is_dir():
        parser.error(f"--html names a file, and {arguments.html} is a folder")
    comparison = Comparison(arguments.runs, may_wait=arguments.live)
    measured = comparison.read()
    print_table(group(measured))
    finished = [each for each in measured if each.is_finished]
    if not finished and (arguments.keep or arguments.markdown or arguments.recipes):
        raise RecipeError([Problem("command line", "", "none of these runs has finished: there is nothing to write")])
    try:
        if arguments.keep:
            with arguments.keep.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(each.summary) + "\n" for each in finished)
        if arguments.markdown:
            replace_between_marks(arguments.markdown, to_markdown(group(finished)))
        if arguments.recipes:
            note_in_recipes(group(finished))
        if arguments.live:
            follow(comparison, arguments.port)
        elif arguments.html or (not arguments.no_html and any(each.run for each in measured)):
            path = arguments.html or Path("compare.html")
            write_text(path, render(comparison.page_values(Page(embedded))))
            print(f"{path}: the table with curves and pictures, for any browser")
    except (OSError, UnicodeError) as error:
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise RecipeError([Problem(str(where or "the file"), "", f"cannot be written: {why or error}")]) from error
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
