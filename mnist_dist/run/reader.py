"""Reads run folders: `RunReader` follows a run in any state, `load_run` loads a trained network."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Hashable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from mnist_dist.data.geometry import Geometry, read_geometry
from mnist_dist.data.images import SHAPE, as_numbers
from mnist_dist.data.sources import OWN
from mnist_dist.engine.checkpoint import load_weights
from mnist_dist.engine.files import expand_path, read_regular
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.models import CodeRefused, check_description, rebuild_model
from mnist_dist.recipe.changes import flatten, is_harmless
from mnist_dist.recipe.file import read_recipe
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.folder import MOST_JSON, RunFolder, is_summary
from mnist_dist.run.lock import FILE as LOCK
from mnist_dist.run.lock import last_renewal
from mnist_dist.run.text_output import printable
from mnist_dist.run.world_history import read_history
from mnist_dist.tracking import JSONLReader

LARGEST = 1e100
"""Numbers of a larger magnitude are ignored. JSON can hold 1e999, and whole numbers that are too large for a float."""

SILENCE = 600.0
"""A running run without a lock file is silent after this many seconds without a change of its files."""

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

    `refresh` reads what is new. It never raises an error: files may be missing or damaged.

    Attributes:
        name: the path as text that any console can print.
        recipe: dotted keys and values of the resolved recipe; empty if recipe.yaml cannot be read.
        world: the starts of its processes; see `read_history`.
        word: the word in STATUS.
        summary: the values of summary.json; for an unfinished run, those that follow from its recipe and metrics.
        lines: the objects of metrics.jsonl so far.
        is_finished: summary.json is complete.
        changes: the number of refreshes that found something new.
    """

    def __init__(self, path: Path):
        self.folder = RunFolder(path)
        self.name = printable(path)
        self.recipe: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.world: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self.is_finished = False
        self.changes = 0
        self._metrics = JSONLReader(self.folder.metrics)
        self._stamps: list[tuple[int, int] | None] = []
        self.word = ""
        self.refresh()

    def refresh(self) -> None:
        """Reads the files again if one of them has changed."""
        folder = self.folder
        stamps = [_stamp(path) for path in (folder.recipe, folder.summary, folder.status, folder.metrics, folder.world)]
        if stamps == self._stamps:
            return
        self._stamps, self.changes = stamps, self.changes + 1
        self.lines = [] if folder.leaves(folder.metrics) else self._metrics.read()
        self.world = read_history(folder)
        self.word, self.recipe = "no STATUS", {}
        summary: Any = None
        with suppress(OSError, ValueError):
            self.word = read_regular(folder.refuse_link(folder.status), MOST_JSON).decode().strip()[:20]
        with suppress(RecipeError, ValueError):
            self.recipe = flatten(read_recipe(folder.refuse_link(folder.recipe))[0])
        with suppress(OSError, ValueError, RecursionError):
            summary = json.loads(read_regular(folder.refuse_link(folder.summary), MOST_JSON))
        self.is_finished = is_summary(summary)
        self.summary = summary if self.is_finished else self._so_far()

    def _so_far(self) -> dict[str, Any]:
        """Returns the values of an unfinished run's summary that follow from its recipe and metrics."""
        accuracies, seed = numbers(self.lines, "eval/accuracy"), self.recipe.get("seed")
        speeds = numbers(self.lines, "train/images_per_second")
        return {
            "recipe": printable(self.recipe.get("name") or self.folder.path.name),
            "seed": seed if isinstance(seed, int) else None,
            "epochs": max(numbers(self.lines, "epoch"), default=0),
            "world_size": self.world[-1]["processes"] if self.world else None,
            "mixed_precision": self.recipe.get("mixed_precision"),
            "images_per_second": speeds[-1] if speeds else None,
            "eval.last.accuracy": accuracies[-1] if accuracies else None,
            "eval.best.accuracy": max(accuracies, default=None),
        }

    @property
    def status(self) -> str:
        """The word of STATUS; for an unfinished run also the epochs done, and its last sign of life if it is silent."""
        if not self.recipe:
            return "damaged: recipe.yaml cannot be read"
        if self.is_finished:
            return self.word
        if self.word == "done":
            return "damaged: no whole summary.json"
        text = f"{self.word} at {self.summary['epochs']:.3g} of {self.recipe.get('epochs')} epochs"
        if since := self.silent_since:
            text += f", no sign of life since {datetime.fromtimestamp(since):%Y-%m-%d %H:%M}"
        return text

    @property
    def changed(self) -> float:
        """When one of the files was written last, in seconds since 1970."""
        return max([0.0, *(stamp[0] / 1e9 for stamp in self._stamps if stamp)])

    @property
    def silent_since(self) -> float | None:
        """The last sign of life of a run that should be running, in seconds since 1970; None if it may still run.

        A run renews its lock file every few seconds, also while it waits. A copy of a run folder may lack the file.
        """
        if self.word != "running" or self.is_finished:
            return None
        try:
            renewed, is_silent = last_renewal(self.folder.refuse_link(self.folder.path / LOCK))
        except (OSError, ValueError):
            renewed, is_silent = 0.0, time.time() - self.changed > SILENCE
        return min(max(renewed, self.changed), time.time()) if is_silent else None

    @property
    def data(self) -> str:
        """The data set; for the user's own images also the last part of their path."""
        name, root = (str(self.recipe.get(f"data.{key}") or "") for key in ("dataset", "root"))
        return f"{name} {Path(root).name}".strip() if name in OWN else name

    @property
    def key(self) -> Hashable:
        """A value that is equal for runs whose recipes differ only in the seed and in keys that change no result."""
        return tuple(sorted((key, repr(value)) for key, value in self.result_keys.items())) or self.name

    @property
    def result_keys(self) -> dict[str, Any]:
        """The keys of the recipe that change a result, without the seed."""
        items = self.recipe.items()
        dataset = self.recipe.get("data.dataset")
        return {key: value for key, value in items if key != "seed" and not is_harmless(key, dataset)}


def numbers(lines: list[dict[str, Any]], key: str) -> list[float]:
    """Returns the numbers under a key of the lines, in their order, without those of magnitude `LARGEST` or more."""
    found = [value for line in lines if isinstance(value := line.get(key), int | float)]
    return [value for value in found if abs(value) < LARGEST]


def _stamp(path: Path) -> tuple[int, int] | None:
    """Returns a file's modification time in nanoseconds and its size in bytes; None if it does not exist."""
    with suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    return None


# --- a trained network --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run read from its folder. Each file is read when it is first used."""

    folder: RunFolder
    weights: str
    """"best" or "last"."""
    allow_code: tuple[str, ...] = ()
    """Modules, or paths `package.module:Name`, that the weights file may name as its network."""

    @cached_property
    def recipe(self) -> Recipe:
        """The resolved recipe."""
        return load_recipe(self.folder.refuse_link(self.folder.recipe), import_code=False)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        text = self.folder.refuse_link(self.folder.metrics).read_text(encoding="utf-8")
        return [json.loads(line) for line in text.splitlines()]

    @cached_property
    def summary(self) -> dict[str, Any]:
        """The values of summary.json.

        Raises:
            OSError, ValueError: the file is missing or damaged.
        """
        values = json.loads(read_regular(self.folder.refuse_link(self.folder.summary), MOST_JSON))
        if not is_summary(values):
            raise ValueError(f"{self.folder.summary} is not the summary of a run")
        return values

    @cached_property
    def about(self) -> dict[str, Any]:
        """The description in the weights file: model, keywords; and classes, shape, mean, std, geometry of the data."""
        return self._read_weights()[1]

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of the images that the network takes."""
        channels, height, width = self.about["shape"]
        return channels, height, width

    @cached_property
    def geometry(self) -> Geometry:
        """How the training set places its figures.

        Raises:
            OSError, ValueError: the weights file is missing or damaged.
        """
        return read_geometry(self.about)

    @cached_property
    def model(self) -> nn.Module:
        """The trained network in eval mode on the CPU; takes normalised float32 (N, channels, height, width).

        Raises:
            CodeRefused: the network is code that `allow_code` does not name. Nothing was imported.
            OSError, ValueError: the weights file is missing or damaged, or the model's class has changed since.
        """
        tensors, about = self._read_weights()
        try:
            module = rebuild_model(about, tensors, self.allow_code)
        except CodeRefused:
            raise
        except Exception as error:  # a user's own class may fail in any way
            reason = " ".join(str(error).split())
            raise ValueError(f"{about['model']} cannot be built with its weights: {reason}") from error
        return module.eval()

    def _read_weights(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Returns the tensors and the description in the weights file."""
        path = self.folder.refuse_link(self.folder.path / f"{self.weights}.safetensors")
        try:
            tensors, about = load_weights(path)
        except FileNotFoundError as error:
            raise FileNotFoundError(self._describe_missing_weights()) from error
        try:
            check_description(about)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        # Older files describe images of MNIST's shape, and hold a number for the only channel.
        statistics = {key: as_numbers(about[key]) for key in ("mean", "std")}
        return tensors, {"shape": list(SHAPE), **about, **statistics}

    def _describe_missing_weights(self) -> str:
        """Returns the message for a run that has not written its weights file yet."""
        state, other = ("has not finished", "best") if self.weights == "last" else ("was not evaluated yet", "last")
        message = f"{self.folder.path} has no {self.weights}.safetensors: the run {state}\n"
        if (self.folder.path / f"{other}.safetensors").is_file():
            message += f"use --weights {other}, or "
        return f"{message}run the command of the training again to continue it"


def load_run(folder: str | Path, weights: str = "best", allow_code: str | Iterable[str] = ()) -> Run:
    """Opens a run folder. It may come from a stranger: code that it names is imported only if `allow_code` names it.

    Args:
        folder: the run folder.
        weights: "best" (of the evaluation with the highest accuracy) or "last".
        allow_code: modules, e.g. "my_nets", from which the run's network may be imported. Networks of this package, of
            torchvision and of timm need no permission.

    Raises:
        FileNotFoundError: `folder` is not a run folder.
    """
    allowed = (allow_code,) if isinstance(allow_code, str) else tuple(allow_code)
    run = Run(RunFolder(expand_path(folder)), weights, allowed)
    if not run.folder.recipe.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no recipe.yaml")
    return run


def open_run(folder: str | Path, weights: str, allow_code: Iterable[str] = ()) -> Run:
    """Opens a run folder that the user named and loads the network.

    Args:
        folder: the run folder.
        weights: "best" or "last".
        allow_code: see `load_run`.

    Raises:
        RecipeError: `folder` is not a run folder, its weights are missing or damaged, or they name code that is not
            allowed.
    """
    try:
        run = load_run(folder, weights, allow_code)
        _ = run.model, run.geometry
    except RecipeError:
        raise
    except CodeRefused as error:
        raise RecipeError([Problem("command line", "--allow-code", f"{folder}: {error}", "code")]) from error
    except (OSError, ValueError) as error:
        kind: Kind = "missing" if isinstance(error, FileNotFoundError) else "damaged"
        raise RecipeError([Problem("command line", str(folder), str(error), kind)]) from error
    return run
