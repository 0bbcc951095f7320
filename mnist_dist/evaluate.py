"""Evaluates the network of a run folder: `python -m mnist_dist.evaluate runs/simple_cnn/…`.

Prints accuracy, loss, calibration error, balanced accuracy, macro F1, AUROC, the accuracy of each class and the
confusion matrix. On the run's own data and on the same kind of device the figures equal those of its last evaluation,
because code, batches and precision are the same. Another kind of device rounds differently. A device that cannot
compute in the run's precision, such as a CPU in fp16, evaluates in fp32, and a note says so.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("evaluate")  # before the imports below load torch

from typing import Any, Literal

from rich.table import Table

from mnist_dist.distributed.launcher import end_process, launched_world
from mnist_dist.engine.evaluation import evaluate_mean
from mnist_dist.engine.precision import PRECISION_NAMES
from mnist_dist.run.evaluation import (
    Split,
    class_average_notes,
    describe_averages,
    evaluate_run,
    evaluation_precision,
    load_evaluation_data,
    precision_notes,
    report,
    write_report,
)
from mnist_dist.run.reader import Run, open_run
from mnist_dist.run.text_output import printable, table_console

MOST_COLUMNS = 20
"""With more classes the confusion matrix is not printed."""

WIDEST = 120
"""If the names of all classes have more letters than this, the columns of the confusion matrix are numbered."""

MOST_ROWS = 40
"""Of more classes, those with the lowest accuracy are printed."""


def evaluate(run: Run, *overrides: str, split: Split = "test", tta: Literal["flip"] | None = None) -> dict[str, Any]:
    """Evaluates a run's network on the run's own data, or on other data that `overrides` name.

    Collective: call on every rank.

    Args:
        overrides: recipe keys, e.g. `data.dataset=kmnist`.
        split: "test"; "validation" for the images that the recipe held out; "all" for all images of the data set, e.g.
            of new images of the user's own.
        tta: test-time augmentation. "flip" also evaluates the mean of the probabilities of each image and its mirror
            image.

    Returns:
        The keys of `mnist_dist.run.evaluation.report`, and `dataset`, `split`, `weights`, `precision` ("fp32", "bf16"
        or "fp16") and `notes`, a list of texts: that the precision is not the run's, or what could not be computed.
        With `tta` also `tta`: its `name`, `accuracy`, `loss` and `calibration_error`.

    Raises:
        RecipeError: the data cannot be read, or the network does not know its classes or the shape of its images.
        OSError, ValueError: the weights are missing or damaged.
    """
    recipe, data, notes = load_evaluation_data(run, *overrides, split=split)
    plain = evaluate_run(run, recipe, data)
    result = report(plain, data.labels, data.classes) | {
        "dataset": recipe.data.dataset,
        "split": split,
        "weights": run.weights,
        "precision": PRECISION_NAMES[evaluation_precision(recipe)],
        "notes": notes + precision_notes(recipe) + class_average_notes(),
    }
    if tta == "flip":
        mean = evaluate_mean([plain, evaluate_run(run, recipe, data, mirrored=True)], data.labels.cpu())
        figures = report(mean, data.labels, data.classes)
        result["tta"] = {"name": tta} | {key: figures[key] for key in ("accuracy", "loss", "calibration_error")}
    return result


def show(result: dict[str, Any]) -> None:
    """Prints lines of totals, of averages over the classes and for --tta, the notes, and a table of the classes."""
    console = table_console()
    console.print(
        f"accuracy {result['accuracy']:.2f} % of {result['images']:,} images ({result['dataset']}, {result['split']}), "
        f"loss {result['loss']:.4f}, calibration error {result['calibration_error']:.4f}, {result['weights']} weights",
        highlight=False,
    )
    if averages := describe_averages(result):
        console.print(", ".join(f"{name} {text}" for name, text in averages.items()), highlight=False)
    if augmented := result.get("tta"):
        console.print(
            f"accuracy {augmented['accuracy']:.2f} % with --tta {augmented['name']}, "
            f"loss {augmented['loss']:.4f}, calibration error {augmented['calibration_error']:.4f}",
            highlight=False,
        )
    for note in result["notes"]:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(_matrix_table(result) if len(result["classes"]) <= MOST_COLUMNS else _class_table(result))


def _matrix_table(result: dict[str, Any]) -> Table:
    """Returns a table with a row for each class: its accuracy and its row of the confusion matrix."""
    names = [printable(name) for name in result["classes"]]
    # Wide columns would not fit into a terminal.
    short = sum(map(len, names)) <= WIDEST
    heads = names if short else [str(number) for number in range(1, len(names) + 1)]
    heading = f"rows: true class, columns: predicted class{'' if short else ', by its number'}"
    table = Table("class", "accuracy", "images", *heads, box=None, title=heading)
    for head, name, each, row in zip(heads, names, result["classes"].values(), result["confusion"], strict=True):
        label = name if short else f"{head} {name}"
        table.add_row(label, _percent(each), str(each["images"]), *(str(count) if count else "·" for count in row))
    return table


def _class_table(result: dict[str, Any]) -> Table:
    """Returns a table of the classes with the lowest accuracy, each with the class that it is most often taken for."""
    names = [printable(name) for name in result["classes"]]
    figures = list(result["classes"].values())
    known = [index for index, each in enumerate(figures) if each["images"]]
    lowest = sorted(known, key=lambda index: figures[index]["accuracy"])[:MOST_ROWS]
    heading = f"the {len(lowest)} classes with the lowest accuracy of {len(names)}; --json FILE has all"
    table = Table("class", "accuracy", "images", "most often taken for", box=None, title=heading)
    for index in lowest:
        wrong = [0 if other == index else count for other, count in enumerate(result["confusion"][index])]
        most = max(wrong)
        taken = f"{names[wrong.index(most)]} ({most})" if most else ""
        table.add_row(names[index], _percent(figures[index]), str(figures[index]["images"]), taken)
    return table


def _percent(figures: dict[str, Any]) -> str:
    return "" if figures["accuracy"] is None else f"{figures['accuracy']:.2f} %"


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
    end_process(run_command(main))
