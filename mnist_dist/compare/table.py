"""The table of runs: one row for runs that differ only in their seed."""

from __future__ import annotations

import os
import re
import statistics
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mnist_dist.compare.page import as_written, differing_keys
from mnist_dist.engine.files import write_atomically
from mnist_dist.engine.precision import PRECISION_NAMES
from mnist_dist.errors import Problem, RecipeError, did_you_mean
from mnist_dist.recipe.changes import flatten
from mnist_dist.recipe.file import bundled_recipes, note_measured, recipe_notes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.run.reader import RunReader, numbers
from mnist_dist.run.text_output import fill_between_marks, markdown_table, markdown_text, printable, table_console
from mnist_dist.run.world_history import sizes

MARKS = ("<!-- results: made by mnist_dist.compare -->", "<!-- end of results -->")
"""The lines before and after a table in a Markdown file. If the first line is
`<!-- results of lenet5, ms_ran: made by mnist_dist.compare -->`, the table has these recipes and `SHORT_COLUMNS`."""

FIRST_MARK = re.compile(r"<!-- results(?: of (?P<recipes>[^\n:]+))?: made by mnist_dist\.compare -->")

COLUMNS = (
    "recipe", "parameters", "claim", "last epoch", "best epoch", "verdict", "n", "epochs", "time", "precision",
    "ran on", "commit",
)  # fmt: skip
"""Columns of a Markdown table of all finished runs."""

SHORT_COLUMNS = ("recipe", "parameters", "claim", "last epoch", "n", "epochs", "time", "verdict")
"""Columns of a Markdown table of selected recipes."""

WIDE_COLUMNS = (
    "recipe", "data", "parameters", "last epoch", "best epoch", "test", "n", "epochs", "images/s", "time",
    "world size", "precision", "status", "verdict", "device",
)  # fmt: skip
"""Columns of the printed table and of the page, except those that are empty in every row."""

# --- rows ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """The summary of a run and the run folder that it comes from; None for a kept summary."""

    summary: dict[str, Any]
    run: RunReader | None = None

    @property
    def is_finished(self) -> bool:
        return self.run is None or self.run.is_finished

    @property
    def key(self) -> Hashable:
        """A value that is equal for runs that differ only in the seed. No other run has the value of an unfinished run.

        A kept summary holds no recipe; its value contains the recipe's name and the number of epochs instead.
        """
        if self.run and not self.is_finished:
            return self.run.name
        keys = ("recipe", "epochs", "mixed_precision", "world_size", "device")
        # repr: a stranger's summary may hold lists.
        return self.run and self.run.key, *(repr(self.summary.get(key)) for key in (keys[2:] if self.run else keys))


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed."""

    runs: list[Measured]
    label: str = ""
    """The recipe's name, and the keys in which it differs from other rows of the same name."""
    newest: int = 0
    """The position of the row's last run among all runs that were read; a higher one is a newer run."""

    @property
    def recipe(self) -> str:
        return self.runs[0].summary["recipe"]

    @property
    def data(self) -> str:
        """The data set; empty for a kept summary."""
        return self.runs[0].run.data if self.runs[0].run else ""

    def values(self, key: str) -> list[float]:
        """Returns the finite numbers of the runs' summaries under a key."""
        return numbers([run.summary for run in self.runs], key)

    def mean(self, key: str) -> float | None:
        """Returns the mean of `values(key)`; None if no run has a value."""
        return statistics.mean(self.values(key)) if self.values(key) else None

    def cells(self) -> dict[str, tuple[str, float | str | None]]:
        """Returns the cell of each column: its text and its sort key, which is None for an empty cell."""
        times, speeds = self.values("train_seconds"), self.values("images_per_second")
        seconds = statistics.median(times) if times else None  # the mean would count the pauses of a suspended machine
        world, parameters, epochs = self.mean("world_size"), self.mean("parameters"), self.mean("epochs") or 0.0
        device, precision = (str(self.runs[0].summary.get(key) or "") for key in ("device", "mixed_precision"))
        changed = ", ".join(text for run in self.runs if run.run and "→" in (text := sizes(run.run.world)))
        statuses = [run.run.status for run in self.runs if run.run]
        commits = [_short(str(run.summary.get("git_commit") or "")) for run in self.runs]
        accuracy = {which: self.values(f"{which}.accuracy") for which in ("eval.last", "eval.best", "test")}
        texts: dict[str, tuple[str, Any]] = {
            "recipe": (self.label or self.recipe, None),
            "data": (self.data, None),
            "parameters": (f"{parameters:,.0f}" if parameters else "", parameters),
            "claim": (_claimed(self.recipe, self.data)[1], None),
            "last epoch": (mean_and_deviation(accuracy["eval.last"]), self.mean("eval.last.accuracy")),
            "best epoch": (mean_and_deviation(accuracy["eval.best"]), self.mean("eval.best.accuracy")),
            "test": (mean_and_deviation(accuracy["test"]), self.mean("test.accuracy")),
            "n": (str(len(self.runs)), len(self.runs)),
            "epochs": (f"{epochs:.4g}", epochs),
            "images/s": (mean_and_deviation(speeds, ",.0f"), self.mean("images_per_second")),
            "time": ("" if seconds is None else _time(seconds), seconds),
            "world size": (changed or ("" if world is None else f"{world:g}"), world),
            "precision": (PRECISION_NAMES.get(precision, precision), None),
            "device": (device, None),
            "ran on": (f"{world} × {device}" if world and world > 1 else device, None),
            "commit": (", ".join(dict.fromkeys(filter(None, commits))), None),
            "status": (", ".join(dict.fromkeys(statuses)), None),
            "verdict": (self.verdict(), None),
        }
        plain = {name: (printable(text), value) for name, (text, value) in texts.items()}
        return {name: (text, (text or None) if value is None else value) for name, (text, value) in plain.items()}

    def verdict(self) -> str:
        """Compares the claimed accuracy with the means of the last and of the best epochs.

        The documents report the best epoch, so a claim may be "met at the best epoch" only.
        """
        path, claim, full = _claimed(self.recipe, self.data)
        if not self.runs[0].is_finished or path is None or not (claimed := re.search(r"(\d+(?:\.\d+)?) %", claim)):
            return ""
        if (epochs := self.mean("epochs") or 0.0) < full:
            return f"{epochs:.4g} of {full} epochs"
        target = float(claimed[1]) - (0.05 if "~" in claim.split("%")[0] else 0)  # "~99.4" has no second decimal
        if "training accuracy" in claim:
            training = self.mean("train.last.accuracy") or 0.0
            return f"{'met' if training >= target else 'not met'}: {training:.2f} in training"
        last, best = self.mean("eval.last.accuracy") or 0.0, self.mean("eval.best.accuracy") or 0.0
        return "met" if last >= target else "met at the best epoch" if best >= target else "not met"

    def measured(self) -> str:
        """Returns the line for the `# measured:` comment of the recipe."""
        columns = ("last epoch", "best epoch", "n", "epochs", "precision", "ran on")
        last, best, count, epochs, precision, device = (self.cells()[column][0] for column in columns)
        return f"{last} % last epoch, {best} % best (n = {count}, {epochs} epochs, {precision}, {device})"


def _shipped() -> dict[str, Path]:
    """Returns the file of each shipped recipe by the name that its runs have, which is without the folder."""
    return {path.stem: path for path in bundled_recipes().values()}


def _short(commit: str) -> str:
    """Returns the first seven digits of a commit, with a suffix such as -dirty."""
    name, dash, rest = commit.partition("-")
    return f"{name[:7]}{dash}{rest}"


@cache  # a live page asks every two seconds
def _claimed(name: str, data: str) -> tuple[Path | None, str, float]:
    """Returns the file of a shipped recipe, the document's claim and the recipe's number of epochs.

    None, an empty text and 0 if `data`, the data set of a run, is not that of the claim: the one that the line `data`
    of the head comment names, else the recipe's.
    """
    if path := _shipped().get(name):
        recipe, notes = load_recipe(path), recipe_notes(path)
        if data in ("", notes.get("data", recipe.data.dataset).split(",")[0]):
            return path, notes.get("claim", ""), recipe.epochs
    return None, "", 0.0


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min"


def mean_and_deviation(values: list[float], form: str = ".2f") -> str:
    """Returns mean ± standard deviation; an empty text for no values."""
    if not values:
        return ""
    deviation = f" ± {statistics.stdev(values):{form}}" if len(values) > 1 else ""
    return f"{statistics.mean(values):{form}}{deviation}"


def group(measured: list[Measured]) -> list[Row]:
    """Returns the rows in the order of the shipped recipes. In a row, the later of two runs with one seed counts."""
    groups: dict[Hashable, dict[Any, Measured]] = {}
    newest: dict[Hashable, int] = {}
    for position, run in enumerate(measured):
        groups.setdefault(run.key, {})[run.summary["seed"]] = run
        newest[run.key] = position
    label = labels(measured)
    rows = [(list(runs.values()), newest[key]) for key, runs in groups.items()]
    return in_order([Row(runs, label(runs[0]), position) for runs, position in rows])


def in_order(rows: list[Row]) -> list[Row]:
    """Returns the rows of the documents' recipes, then of the other shipped recipes, then of other recipes."""
    ranks = _ranks()
    return sorted(rows, key=lambda row: ranks.get(row.recipe, (True, len(ranks))))


@cache
def _ranks() -> dict[str, tuple[bool, int]]:
    """Returns whether a shipped recipe is of no document, and its position among all, by its name."""
    notes = ((name, recipe_notes(path)) for name, path in _shipped().items())
    return {name: (each.get("document") == "none", place) for place, (name, each) in enumerate(notes)}


def labels(measured: list[Measured]) -> Callable[[Measured], str]:
    """Returns a function that names a run: its recipe, and up to three keys that differ within recipes of that name."""
    recipes: dict[str, dict[Hashable, dict[str, Any]]] = {}
    for each in measured:
        if each.run:
            recipes.setdefault(each.summary["recipe"], {})[each.run.key] = each.run.result_keys
    differing = {name: differing_keys(list(families.values())) for name, families in recipes.items()}

    def label(each: Measured) -> str:
        recipe = each.run.result_keys if each.run else {}
        keys = [key for key in differing.get(each.summary["recipe"], []) if key in recipe]
        words = [f"{key}={as_written(recipe[key])}" for key in keys]
        return " ".join([each.summary["recipe"], *words[:3], *(["…"] if len(words) > 3 else [])])

    return label


# --- output ------------------------------------------------------------------------------------------------------


def to_markdown(rows: list[Row], columns: Sequence[str] = COLUMNS, folder: Path | None = None) -> str:
    """Returns the rows as a Markdown table.

    Args:
        folder: of the Markdown file. Recipe names link to the recipe's file if both are in this repository.
    """
    lines = []
    for row in rows:
        cells = {column: markdown_text(text) for column, (text, _) in row.cells().items()}
        cells["recipe"] = _linked(row, cells["recipe"], folder)
        lines.append(tuple(cells[column] for column in columns))
    return markdown_table([tuple(columns), *lines])


def _linked(row: Row, label: str, folder: Path | None) -> str:
    path, repository = _shipped().get(row.recipe), Path(__file__).parents[2]
    if folder is None or path is None or not folder.resolve().is_relative_to(repository):
        return label
    target = os.path.relpath(path, folder.resolve())
    return f"[{row.recipe}]({Path(target).as_posix()}){label.removeprefix(row.recipe)}"


def fill_tables(content: str, rows: list[Row], path: Path) -> str:
    """Returns the text of a Markdown file with a new table between each pair of marks; see `MARKS`.

    Args:
        content: the text of the file now.
        path: the file, for links and messages.

    Raises:
        RecipeError: there is no pair of marks, or a selected recipe has no row.
    """

    def table(mark: re.Match[str]) -> str:
        if mark["recipes"] is None:
            return to_markdown(rows, COLUMNS, path.parent)
        names = [name.strip() for name in mark["recipes"].split(",")]
        found = {name: [row for row in rows if row.recipe == name] for name in names}
        if missing := [name for name in names if not found[name]]:
            message = f"{path} selects recipes without a finished run: "
            message += ", ".join(repr(name) + did_you_mean(name, {row.recipe for row in rows}) for name in missing)
            raise RecipeError([Problem("command line", "--markdown", message, "missing")])
        return to_markdown([row for name in names for row in found[name]], SHORT_COLUMNS, path.parent)

    return fill_between_marks(content, table, path, MARKS, FIRST_MARK)


def write_tables(path: Path, rows: list[Row]) -> None:
    """Rewrites every table between marks in a Markdown file; a new file gets one table of all rows.

    Raises:
        RecipeError: see `fill_tables`; nothing was written.
        OSError, UnicodeError: the file cannot be read or written.
    """
    content = path.read_text(encoding="utf-8") if path.exists() else "\n".join(MARKS) + "\n"
    write_atomically(path, fill_tables(content, rows, path))


def representative_rows(rows: list[Row]) -> dict[str, Row]:
    """Returns one row for each shipped recipe that has any: the row for the recipe's `# measured:` line.

    The number of epochs decides first: the recipe's own number, or the number nearest to it. Then the row with the
    fewest overrides counts, then the row with the most seeds, then the newest row.
    """

    def rank(row: Row) -> tuple[float, int, int, int]:
        distance = abs((row.mean("epochs") or 0.0) - _claimed(row.recipe, row.data)[2])
        return -distance, -_overrides(row), len(row.runs), row.newest

    chosen: dict[str, Row] = {}
    for row in rows:
        if _claimed(row.recipe, row.data)[0]:
            chosen[row.recipe] = max(chosen.get(row.recipe, row), row, key=rank)
    return chosen


def _overrides(row: Row) -> int:
    """Returns the number of keys that differ from the shipped recipe; 0 for a kept summary, which holds no recipe."""
    keys = row.runs[0].run.result_keys if row.runs[0].run else {}
    shipped = flatten(load_recipe(_shipped()[row.recipe]).model_dump(mode="json"))
    return sum(shipped.get(key) != value for key, value in keys.items())


def note_in_recipes(rows: list[Row]) -> None:
    """Writes the `# measured:` line of every shipped recipe that has a row; see `representative_rows`."""
    for recipe, row in representative_rows(rows).items():
        note_measured(_shipped()[recipe], row.measured())


def print_table(rows: list[Row]) -> None:
    """Prints the columns of `WIDE_COLUMNS` that are not empty."""
    cells = [row.cells() for row in rows]
    columns = [column for column in WIDE_COLUMNS if any(row[column][0] for row in cells)]
    table = Table(*columns, box=None)
    for row in cells:
        table.add_row(*(Text(row[column][0]) for column in columns))
    table_console().print(table)


def page_rows(rows: list[Row]) -> list[dict[str, Any]]:
    """Returns the rows for the page: the names of their runs, and their cells in `WIDE_COLUMNS`."""
    found = []
    for row in rows:
        cells = row.cells()
        names = [each.run.name for each in row.runs if each.run]
        found.append({"runs": names, "cells": {column: cells[column] for column in WIDE_COLUMNS}})
    return found
