"""Evaluates the network of a run folder: `python -m mnist_dist.evaluate runs/simple_cnn/…`.

Prints accuracy, loss, calibration error, the accuracy of each class and the confusion matrix. On the run's own data and
on the same kind of device the figures equal those of its last evaluation, because code, batches and precision are the
same. Another kind of device rounds differently. A device that cannot compute in the run's precision, such as a CPU in
fp16, evaluates in fp32, and a note says so.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("evaluate")  # before the imports below load torch

import sys
from typing import Any, Literal

from rich.table import Table

from mnist_dist.distributed.launcher import launched_world
from mnist_dist.engine.evaluation import evaluate_mean
from mnist_dist.engine.precision import PRECISION_NAMES
from mnist_dist.run.evaluation import (
    evaluate_run,
    evaluation_precision,
    load_evaluation_data,
    precision_notes,
    report,
    write_report,
)
from mnist_dist.run.reader import Run, open_run
from mnist_dist.run.tables import table_console


def evaluate(run: Run, *overrides: str, split: str = "test", tta: Literal["flip"] | None = None) -> dict[str, Any]:
    """Evaluates a run's network on the run's own data, or on other data that `overrides` name.

    Collective: call on every rank.

    Args:
        overrides: recipe keys, e.g. `data.dataset=kmnist`.
        split: "test", or "validation" for the images that the recipe held out.
        tta: test-time augmentation. "flip" also evaluates the mean of the probabilities of each image and its mirror
            image.

    Returns:
        The keys of `mnist_dist.run.evaluation.report`, and `dataset`, `split`, `weights`, `precision` ("fp32", "bf16"
        or "fp16") and `notes`, a list of texts, which say if the precision is not the run's. With `tta` also `tta`: its
        `name`, `accuracy`, `loss` and `calibration_error`.

    Raises:
        RecipeError: the data cannot be read or has another number of classes.
        OSError, ValueError: the weights are missing or damaged.
    """
    recipe, data = load_evaluation_data(run, *overrides, split=split)
    plain = evaluate_run(run, recipe, data)
    result = report(plain, data.labels, data.classes) | {
        "dataset": recipe.data.dataset,
        "split": split,
        "weights": run.weights,
        "precision": PRECISION_NAMES[evaluation_precision(recipe)],
        "notes": precision_notes(recipe),
    }
    if tta == "flip":
        mean = evaluate_mean([plain, evaluate_run(run, recipe, data, mirrored=True)], data.labels.cpu())
        figures = report(mean, data.labels, data.classes)
        result["tta"] = {"name": tta} | {key: figures[key] for key in ("accuracy", "loss", "calibration_error")}
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a line of totals, one for --tta and the notes, then a table with accuracy and confusions of each class."""
    console = table_console()
    console.print(
        f"accuracy {result['accuracy']:.2f} % of {result['images']:,} images ({result['dataset']}, {result['split']}), "
        f"loss {result['loss']:.4f}, calibration error {result['calibration_error']:.4f}, {result['weights']} weights",
        highlight=False,
    )
    if augmented := result.get("tta"):
        console.print(
            f"accuracy {augmented['accuracy']:.2f} % with --tta {augmented['name']}, "
            f"loss {augmented['loss']:.4f}, calibration error {augmented['calibration_error']:.4f}",
            highlight=False,
        )
    for note in result["notes"]:
        console.print(note, highlight=False, soft_wrap=True)
    heading = "rows: true class, columns: predicted class"
    table = Table("class", "accuracy", "images", *result["classes"], box=None, title=heading)
    for (name, each), row in zip(result["classes"].items(), result["confusion"], strict=True):
        accuracy = "" if each["accuracy"] is None else f"{each['accuracy']:.2f} %"
        table.add_row(name, accuracy, str(each["images"]), *(str(count) if count else "·" for count in row))
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns exit code 0. Exit code 2 means: no such run, weights or data."""
    arguments = parse("evaluate", argv)
    run = open_run(arguments.run, arguments.weights, arguments.allow_code)
    data = [f"data.dataset={arguments.data}"] if arguments.data else []
    result = evaluate(run, *data, *arguments.overrides, split=arguments.split, tta=arguments.tta)
    if launched_world().is_main_process:
        if arguments.json:
            write_report(arguments.json, result)
        show(result)
    launched_world().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
