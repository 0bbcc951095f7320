"""A run folder: the paths of its files, its creation and its status."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from mnist_dist.engine.files import read_regular, write_atomically
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.recipe.changes import refuse_changes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.lock import FILE as LOCK

MOST_JSON = 2**24
"""A STATUS or summary.json of more bytes is not read."""


@dataclass(frozen=True)
class RunFolder:
    """The paths of a run folder. STATUS holds one word: running, done, failed or preempted."""

    path: Path
    status_before: str = field(default="", kw_only=True)
    """The word in STATUS before the run was opened."""
    end_if_lost: Callable[[], None] = field(default=lambda: None, kw_only=True)
    """Ends this process if another process has taken over the folder. Called before a file is replaced."""

    recipe = property(lambda self: self.path / "recipe.yaml")
    metrics = property(lambda self: self.path / "metrics.jsonl")
    summary = property(lambda self: self.path / "summary.json")
    best = property(lambda self: self.path / "best.safetensors")
    last = property(lambda self: self.path / "last.safetensors")
    model_summary = property(lambda self: self.path / "model_summary.txt")
    plots = property(lambda self: self.path / "plots")
    console = property(lambda self: self.path / "console.log")
    status = property(lambda self: self.path / "STATUS")
    world = property(lambda self: self.path / "world.jsonl")
    checkpoints = property(lambda self: self.path / "checkpoints")

    @classmethod
    def open(
        cls, run_dir: str | Path | None, recipe: Recipe, resume: str = "auto", allow_recipe_change: bool = False
    ) -> RunFolder:
        """Creates a run folder, or opens the folder of a run that is to resume; writes recipe.yaml and STATUS.

        Args:
            run_dir: the folder; None for a new one, `runs/<recipe>/<date-time>`.
            recipe: the resolved recipe of the run.
            resume: "never" to refuse a folder that holds a run.
            allow_recipe_change: accept a recipe that changes the result of the run in the folder.

        Raises:
            RecipeError: the folder cannot be created, or it holds something that this run cannot continue.
        """
        try:
            folder = cls.create(run_dir, recipe)
            folder.refuse_content(recipe, resume, allow_recipe_change)
            # Written first: if the process is killed later, the same command recognises its folder by this file.
            write_atomically(folder.recipe, recipe.to_yaml())
            folder.plots.mkdir(exist_ok=True)
            with suppress(OSError, ValueError):
                folder = replace(folder, status_before=read_regular(folder.status, MOST_JSON).decode().strip())
            folder.set_status("running")
        except OSError as error:
            raise unwritable(error, run_dir) from error
        return folder

    @classmethod
    def create(cls, run_dir: str | Path | None, recipe: Recipe) -> RunFolder:
        """Creates the folder if it does not exist, and writes nothing into it.

        Raises:
            RecipeError: the folder cannot be created.
        """
        try:
            folder = cls(_create_dated(Path("runs") / recipe.name) if run_dir is None else Path(run_dir))
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise unwritable(error, run_dir) from error
        return folder

    def refuse_content(self, recipe: Recipe, resume: str, allow_recipe_change: bool) -> None:
        """Raises RecipeError if the folder holds something that a run of this recipe must not overwrite."""

        def refusal(message: str, kind: Kind) -> RecipeError:
            return RecipeError([Problem("command line", "--run-dir", message, kind)])

        if pipes := self.pipes():
            message = f"{self.path} has pipes or devices where a run has files: {', '.join(pipes)}; delete them"
            raise refusal(message, "unsupported")
        # A process that is killed before it has written recipe.yaml may leave these files.
        early = (self.recipe.name + ".tmp", LOCK, "." + LOCK)
        if all(entry.name.startswith(early) for entry in self.path.iterdir()):
            return
        if not self.recipe.is_file():
            raise refusal(f"{self.path} is not empty and is not a run folder; name a new folder", "exists")
        if links := self.links():
            message = f"{self.path} has links to files outside it, which a run would overwrite: {', '.join(links)}"
            raise refusal(f"{message}; replace the links by the files", "unsupported")
        if resume == "never":
            raise refusal(f"{self.path} holds a run, and a run is never overwritten; name a new folder", "exists")
        if changes := refuse_changes(load_recipe(self.recipe, import_code=False), recipe, allow_recipe_change):
            raise refusal(f"the run in {self.path} was started with another recipe:\n{changes}", "conflict")

    def links(self) -> list[str]:
        """Returns the names of the entries that are links to files outside the folder."""
        return sorted(entry.name for entry in self.path.iterdir() if self.leaves(entry))

    def pipes(self) -> list[str]:
        """Returns the names of the pipes, devices and sockets: a run that read or wrote one could wait for ever."""
        entries = [*self.path.iterdir(), *(self.plots.iterdir() if self.plots.is_dir() else ())]
        strange = [entry for entry in entries if entry.exists() and not (entry.is_file() or entry.is_dir())]
        return sorted(str(entry.relative_to(self.path)) for entry in strange if not self.leaves(entry))

    def leaves(self, path: Path) -> bool:
        """Returns whether a path in this folder leads out of it through a link. The folder itself may be a link."""
        try:
            return not path.resolve().is_relative_to(self.path.resolve())
        except (OSError, RuntimeError):  # links in a circle
            return True

    def refuse_link(self, path: Path) -> Path:
        """Returns `path`, a path in this folder, unless it is a link to a file outside.

        Raises:
            ValueError: the path leads out of the folder through a link. A run folder may come from a stranger, whose
                link could make a command show or overwrite a file of the user.
        """
        if self.leaves(path):
            raise ValueError(f"{path} is a link to a file outside the run folder; replace the link by the file")
        return path

    def refuse_output(self, path: Path) -> Path:
        """Returns `path`, the file in this folder that a command writes if the user names no other file.

        Raises:
            RecipeError: the path leads out of the folder through a link.
        """
        if self.leaves(path):
            message = f"{path} is a link to a file outside the run folder; name a file with --output"
            raise RecipeError([Problem("command line", "--output", message, "unsupported")])
        return path

    @contextmanager
    def failed_on_error(self, writes: bool) -> Iterator[None]:
        """Returns a context in which an exception sets the status to `failed`, and Ctrl-C to `preempted`.

        Args:
            writes: whether this process writes the status.
        """
        try:
            yield
        except BaseException as error:
            with suppress(OSError):
                if writes:
                    self.set_status("preempted" if isinstance(error, KeyboardInterrupt) else "failed")
            raise

    @property
    def results(self) -> dict[str, Any] | None:
        """The values of summary.json of a finished run; None if the run has not finished or the file is damaged."""
        with suppress(OSError, ValueError, RecursionError):
            if read_regular(self.refuse_link(self.status), MOST_JSON) == b"done\n":
                values = json.loads(read_regular(self.refuse_link(self.summary), MOST_JSON))
                return values if is_summary(values) else None
        return None

    @property
    def is_done(self) -> bool:
        """Whether the run in the folder has finished."""
        return self.results is not None

    def set_status(self, status: str) -> None:
        """Writes STATUS: one of the words running, done, failed and preempted."""
        self.end_if_lost()
        write_atomically(self.status, status + "\n")


def is_summary(values: Any) -> bool:
    """Returns whether a JSON value is a complete summary: a comparison needs recipe, seed, epochs and accuracies."""
    kinds: dict[str, Any] = {"recipe": str, "seed": int, "epochs": (int, float)}
    kinds |= {f"eval.{which}.accuracy": (int, float) for which in ("last", "best")}
    return isinstance(values, dict) and all(isinstance(values.get(key), kind) for key, kind in kinds.items())


def unwritable(error: OSError, run_dir: str | Path | None) -> RecipeError:
    """Returns the error for a run folder that cannot be created or written."""
    where, key = ("the working directory", "runs") if run_dir is None else ("command line", "--run-dir")
    problem = f"{error.filename or run_dir} cannot be written: {error.strerror}"
    return RecipeError([Problem(where, key, f"{problem}; name another folder with --run-dir", "unwritable")])


def _create_dated(parent: Path) -> Path:
    """Creates a folder named by date and time; a number follows if another run started in the same second."""
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
