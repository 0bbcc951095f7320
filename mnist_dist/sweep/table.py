"""Writes the result of a search: a table of ranked trials, and the files sweep.json and sweep.md."""

from __future__ import annotations

import json
import shlex
import textwrap
from pathlib import Path
from typing import Any

from rich.table import Table

from mnist_dist.engine.files import write_atomically
from mnist_dist.run.text_output import markdown_table, table_console
from mnist_dist.sweep.search_space import Sweep
from mnist_dist.sweep.trials import override


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the rows with the best validation accuracy first, the lower loss if equal, and failed trials last."""
    return sorted(rows, key=lambda row: (-row.get("eval.best.accuracy", -1.0), row.get("eval.last.loss", 0.0)))


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Returns the table as text; the first row holds the column headings."""
    keys = list(rows[0]["values"])
    lines = [[*keys, "validation", "at epoch", "last epoch", "loss", "time", "trial"]]
    for row in rows:
        figures = _figures(row) if "failed" not in row else [f"failed: {_short(row['failed'])}", "", "", "", ""]
        lines.append([*(str(row["values"][key]) for key in keys), *figures, row["trial"]])
    return lines


def _short(reason: str) -> str:
    return textwrap.shorten(reason, 80, placeholder=" …")


def _figures(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['eval.best.accuracy']:.2f} %",
        f"{row['eval.best.epoch']:.4g}",
        f"{row['eval.last.accuracy']:.2f} %",
        f"{row['eval.last.loss']:.4f}",
        f"{row['train_seconds']:.0f} s",
    ]


def describe_best(sweep: Sweep, rows: list[dict[str, Any]]) -> str:
    """Returns the best trial's figures and the command that trains its recipe on all training images."""
    best = ranked(rows)[0]
    if "failed" in best:
        return "every trial failed"
    # The recipe or the sweep file may also hold images out. The last override counts, so this one comes last.
    words = [*sweep.words, *(override(*pair) for pair in best["values"].items()), "data.validation=0"]
    return (
        f"best: {best['trial']}, {best['eval.best.accuracy']:.2f} % of the validation images "
        f"({best['test.accuracy']:.2f} % of the test images after its last epoch)\n\n"
        f"train on all training images: python -m mnist_dist.train --recipe {sweep.recipe} {shlex.join(words)}"
    )


def write_results(directory: Path, sweep: Sweep, rows: list[dict[str, Any]]) -> None:
    """Writes sweep.json and sweep.md into the search's folder."""
    rows = ranked(rows)
    content = {"sweep": sweep.name, "recipe": sweep.recipe, "trials": rows}
    write_atomically(directory / "sweep.json", json.dumps(content, indent=2))
    text = f"# {sweep.name}\n\n{markdown_table(cells(rows))}\n\n{describe_best(sweep, rows)}\n"
    write_atomically(directory / "sweep.md", text)


def print_table(rows: list[dict[str, Any]]) -> None:
    """Prints the ranked trials."""
    headings, *lines = cells(ranked(rows))
    table = Table(*headings, box=None)
    for line in lines:
        table.add_row(*line)
    table_console(highlight=False, markup=False).print(table)
