"""A run folder -> accuracy, loss, classes, confusions, calibration: `python -m mnist_dist.evaluate runs/simple_cnn/…`.

With the run's own data the numbers are those of its last evaluation, to the image: same code, batches, precision.
"""

from __future__ import annotations

import sys
from typing import Any

from rich.table import Table

from mnist_dist.cli import answer_early, parse, run_command
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.run.evaluation import evaluate_run, read_data, report, write_report
from mnist_dist.run.reader import Run, open_run
from mnist_dist.run.tables import table_console

if __name__ == "__main__":
    answer_early("evaluate")  # before the imports below load torch


def evaluate(run: Run, *overrides: str, split: str = "test") -> dict[str, Any]:
    """Judges a run's network on its own data, or on other data that `overrides` name.

    Args:
        overrides: recipe keys, e.g. `data.dataset=kmnist`.
        split: "test", or "validation" for the images that the recipe held out.

    Returns:
        `accuracy` (percent), `loss`, `images`, `calibration_error` (0 to 1), `classes` (for each its `images`,
        `correct` and `accuracy`), `confusion` (rows: truth, columns: prediction), `weights`, `split`, `dataset`.

    Raises:
        RecipeError: no such data, or data of another number of classes.
        OSError, ValueError: no whole weights there.
    """
    recipe, data = read_data(run, *overrides, split=split)
    return report(evaluate_run(run, recipe, data), data.labels, data.classes) | {
        "dataset": recipe.data.dataset,
        "split": split,
        "weights": run.weights,
    }


def show(result: dict[str, Any], classes: list[str]) -> None:
    """The report as two tables."""
    console = table_console()
    console.print(
        f"{result['accuracy']:.2f} % of {result['images']:,} images ({result['dataset']}, {result['split']}), "
        f"loss {result['loss']:.4f}, calibration error {result['calibration_error']:.4f}, {result['weights']} weights",
        highlight=False,
    )
    table = Table("class", "accuracy", "images", *classes, box=None, title="rows: truth, columns: prediction")
    for (name, each), row in zip(result["classes"].items(), result["confusion"], strict=True):
        accuracy = "" if each["accuracy"] is None else f"{each['accuracy']:.2f} %"
        table.add_row(name, accuracy, str(each["images"]), *(str(count) if count else "·" for count in row))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, or 2 for a folder or data that cannot be judged."""
    arguments = parse("evaluate", argv)
    run = open_run(arguments.run, arguments.weights)
    data = [f"data.dataset={arguments.data}"] if arguments.data else []
    result = evaluate(run, *data, *arguments.overrides, split=arguments.split)
    if launched_world().is_main_process:
        write_report(arguments.json, result)
        show(result, list(result["classes"]))
    launched_world().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
