"""A run folder: the names of what lies in it, its creation, its status, and reading it back."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from mnist_dist import __version__
from mnist_dist.engine.checkpoint import load_weights
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.models import build_model
from mnist_dist.recipe.schema import Recipe, load_recipe


@dataclass(frozen=True)
class RunFolder:
    """Paths of a run folder. STATUS holds one word: running, done, failed or preempted."""

    path: Path

    recipe = property(lambda self: self.path / "recipe.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    summary = property(lambda self: self.path / "summary.json")
    best = property(lambda self: self.path / "best.safetensors")
    last = property(lambda self: self.path / "last.safetensors")
    model_summary = property(lambda self: self.path / "model_summary.txt")
    plots = property(lambda self: self.path / "plots")
    console = property(lambda self: self.path / "console.log")
    status = property(lambda self: self.path / "STATUS")
    checkpoints = property(lambda self: self.path / "checkpoints")

    @classmethod
    def open(
        cls, run_dir: str | Path | None, recipe: Recipe, resume: str = "auto", allow_recipe_change: bool = False
    ) -> RunFolder:
        """Makes a fresh folder, or opens the one of a run that is to go on; `runs/<recipe>/<date-time>` unless told.

        Raises:
            RecipeError: the folder cannot be made, or holds something that is not this run's to continue.
        """
        where = "the working directory" if run_dir is None else "command line: --run-dir"

        def refuse(message: str) -> RecipeError:
            return RecipeError([Problem(where, "", message)])

        try:
            folder = cls(_fresh(Path("runs") / recipe.name) if run_dir is None else Path(run_dir))
            folder.path.mkdir(parents=True, exist_ok=True)
            holds = {entry.name for entry in folder.path.iterdir()} - {folder.recipe.name + ".tmp"}
            if holds and not folder.recipe.is_file():
                raise refuse(f"{folder.path} is not empty and not a run's; name a new folder")
            if holds and resume == "never":
                raise refuse(f"{folder.path} holds a run, and a run is never overwritten; name a new folder")
            if folder.is_done:
                raise refuse(f"the run in {folder.path} is done already; name a new folder for another")
            if holds and (changes := refuse_changes(load_recipe(folder.recipe), recipe, allow_recipe_change)):
                raise refuse(f"the run in {folder.path} began with another recipe:\n{changes}")
            # First of all files: by it the same command knows its own folder again, whenever this one is killed.
            write_text(folder.recipe, recipe.to_yaml())
            folder.plots.mkdir(exist_ok=True)
            folder.set_status("running")
        except OSError as error:
            what = f"{error.filename or run_dir} cannot be written: {error.strerror}; give another --run-dir"
            raise refuse(what) from error
        return folder

    @contextmanager
    def failed_on_error(self, writes: bool) -> Iterator[None]:
        """While entered, an error that leaves makes the status failed; `writes`: this is the process that writes it."""
        try:
            yield
        except BaseException:
            with suppress(OSError):
                if writes:
                    self.set_status("failed")
            raise

    @property
    def is_done(self) -> bool:
        return self.status.is_file() and self.status.read_text() == "done\n"

    def set_status(self, status: str) -> None:
        write_text(self.status, status + "\n")


HARMLESS_KEYS = ("checkpoint.", "tracking.", "data.root", "engine.hang_seconds")
"""Recipe keys that do not change a run's result."""


def describe_changes(old: Recipe, new: Recipe) -> list[str]:
    """A line for each key that differs and changes the result."""
    before, after = (flatten(recipe.model_dump()) for recipe in (old, new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if not key.startswith(HARMLESS_KEYS)]


FIXED_KEYS = ("model.", "optimizer.name", "optimizer.amsgrad", "optimizer.centered", "data.dataset", "data.split")
"""Recipe keys on which the shape of a checkpoint depends."""


def refuse_changes(old: Recipe, new: Recipe, allowed: bool) -> str:
    """Why a run that began with `old` cannot go on with `new`, and what can be done; empty if it can."""
    changes = describe_changes(old, new)
    if fixed := [change for change in changes if change.startswith(FIXED_KEYS)]:
        return "\n".join(
            [*fixed, "what it has learnt does not fit; name a new folder, or begin one with model.init_from"]
        )
    if changes and not allowed:
        return "\n".join([*changes, "name a new folder, or go on with --allow-recipe-change"])
    return ""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested recipe as dotted keys and their values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _fresh(parent: Path) -> Path:
    """A folder named by the second, with a number behind where two runs start in the same one; made by this call."""
    name = datetime.now().strftime("%Y%m%d-%H%M%S")
    for suffix in ["", *(f"-{number}" for number in range(2, 1000))]:
        path = parent / f"{name}{suffix}"
        try:
            path.mkdir(parents=True)
            return path
        except FileExistsError:
            if not parent.is_dir():
                raise
    raise FileExistsError(f"no free name in {parent}")


def write_text(path: Path, text: str) -> None:
    """Writes beside and renames: a reader sees the old text or the new, never half."""
    staged = path.with_name(path.name + ".tmp")
    staged.write_text(text, encoding="utf-8")
    staged.replace(path)


@dataclass(frozen=True)
class Run:
    """A finished (or unfinished) run read back from its folder."""

    folder: RunFolder
    weights: str
    """"best" or "last"."""

    @cached_property
    def recipe(self) -> Recipe:
        return load_recipe(self.folder.recipe)

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in self.folder.metrics.read_text(encoding="utf-8").splitlines()]

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads(self.folder.summary.read_text(encoding="utf-8"))

    @cached_property
    def about(self) -> dict[str, Any]:
        """What the weights file says of itself: model, its keywords, classes, mean and std of the data."""
        return load_weights(self.folder.path / f"{self.weights}.safetensors")[1]

    @cached_property
    def model(self) -> nn.Module:
        """The trained network in eval mode on the CPU; takes normalised float32 (N, 1, 28, 28).

        Raises:
            OSError, ValueError: no whole weights there, or its class is no longer the one that was trained.
        """
        tensors, about = load_weights(self.folder.path / f"{self.weights}.safetensors")
        try:
            module = build_model(about["model"], num_classes=len(about["classes"]), **about["keywords"])
            module.load_state_dict(tensors)
        except Exception as error:  # a user's own class may fail in any way
            why = " ".join(str(error).split())
            raise ValueError(f"{about['model']} cannot be built with its weights: {why}") from error
        return module.eval()


def load_run(folder: str | Path, weights: str = "best") -> Run:
    """Opens a run folder.

    Args:
        weights: "best" (the document's way) or "last".

    Raises:
        FileNotFoundError: no run folder there.
    """
    run = Run(RunFolder(Path(folder)), weights)
    if not run.folder.recipe.is_file():
        raise FileNotFoundError(f"{folder} is not a run folder: it has no recipe.yaml")
    return run


def open_run(folder: str | Path, weights: str) -> Run:
    """`load_run` for a command: with the network read.

    Raises:
        RecipeError: no run folder there, or no whole weights in it.
    """
    try:
        run = load_run(folder, weights)
        _ = run.model
    except (OSError, ValueError) as error:
        raise RecipeError([Problem(str(folder), "", str(error))]) from error
    return run


# --- what ran ---------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Versions of Python and of every package that can change a result."""
    packages = ("torch", "torchvision", "accelerate", "wandb", "numpy")
    return {
        "mnist_dist": __version__,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def git_commit() -> str | None:
    """The commit of the code that runs, "-dirty" where it was changed since; None outside a repository."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--match="]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None
