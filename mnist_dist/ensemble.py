"""Run folders -> one answer, the mean of their probabilities: `python -m mnist_dist.ensemble runs/a runs/b runs/c`.

It says what each network is worth alone, what they are worth together, and on how many images they disagree. Such a
mean is the "deep ensemble" of Lakshminarayanan, Pritzel, Blundell, NeurIPS 2017.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parser_of, run_command

if __name__ == "__main__":
    answer_early("ensemble")  # before the imports below load torch

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mnist_dist.distributed.launcher import launched_world
from mnist_dist.engine.evaluation import Evaluation, score
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.run.evaluation import calibration_error, evaluate_run, read_data, report, write_report
from mnist_dist.run.reader import Run, open_run
from mnist_dist.run.tables import table_console


def ensemble(runs: list[Run], *overrides: str) -> dict[str, Any]:
    """Judges the mean of the runs' probabilities on their test set, or on other data that `overrides` name.

    Returns:
        What `evaluate` returns for the whole, and `members` (for each its `run`, `accuracy`, `loss` and
        `calibration_error`) and `disagreements`, the number of images that not all members take for the same.

    Raises:
        RecipeError: fewer than two runs, one twice, different classes or test sets, or no such data.
        OSError, ValueError: no whole weights there.
    """

    def refuse(run: Run, what: str) -> RecipeError:
        return RecipeError([Problem(str(run.folder.path), "", what)])

    first, others = runs[0], runs[1:]
    if not others:
        raise refuse(first, "one run is no ensemble; name at least two")
    recipes, sets = zip(*(read_data(run, *overrides) for run in runs), strict=True)
    seen: dict[Path, Run] = {}
    for run, data in zip(runs, sets, strict=True):
        if twin := seen.get(run.folder.path.resolve()):
            raise refuse(run, f"the same run as {twin.folder.path}: it would have two votes")
        seen[run.folder.path.resolve()] = run
        if run.about["classes"] != first.about["classes"]:
            raise refuse(run, f"knows other classes than {first.folder.path}")
        if not (torch.equal(data.images, sets[0].images) and torch.equal(data.labels, sets[0].labels)):
            hint = "name one for all, e.g. --data mnist data.limit_test=null"
            raise refuse(run, f"has another test set than {first.folder.path}; {hint}")

    members = [evaluate_run(run, recipe, data) for run, recipe, data in zip(runs, recipes, sets, strict=True)]
    labels, classes = sets[0].labels.cpu(), sets[0].classes
    whole = mean_of(members, labels)
    guesses = torch.stack([member.probabilities.argmax(dim=1) for member in members])
    return report(whole, labels, classes) | {
        "dataset": recipes[0].data.dataset,
        "split": "test",
        "weights": first.weights,
        "disagreements": int((guesses != guesses[0]).any(dim=0).sum()),
        "members": [
            {
                "run": str(run.folder.path),
                "accuracy": member.accuracy,
                "loss": member.loss,
                "calibration_error": calibration_error(member.probabilities, labels),
            }
            for run, member in zip(runs, members, strict=True)
        ],
    }


def mean_of(members: list[Evaluation], labels: torch.Tensor) -> Evaluation:
    """The evaluation of the mean of the members' probabilities; `labels` int64 (N,)."""
    probabilities = torch.stack([member.probabilities for member in members]).mean(dim=0)
    # A probability may have been too small for float32, where each member's own loss comes from its logarithm.
    return score(probabilities.double().clamp(min=torch.finfo(torch.float32).tiny).log(), labels)


def summary(runs: list[Run], accuracy: float) -> dict[str, Any]:
    """What compare tables of an ensemble, in the words of a run's summary: sizes and times summed, the rest shared.

    The seed is the first member's. What the members do not share is left out.
    """
    of_all = [json.loads(run.folder.summary.read_text(encoding="utf-8")) for run in runs]
    kept = ("world_size", "device", "mixed_precision", "versions", "git_commit")
    shared = [key for key in kept if all(each.get(key) == of_all[0].get(key) for each in of_all)]
    names = Counter(each["recipe"] for each in of_all)
    return {
        "recipe": "mean of " + " + ".join(f"{count} × {name}" for name, count in names.items()),
        "seed": of_all[0]["seed"],
        **{key: sum(each[key] for each in of_all) for key in ("parameters", "train_seconds")},
        "epochs": max(each["epochs"] for each in of_all),
        **{key: of_all[0].get(key) for key in shared},
        "eval.last.accuracy": accuracy,
        "eval.best.accuracy": accuracy,
    }


def keep(path: Path, runs: list[Run], accuracy: float) -> None:
    """Adds the ensemble's summary to a file of JSON lines.

    Raises:
        RecipeError: it cannot be written, or a member has no summary.
    """
    try:
        line = json.dumps(summary(runs, accuracy))
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        what = f"{error.filename}: {error.strerror}; --keep needs a file to write and the members' summary.json"
        raise RecipeError([Problem("command line: --keep", "", what)]) from error


def show(result: dict[str, Any]) -> None:
    """One line a member, one for the whole."""
    console = table_console()
    table = Table("run", "accuracy", "loss", "calibration error", box=None)
    for each in [*result["members"], {"run": f"mean of {len(result['members'])}"} | result]:
        figures = f"{each['accuracy']:.2f} %", f"{each['loss']:.4f}", f"{each['calibration_error']:.4f}"
        table.add_row(each["run"], *figures)
    console.print(table)
    what = f"{result['images']:,} images ({result['dataset']}, {result['split']}), {result['weights']} weights"
    console.print(f"{what}; the members disagree on {result['disagreements']:,}", highlight=False)


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, or 2 for runs or data that do not go together."""
    parser = parser_of("ensemble")
    arguments = parser.parse_intermixed_args(argv)
    overrides = [word for word in arguments.words if "=" in word and not Path(word).exists()]
    folders = [word for word in arguments.words if word not in overrides]
    if not folders:
        parser.error("name at least two run folders")
    data = [f"data.dataset={arguments.data}"] if arguments.data else []
    if arguments.keep and (data or overrides or arguments.weights != "last"):
        parser.error("--keep is for the last weights on the members' own test set: no --data, --weights or key=value")
    runs = [open_run(folder, arguments.weights) for folder in folders]
    result = ensemble(runs, *data, *overrides)
    if launched_world().is_main_process:
        write_report(arguments.json, result)
        if arguments.keep:
            keep(arguments.keep, runs, result["accuracy"])
        show(result)
    launched_world().destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
