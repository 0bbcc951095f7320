"""Rows of the table: runs that differ only in their seed."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from mnist_dist.compare.page import differing_keys, say
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.file import bundled_recipes, note_measured, recipe_notes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.run.reader import RunReader, numbers
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


def plain(rows: list[Row]) -> list[dict[str, Any]]:
    """Rows as the page takes them: their runs' names, and the cells of the wide columns."""
    taken = []
    for row in rows:
        cells = row.cells()
        names = [each.run.name for each in row.runs if each.run]
        taken.append({"runs": names, "cells": {column: cells[column] for column in WIDE_COLUMNS}})
    return taken
