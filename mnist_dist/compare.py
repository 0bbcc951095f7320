"""Run folders -> one table: what was claimed, what was measured, over seeds.

`python -m mnist_dist.compare runs/*/*` prints it. `--keep FILE` adds the runs' summaries to a file of JSON lines, which
can stand in for run folders anywhere, and `--markdown FILE` writes the table between a Markdown file's marks.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mnist_dist.command_line import Parser, run_door
from mnist_dist.recipe import load_recipe
from mnist_dist.recipe_file import Problem, RecipeError, bundled_recipes, recipe_notes
from mnist_dist.runs import load_run

EXAMPLES = """\
examples:
  python -m mnist_dist.compare runs/*/*
  python -m mnist_dist.compare runs/results/* --keep configs/results.jsonl
  python -m mnist_dist.compare configs/results.jsonl --markdown README.md --recipes
"""

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
    "verdict",
)


def read_summaries(paths: list[Path]) -> list[dict[str, Any]]:
    """Summaries of run folders, and of files of JSON lines that hold summaries; unfinished runs are passed over.

    Raises:
        RecipeError: a path is neither.
    """
    found = []
    for path in paths:
        if path.is_file():
            found += [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            continue
        try:
            run = load_run(path)
        except FileNotFoundError as error:
            raise RecipeError([Problem(str(path), "", str(error))]) from error
        if run.folder.summary.is_file():
            found.append(run.summary)
    return found


@dataclass(frozen=True)
class Row:
    """Runs that differ only in their seed."""

    runs: list[dict[str, Any]]

    def cells(self) -> tuple[str, ...]:
        """One text per column of `COLUMNS`."""
        first, name = self.runs[0], self.runs[0]["recipe"]
        path = bundled_recipes().get(name)
        claim = recipe_notes(path).get("claim", "") if path else ""
        seconds = self.mean("train_seconds")
        world = f"{first['world_size']} × " if first["world_size"] > 1 else ""
        return (
            name,
            f"{first['parameters']:,}",
            claim,
            spread([run["eval.last.accuracy"] for run in self.runs]),
            spread([run["eval.best.accuracy"] for run in self.runs]),
            str(len(self.runs)),
            f"{first['epochs']:g}",
            f"{seconds:.0f} s" if seconds < 600 else f"{seconds / 60:.0f} min",
            {"no": "fp32"}.get(first["mixed_precision"], first["mixed_precision"]),
            world + first["device"],
            self.verdict(claim, path),
        )

    def verdict(self, claim: str, path: Path | None) -> str:
        """The claimed accuracy against the mean of the last epochs, and of the best: how the documents judge."""
        if path is None or not (claimed := re.search(r"(\d+(?:\.\d+)?) %", claim)):
            return ""
        full = load_recipe(path).epochs
        if self.runs[0]["epochs"] < full:
            return f"{self.runs[0]['epochs']:g} of {full} epochs"
        target = float(claimed[1]) - (0.05 if "~" in claim.split("%")[0] else 0)  # "~99.4" has no second decimal
        if "training accuracy" in claim:
            training = self.mean("train.last.accuracy")
            return f"{'met' if training >= target else 'not met'}: {training:.2f} over the epoch's training batches"
        if self.mean("eval.last.accuracy") >= target:
            return "met"
        return "met at the best epoch" if self.mean("eval.best.accuracy") >= target else "not met"

    def mean(self, key: str) -> float:
        return statistics.mean(run[key] for run in self.runs)

    def measured(self) -> str:
        """One line for a recipe's head comment."""
        _, _, _, last, best, count, epochs, _, precision, device, _ = self.cells()
        return f"{last} % last epoch, {best} % best (n = {count}, {epochs} epochs, {precision}, {device})"


def spread(values: list[float]) -> str:
    """Mean ± standard deviation, in percent."""
    deviation = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{deviation}"


def group(summaries: list[dict[str, Any]]) -> list[Row]:
    """Rows in the order of the shipped recipes; a seed that ran twice counts once, the later one."""
    keys = ("recipe", "epochs", "mixed_precision", "world_size", "device")
    groups: dict[tuple[Any, ...], dict[int, dict[str, Any]]] = {}
    for summary in summaries:
        groups.setdefault(tuple(summary[key] for key in keys), {})[summary["seed"]] = summary
    order = list(bundled_recipes())
    rank = {name: place for place, name in enumerate(order)}
    return [
        Row(list(runs.values())) for key, runs in sorted(groups.items(), key=lambda item: rank.get(item[0][0], 999))
    ]


def to_markdown(rows: list[Row]) -> str:
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_between_marks(path: Path, text: str, marks: tuple[str, str] = MARKS) -> None:
    """Writes `text` between a file's two marks, and leaves the rest as it is.

    Raises:
        RecipeError: the file lacks the marks.
    """
    content = path.read_text(encoding="utf-8")
    before, start, rest = content.partition(marks[0])
    _, end, after = rest.partition(marks[1])
    if not start or not end:
        raise RecipeError([Problem(str(path), "", f"has no lines {marks[0]} and {marks[1]} to write between")])
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def note_in_recipes(rows: list[Row]) -> None:
    """Writes each row into the `# measured:` line of its recipe; of several rows the last, the longest, stays."""
    for row in rows:
        path = bundled_recipes().get(row.runs[0]["recipe"])
        if path is not None:
            text = path.read_text(encoding="utf-8")
            path.write_text(re.sub(r"(?m)^# measured: .*$", f"# measured: {row.measured()}", text), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = Parser("mnist_dist.compare", "Tables what run folders measured.", EXAMPLES)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or files of kept summaries")
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add the summaries to this file of JSON lines")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table between this file's marks")
    parser.add_argument("--recipes", action="store_true", help="write the figures into the recipes' head comments")
    arguments = parser.parse_args(argv)
    summaries = read_summaries(arguments.runs)
    if not summaries:
        raise RecipeError([Problem("command line", "", "none of these runs has finished: there is nothing to compare")])
    rows = group(summaries)
    if arguments.keep:
        with arguments.keep.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(summary) + "\n" for summary in summaries)
    if arguments.markdown:
        replace_between_marks(arguments.markdown, to_markdown(rows))
    if arguments.recipes:
        note_in_recipes(rows)
    table = Table(*COLUMNS, box=None)
    for row in rows:
        table.add_row(*row.cells())
    console = Console()
    (console if console.is_terminal else Console(width=200)).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(run_door(main))
