"""Trials: one run folder and one process each."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mnist_dist.distributed.launcher import launched_world
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.changes import describe_changes
from mnist_dist.recipe.file import Dumper
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import load_data
from mnist_dist.run.folder import RunFolder
from mnist_dist.sweep.search_space import Choice, Sweep

VALIDATION = 5000
"""Training images held out to judge trials by, where the recipe holds none out; at most a sixth."""


# --- trials -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    name: str
    choice: Choice
    words: list[str]
    """Its overrides."""
    recipe: Recipe
    folder: RunFolder


def plan(sweep: Sweep, directory: Path) -> list[Trial]:
    """The trials, each with its resolved recipe and its folder.

    Raises:
        RecipeError: any of them could not be trained, or its folder holds something else.
    """
    if "data.validation" in sweep.choices[0]:
        what = "trials are compared by these images: it cannot be searched"
        raise RecipeError([Problem("the search", "data.validation", what)])
    base, shared = load_recipe(sweep.recipe, *sweep.words), []
    if base.data.validation == 0:
        everything = base.model_copy(update={"data": base.data.model_copy(update={"limit_train": None})})
        size = len(load_data(everything, launched_world()).train)
        shared.append(f"data.validation={min(VALIDATION, size // 6)}")
        print(f"{shared[0]}: so many training images are held out, and trials judged by them, not by the test set")
    if base.tracking.wandb.group is None:
        shared += [word("tracking.wandb.group", sweep.name), "tracking.wandb.job_type=sweep"]
    trials, problems = [], []
    for name, choice in zip(_names(sweep.choices), sweep.choices, strict=True):
        words = [*(word(*pair) for pair in choice.items()), *shared, word("name", name)]
        try:
            recipe = load_recipe(sweep.recipe, *sweep.words, *words)
        except RecipeError as error:
            problems += error.problems
            continue
        folder = RunFolder(directory / name)
        if folder.recipe.is_file():
            begun = load_recipe(folder.recipe)
            resolved = {"mixed_precision": recipe.mixed_precision or begun.mixed_precision}
            if changes := describe_changes(begun, recipe.model_copy(update=resolved)):
                listed = "\n".join([*changes, "name another --run-dir"])
                problems.append(Problem(str(folder.path), "", f"holds a trial of another recipe:\n{listed}"))
        trials.append(Trial(name, choice, words, recipe, folder))
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return trials


def word(key: str, value: Any) -> str:
    """The override that gives `key` this value."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def _names(choices: list[Choice]) -> list[str]:
    """A folder's name for each: its values, by the last part of their keys where that is no other's."""
    names: list[str] = []
    for choice in choices:
        lasts = Counter(key.rpartition(".")[2] for key in choice)
        short = {key: last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in choice}
        text = ",".join(f"{short[key]}={value}" for key, value in choice.items())
        name = re.sub(r"[^\w.=,+-]+", "_", text)[:80]
        names.append(f"{name}-{len(names)}" if name in names else name)
    return names


def train_trial(sweep: Sweep, trial: Trial, log: Path) -> int:
    """Trains it in a process of its own, whose words go to `log`; returns its exit code.

    SIGTERM and SIGUSR1 are passed on to it, so that it saves and does not train on alone; the code is PREEMPTED then.

    Raises:
        RecipeError: the command cannot be started.
    """
    where = ["--recipe", sweep.recipe, "--run-dir", str(trial.folder.path)]
    command = [*sweep.command, *where, *sweep.words, *trial.words]
    with log.open("w", encoding="utf-8") as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise RecipeError([Problem(shlex.join(command), "", f"cannot be started: {error.strerror}")]) from error
        asked: list[int] = []

        def pass_on(number: int, frame: object) -> None:
            asked.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = process.wait()
            return PREEMPTED if asked else code
        except KeyboardInterrupt:  # Ctrl-C reached it too: it saves
            process.wait()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def result(trial: Trial, log: Path) -> dict[str, Any]:
    """What became of it, for the table."""
    row: dict[str, Any] = {"trial": trial.name, "values": trial.choice}
    if not trial.folder.is_done:
        return row | {"failed": _failure_of(log)}
    summary = json.loads(trial.folder.summary.read_text(encoding="utf-8"))
    assert summary["eval.split"] == "validation"
    keys = ("eval.best.accuracy", "eval.best.epoch", "eval.last.accuracy", "eval.last.loss", "train_seconds")
    return row | {key: summary[key] for key in keys} | {"test.accuracy": summary["test.accuracy"]}


def _failure_of(log: Path) -> str:
    """Why a trial failed, on one line: the trainer's own screen, else the end of a traceback."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    screen = [place for place, line in enumerate(lines) if line.startswith("mnist_dist: ")]
    words = " ".join(lines[screen[-1] if screen else -1 :]) or "without a word"
    return words.removeprefix("mnist_dist: ")[:200]
