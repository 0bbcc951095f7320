"""A run folder: the names of what lies in it, its creation, its status, and reading it back."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn

from mnist_dist import __version__
from mnist_dist.engine.checkpoint import load_weights
from mnist_dist.models import build_model
from mnist_dist.recipe import Problem, Recipe, RecipeError, load_recipe


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

    @classmethod
    def create(cls, run_dir: str | Path | None, recipe: Recipe) -> RunFolder:
        """Makes a fresh folder, `runs/<recipe>/<date-time>` unless told otherwise, and writes the recipe into it.

        Raises:
            RecipeError: the folder cannot be made, or holds something already.
        """
        where = "command line: --run-dir" if run_dir else "the working directory"
        try:
            path = Path(run_dir) if run_dir else _fresh(Path("runs") / recipe.name)
            path.mkdir(parents=True, exist_ok=True)
            if any(path.iterdir()):
                raise RecipeError(
                    [Problem(where, "", f"{path} is not empty; a run is never overwritten: name a new one")]
                )
            folder = cls(path)
            folder.plots.mkdir()
            write_text(folder.recipe, recipe.to_yaml())
        except OSError as error:
            message = f"{error.filename or run_dir} cannot be written: {error.strerror}; give another --run-dir"
            raise RecipeError([Problem(where, "", message)]) from error
        folder.set_status("running")
        return folder

    def set_status(self, status: str) -> None:
        write_text(self.status, status + "\n")


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
        """The trained network in eval mode on the CPU; takes normalised float32 (N, 1, 28, 28)."""
        tensors, about = load_weights(self.folder.path / f"{self.weights}.safetensors")
        module = build_model(about["model"], num_classes=len(about["classes"]), **about["keywords"])
        module.load_state_dict(tensors)
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
