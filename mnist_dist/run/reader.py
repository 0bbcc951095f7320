"""Reading run folders: `RunReader` follows a run in any state, `load_run` loads a trained network."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Hashable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from mnist_dist.engine.checkpoint import load_weights
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.models import build_model
from mnist_dist.recipe.changes import HARMLESS_KEYS, flatten
from mnist_dist.recipe.file import read_recipe
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.tables import printable
from mnist_dist.tracking import JSONLReader

SILENCE = 600.0
"""Seconds without a new line after which the status of a run that is training mentions its silence."""

# --- a run in any state -------------------------------------------------------------------------------------------


def find_runs(path: Path) -> Iterator[Path]:
    """Yields the run folder itself, or every run folder below `path`, in the order of their names."""
    for folder, folders, files in os.walk(path):
        if "recipe.yaml" in files:
            yield Path(folder)
            folders.clear()
        folders[:] = sorted(name for name in folders if not name.startswith("."))


class RunReader:
    """A run folder whose run may be training, finished, failed, preempted or damaged.

    `refresh` reads what is new. It raises no error, whatever is missing or damaged.

    Attributes:
        name: the path as text that any console can print.
        recipe: dotted keys and values of the resolved recipe; empty if recipe.yaml cannot be read.
        summary: the values of summary.json; for an unfinished run those of them that its metrics give.
        lines: the objects of metrics.jsonl so far.
        is_finished: summary.json is complete.
        changes: the number of refreshes that found something new.
    """

    def __init__(self, path: Path):
        self.folder = RunFolder(path)
        self.name = printable(path)
        self.recipe: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.lines: list[dict[str, Any]] = []
        self.is_finished = False
        self.changes = 0
        self._metrics = JSONLReader(self.folder.metrics)
        self._stamps: list[tuple[int, int] | None] = []
        self._word = ""
        self.refresh()

    def refresh(self) -> None:
        """Reads the files again if one of them has changed."""
        folder = self.folder
        stamps = [_stamp(path) for path in (folder.recipe, folder.summary, folder.status, folder.metrics)]
        if stamps == self._stamps:
            return
        self._stamps, self.changes = stamps, self.changes + 1
        self.lines = self._metrics.read()
        self._word, self.recipe = "no STATUS", {}
        summary: Any = None
        with suppress(OSError, ValueError):
            self._word = folder.status.read_text(encoding="utf-8").strip()[:20]
        with suppress(RecipeError):
            self.recipe = flatten(read_recipe(folder.recipe)[0])
        with suppress(OSError, ValueError):
            summary = json.loads(folder.summary.read_text(encoding="utf-8"))
        self.is_finished = is_summary(summary)
        self.summary = summary if self.is_finished else self._so_far()

    def _so_far(self) -> dict[str, Any]:
        """Returns the values of an unfinished run's summary that its recipe and metrics give."""
        accuracies = numbers(self.lines, "eval/accuracy")
        speeds = numbers(self.lines, "train/images_per_second")
        return {
            "recipe": str(self.recipe.get("name") or self.folder.path.name).encode(errors="replace").decode(),
            "seed": self.recipe.get("seed"),
            "epochs": max(numbers(self.lines, "epoch"), default=0),
            "mixed_precision": self.recipe.get("mixed_precision"),
            "images_per_second": speeds[-1] if speeds else None,
            "eval.last.accuracy": accuracies[-1] if accuracies else None,
            "eval.best.accuracy": max(accuracies, default=None),
        }

    @property
    def status(self) -> str:
        """The word of STATUS; for an unfinished run also the epochs done, and how long it has been silent."""
        if not self.recipe:
            return "damaged: recipe.yaml cannot be read"
        if self.is_finished:
            return self._word
        if self._word == "done":
            return "damaged: no whole summary.json"
        text = f"{self._word} at {self.summary['epochs']:.3g} of {self.recipe.get('epochs')} epochs"
        if self._word == "running" and (last := max(filter(None, self._stamps), default=None)):
            silent = time.time() - last[0] / 1e9
            text += f", silent for {_duration(silent)}" if silent > SILENCE else ""
        return text

    @property
    def key(self) -> Hashable:
        """A value that is equal for runs whose recipes differ only in the seed and in keys that change no result."""
        return tuple(sorted((key, repr(value)) for key, value in self.result_keys.items())) or self.name

    @property
    def result_keys(self) -> dict[str, Any]:
        """The keys of the recipe that change a result, without the seed."""
        items = self.recipe.items()
        return {key: value for key, value in items if key != "seed" and not key.startswith(HARMLESS_KEYS)}


def is_summary(values: Any) -> bool:
    """Returns whether a JSON value is a complete summary: a comparison needs recipe, seed, epochs and accuracies."""
    kinds: dict[str, Any] = {"recipe": str, "seed": int, "epochs": (int, float)}
    kinds |= {f"eval.{which}.accuracy": (int, float) for which in ("last", "best")}
    return isinstance(values, dict) and all(isinstance(values.get(key), kind) for key, kind in kinds.items())


def numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    """Returns the finite numbers that the lines hold under a key, in their order."""
    found = [value for line in lines if isinstance(value := line.get(key), int | float)]
    return [value for value in found if math.isfinite(value)]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Returns a file's time of change, in nanoseconds, and its size in bytes; None if it does not exist."""
    with suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    return None


def _duration(seconds: float) -> str:
    """Returns a duration in days, hours or minutes."""
    for size, unit in ((86400, "days"), (3600, "h")):
        if seconds > 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 60:.0f} min"


# --- a trained network --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run read from its folder. Each file is read when it is first used."""

    folder: RunFolder
    weights: str
    """"best" or "last"."""

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(self.folder.recipe)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in self.folder.metrics.read_text(encoding="utf-8").splitlines()]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The values of summary.json."""
        return json.loads(self.folder.summary.read_text(encoding="utf-8"))

    @cached_property
    def about(self) -> dict[str, Any]:
        """The description in the weights file: model, its keywords, classes, mean and std of the data."""
        return load_weights(self.folder.path / f"{self.weights}.safetensors")[1]

    @cached_property
    def model(self) -> nn.Module:
        """The trained network in eval mode on the CPU; takes normalised float32 (N, channels, height, width).

        Raises:
            OSError, ValueError: the weights file is missing or damaged, or the model's class has changed since.
        """
        tensors, about = load_weights(self.folder.path / f"{self.weights}.safetensors")
        try:
            module = build_model(about["model"], num_classes=len(about["classes"]), **about["keywords"])
            module.load_state_dict(tensors)
        except Exception as error:  # a user's own class may fail in any way
            reason = " ".join(str(error).split())
            raise ValueError(f"{about['model']} cannot be built with its weights: {reason}") from error
        return module.eval()


def load_run(folder: str | Path, weights: str = "best") -> Run:
    """Opens a run folder.

    Args:
        folder: the run folder.
        weights: "best" (of the evaluation with the highest accuracy) or "last".

    Raises:
        FileNotFoundError: `folder` is not a run folder.
    """
    run = Run(RunFolder(Path(folder)), weights)
    if not run.folder.recipe.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no recipe.yaml")
    return run


def open_run(folder: str | Path, weights: str) -> Run:
    """Opens a run folder that the user named and loads the network.

    Args:
        folder: the run folder.
        weights: "best" or "last".

    Raises:
        RecipeError: `folder` is not a run folder, or its weights are missing or damaged.
    """
    try:
        run = load_run(folder, weights)
        _ = run.model
    except (OSError, ValueError) as error:
        kind: Kind = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise RecipeError([Problem("command line", str(folder), str(error), kind)]) from error
    return run
