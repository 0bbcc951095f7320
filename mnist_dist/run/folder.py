"""A run folder: the names of what lies in it, its creation, its status, and reading it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from mnist_dist.engine.files import write_text
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.changes import refuse_changes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe


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
