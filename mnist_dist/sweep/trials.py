"""Plans and trains the trials of a search, each in its own run folder and process."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mnist_dist.data import is_data_code
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.distributed.signals import PREEMPTED, handled_signals
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.models import is_code
from mnist_dist.recipe.changes import describe_changes
from mnist_dist.recipe.file import Dumper
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.data import load_data, require_permission
from mnist_dist.run.folder import RunFolder
from mnist_dist.sweep.search_space import Choice, Sweep

VALIDATION = 5000
"""Number of training images to hold out if the recipe holds none out; at most a sixth of all."""

# --- planning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """One combination of values, ready to train."""

    name: str
    choice: Choice
    words: list[str]
    """The overrides of this trial alone."""
    recipe: Recipe
    folder: RunFolder


def plan(sweep: Sweep, directory: Path) -> list[Trial]:
    """Returns the trials, each with its resolved recipe and its folder.

    Raises:
        RecipeError: the recipe of a trial has a problem, or its folder holds a trial of another recipe.
    """
    if "data.validation" in sweep.choices[0]:
        message = "cannot be searched, because trials are compared by their accuracy on the validation images"
        raise RecipeError([Problem("the search", "data.validation", message, "conflict")])
    shared = _shared_overrides(sweep)
    trials: list[Trial] = []
    problems: list[Problem] = []
    for name, choice in zip(trial_names(sweep.choices), sweep.choices, strict=True):
        words = [*(override(*pair) for pair in choice.items()), *shared, override("name", name)]
        try:
            recipe, folder = _load(sweep, *words), RunFolder(directory / name)
            _check_folder(folder, recipe)
            trials.append(Trial(name, choice, words, recipe, folder))
        except RecipeError as error:
            problems += error.problems
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return trials


def _load(sweep: Sweep, *words: str) -> Recipe:
    """Loads the recipe of a trial. The recipe and the sweep file may come from a stranger.

    Raises:
        RecipeError: the recipe has a problem, or a file names code that is not allowed. Nothing was imported.
    """
    recipe = load_recipe(sweep.recipe, *sweep.words, *words, import_code=False)
    code = {"network": recipe.model.name} if is_code(recipe.model.name) else {}
    if is_data_code(recipe.data.dataset):
        code["data set"] = recipe.data.dataset
    # The complete name must have been typed: a file could name code that is only a part of another word.
    typed = {part for word in sweep.typed for part in re.split(r"[=,\s\[\]{}'\"]+", word)}
    for what, name in code.items():
        if name not in typed:
            require_permission(name, sweep.allow_code, what)
    return load_recipe(sweep.recipe, *sweep.words, *words) if code else recipe


def _shared_overrides(sweep: Sweep) -> list[str]:
    """Returns overrides that hold out validation images and group the trials in W&B, unless the recipe does so."""
    base, shared = _load(sweep), []
    if base.data.validation == 0:
        unlimited = base.model_copy(update={"data": base.data.model_copy(update={"limit_train": None})})
        size = len(load_data(unlimited, launched_world()).train)
        shared.append(f"data.validation={min(VALIDATION, size // 6)}")
        print(f"{shared[0]}: trials are compared by accuracy on these held-out training images, not on the test set")
    if base.tracking.wandb.group is None and not os.environ.get("WANDB_RUN_GROUP"):
        shared += [override("tracking.wandb.group", sweep.name), "tracking.wandb.job_type=sweep"]
    return shared


def _check_folder(folder: RunFolder, recipe: Recipe) -> None:
    """Checks that a trial's folder is new or belongs to the same recipe.

    Raises:
        RecipeError: it holds a run of another recipe.
    """
    if not folder.recipe.is_file():
        return
    existing = load_recipe(folder.recipe, import_code=False)
    precision = recipe.mixed_precision or existing.mixed_precision  # a run stores its launcher's precision
    if changes := describe_changes(existing, recipe.model_copy(update={"mixed_precision": precision})):
        listed = "\n".join([*changes, "name another folder with --run-dir"])
        message = f"{folder.path} holds a trial of another recipe:\n{listed}"
        raise RecipeError([Problem("command line", "--run-dir", message, "exists")])


def override(key: str, value: Any) -> str:
    """Returns the override `key=value` as text that parses back to the value."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def trial_names(choices: list[Choice]) -> list[str]:
    """Returns a different folder name for each choice: `lr=0.1,seed=1`.

    A key is shortened to its last part, unless another key of the choice ends with the same part.
    """
    names: list[str] = []
    for choice in choices:
        lasts = Counter(key.rpartition(".")[2] for key in choice)
        short = {key: last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in choice}
        text = ",".join(f"{short[key]}={value}" for key, value in choice.items())
        name = re.sub(r"[^\w.=,+-]+", "_", text)[:80]
        names.append(f"{name}-{len(names)}" if name in names else name)
    return names


# --- training -----------------------------------------------------------------------------------------------------


def train_trial(sweep: Sweep, trial: Trial, log: Path) -> int:
    """Trains a trial in its own process, whose output is written to `log`; returns its exit code.

    SIGTERM, SIGUSR1 and SIGHUP are passed on to the process, so that it saves a checkpoint and stops. The exit code is
    then PREEMPTED.

    Raises:
        RecipeError: the command cannot be started.
    """
    command = [
        *sweep.command,
        "--recipe",
        sweep.recipe,
        "--run-dir",
        str(trial.folder.path),
        *sweep.words,
        *trial.words,
    ]
    with log.open("w", encoding="utf-8") as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            message = f"cannot be started: {error.strerror}"
            raise RecipeError([Problem(shlex.join(command), "command", message, "missing")]) from error
        received: list[int] = []

        def pass_on(number: int, frame: object) -> None:
            received.append(number)
            process.send_signal(number)

        passed_on = (each for each in handled_signals() if each != signal.SIGINT)
        before = {number: signal.signal(number, pass_on) for number in passed_on}
        try:
            code = process.wait()
            return PREEMPTED if received else code
        except KeyboardInterrupt:  # the terminal sends Ctrl-C to the trial too; wait until it has saved a checkpoint
            process.wait()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def result(trial: Trial, log: Path) -> dict[str, Any]:
    """Returns the trial's row for the table: name, values, and its figures, or `failed` with the reason."""
    row: dict[str, Any] = {"trial": trial.name, "values": trial.choice}
    summary = trial.folder.results
    if summary is None:
        return row | {"failed": _failure_reason(log)}
    assert summary["eval.split"] == "validation"
    keys = ("eval.best.accuracy", "eval.best.epoch", "eval.last.accuracy", "eval.last.loss", "train_seconds")
    return row | {key: summary[key] for key in keys} | {"test.accuracy": summary["test.accuracy"]}


def _failure_reason(log: Path) -> str:
    """Returns why a trial failed, on one line: the trainer's own message, else the last line of the log."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    starts = [index for index, line in enumerate(lines) if line.startswith("mnist_dist: ")]
    text = " ".join(lines[starts[-1] if starts else -1 :]) or "no output"
    return textwrap.shorten(text.removeprefix("mnist_dist: "), 200, placeholder=" …")
