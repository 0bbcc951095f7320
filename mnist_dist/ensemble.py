"""Evaluates the mean of several networks' probabilities: `python -m mnist_dist.ensemble runs/a runs/b runs/c`.

Prints the figures of each network alone and of the mean, and the number of images that the networks classify
differently. Such a mean is the "deep ensemble" of Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("ensemble")  # before the imports below load torch

import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mnist_dist.data import Images
from mnist_dist.distributed.launcher import end_process, launched_world
from mnist_dist.engine.evaluation import evaluate_mean
from mnist_dist.engine.precision import PRECISION_NAMES
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.run.evaluation import (
    calibration_error,
    class_average_notes,
    class_averages,
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


def ensemble(runs: list[Run], *overrides: str) -> dict[str, Any]:
    """Evaluates the mean of the runs' probabilities on their common test set, or on other data that `overrides` name.

    Collective: call on every rank.

    Args:
        runs: the members, at least two.
        overrides: recipe keys, applied to every member, e.g. `data.dataset=kmnist`.

    Returns:
        What `evaluate` returns but `precision`, for the mean of the probabilities; `members`, for each its `run`,
        `precision`, `accuracy`, `loss`, `calibration_error` and averages over the classes; and `disagreements`, the
        number of images on which not all members predict the same class.

    Raises:
        RecipeError: there are fewer than two runs, a run is named twice, the runs have different classes or test sets,
            or the data cannot be read.
        OSError, ValueError: the weights of a run are missing or damaged.
    """
    if len(runs) < 2:
        raise _refusal(runs[0], "an ensemble needs at least two runs", "usage")
    recipes, test_sets, notes = zip(*(load_evaluation_data(run, *overrides) for run in runs), strict=True)
    _check_members(runs, test_sets)
    evaluations = [evaluate_run(run, recipe, data) for run, recipe, data in zip(runs, recipes, test_sets, strict=True)]
    labels, classes = test_sets[0].labels.cpu(), test_sets[0].classes
    predictions = torch.stack([each.probabilities.argmax(dim=1) for each in evaluations])
    return report(evaluate_mean(evaluations, labels), labels, classes) | {
        "dataset": recipes[0].data.dataset,
        "split": "test",
        "weights": runs[0].weights,
        "disagreements": int((predictions != predictions[0]).any(dim=0).sum()),
        "notes": notes[0] + precision_notes(*recipes) + class_average_notes(),
        "members": [
            {
                "run": str(run.folder.path),
                "precision": PRECISION_NAMES[evaluation_precision(recipe)],
                "accuracy": each.accuracy,
                "loss": each.loss,
                "calibration_error": calibration_error(each.probabilities, labels),
                **class_averages(each.probabilities, labels),
            }
            for run, recipe, each in zip(runs, recipes, evaluations, strict=True)
        ],
    }


def _check_members(runs: list[Run], test_sets: tuple[Images, ...]) -> None:
    """Raises RecipeError for a run named twice, and for classes or a test set other than the first run's."""
    first, first_set = runs[0], test_sets[0]
    seen: dict[Path, Run] = {}
    for run, data in zip(runs, test_sets, strict=True):
        if twin := seen.get(run.folder.path.resolve()):
            raise _refusal(run, f"the same run as {twin.folder.path}; name each run once", "conflict")
        seen[run.folder.path.resolve()] = run
        if run.about["classes"] != first.about["classes"]:
            raise _refusal(run, f"its classes differ from those of {first.folder.path}", "conflict")
        if not (torch.equal(data.images, first_set.images) and torch.equal(data.labels, first_set.labels)):
            hint = "name one test set for all runs, e.g. --data mnist data.limit_test=null"
            raise _refusal(run, f"its test set differs from that of {first.folder.path}; {hint}", "conflict")


def _refusal(run: Run, message: str, kind: Kind) -> RecipeError:
    return RecipeError([Problem("command line", str(run.folder.path), message, kind)])


def summarize_ensemble(runs: list[Run], accuracy: float) -> dict[str, Any]:
    """Returns a summary of the ensemble with the keys of a run's summary.json, as a row for `compare`.

    Parameters and training seconds are sums over the members. The seed is the first member's. Of device, precision,
    number of processes, versions and commit, only those are included that all members share.

    Raises:
        OSError: a member has no summary.json.
    """
    summaries = [run.summary for run in runs]
    kept = ("world_size", "device", "mixed_precision", "versions", "git_commit")
    shared = [key for key in kept if all(each.get(key) == summaries[0].get(key) for each in summaries)]
    names = Counter(each["recipe"] for each in summaries)
    return {
        "recipe": "mean of " + " + ".join(f"{count} × {name}" for name, count in names.items()),
        "seed": summaries[0]["seed"],
        **{key: sum(each[key] for each in summaries) for key in ("parameters", "train_seconds")},
        "epochs": max(each["epochs"] for each in summaries),
        **{key: summaries[0].get(key) for key in shared},
        "eval.last.accuracy": accuracy,
        "eval.best.accuracy": accuracy,
    }


def append_summary(path: Path, runs: list[Run], accuracy: float) -> None:
    """Appends the ensemble's summary to the file of JSON lines that `--keep` names.

    Raises:
        RecipeError: a member has no summary.json or a damaged one, or the file cannot be written.
    """
    try:
        line = json.dumps(summarize_ensemble(runs, accuracy))
    except OSError as error:
        message = f"{error.filename}: {error.strerror}; --keep needs finished runs"
        raise RecipeError([Problem("command line", "--keep", message, "missing")]) from error
    except (ValueError, KeyError, TypeError) as error:
        message = f"the summary.json of a member is damaged: {error}"
        raise RecipeError([Problem("command line", "--keep", message, "damaged")]) from error
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        message = f"{path} cannot be written: {error.strerror}"
        raise RecipeError([Problem("command line", "--keep", message, "unwritable")]) from error


def show(result: dict[str, Any]) -> None:
    """Prints a table with one row for each member and one for the mean."""
    console = table_console()
    averages = list(describe_averages(result))
    table = Table("run", "accuracy", "loss", "calibration error", *averages, box=None)
    for each in [*result["members"], {"run": f"mean of {len(result['members'])}"} | result]:
        figures = f"{each['accuracy']:.2f} %", f"{each['loss']:.4f}", f"{each['calibration_error']:.4f}"
        described = describe_averages(each)
        table.add_row(printable(each["run"]), *figures, *(described.get(name, "") for name in averages))
    console.print(table)
    data = f"{result['images']:,} images ({result['dataset']}, {result['split']}), {result['weights']} weights"
    for note in result["notes"]:
        console.print(note, highlight=False, soft_wrap=True)
    console.print(f"{data}; the members disagree on {result['disagreements']:,} images", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns exit code 0. Exit code 2 means: missing runs or data, or runs that do not match."""
    arguments = parse("ensemble", argv)
    overrides = [word for word in arguments.words if "=" in word and not Path(word).exists()]
    folders = [word for word in arguments.words if word not in overrides]
    if not folders:
        raise RecipeError([Problem("command line", "RUN", "name at least two run folders", "usage")])
    data = [f"data.dataset={arguments.data}"] if arguments.data else []
    if arguments.keep and (data or overrides or arguments.weights != "last"):
        message = (
            "--keep records the last weights on the members' own test set; leave out --data, --weights and key=value"
        )
        raise RecipeError([Problem("command line", "--keep", message, "conflict")])
    runs = [open_run(folder, arguments.weights, arguments.allow_code) for folder in folders]
    if arguments.keep and (notes := precision_notes(*(run.recipe for run in runs))):
        # The kept line names the members' own precision.
        raise RecipeError([Problem("command line", "--keep", notes[0], "unsupported")])
    result = ensemble(runs, *data, *overrides)
    if launched_world().is_main_process:
        if arguments.json:
            write_report(arguments.json, result)
        if arguments.keep:
            append_summary(arguments.keep, runs, result["accuracy"])
        show(result)
    launched_world().destroy_process_group()
    return 0


if __name__ == "__main__":
    end_process(run_command(main))
