"""Finding and loading the checkpoint that a run resumes from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from mnist_dist.engine.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
)
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.changes import refuse_changes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.folder import RunFolder


def find_checkpoint(source: str, recipe: Recipe, allow_recipe_change: bool) -> tuple[RunFolder, dict[str, Any]]:
    """The run folder that a checkpoint lies in, and its state.

    Args:
        source: a checkpoint, or a run folder, whose newest valid checkpoint it is.

    Raises:
        RecipeError: there is no valid checkpoint, or its recipe is another one.
    """

    def refuse(message: str) -> RecipeError:
        return RecipeError([Problem("command line: --resume", "", message)])

    path = Path(source)
    candidates = [path] if path.name.startswith("step-") else list_checkpoints(path / "checkpoints")[::-1]
    problems = []
    for candidate in candidates:
        try:
            state = load_checkpoint(candidate)
            break
        except ValueError as error:
            problems.append(str(error))
    else:
        raise refuse("\n".join(problems) or f"{path} holds no checkpoint; name a run folder or its checkpoints/step-N")
    origin = RunFolder(candidate.absolute().parent.parent)
    if origin.recipe.is_file() and (changes := refuse_changes(load_recipe(origin.recipe), recipe, allow_recipe_change)):
        raise refuse(f"{candidate} is of another recipe:\n{changes}")
    return origin, state


def has_checkpoint(run_dir: str | Path | None, resume: str, state: PartialState) -> bool:
    """Whether the run will go on from a checkpoint, whole or damaged, as rank 0 sees it; asks all processes."""
    found = resume not in ("auto", "never") or (state.is_main_process and holds_checkpoint(run_dir))
    return broadcast_object_list([found])[0]


def holds_checkpoint(run_dir: str | Path | None) -> bool:
    """Whether one, whole or damaged, lies in this run folder."""
    with suppress(OSError):  # that the folder cannot be used is said when it is opened
        return run_dir is not None and bool(list_checkpoints(RunFolder(Path(run_dir)).checkpoints))
    return False


def adopt(folder: RunFolder, origin: RunFolder, state: dict[str, Any], keep: int) -> None:
    """Puts another run's checkpoint and its metrics up to there into a fresh folder, which goes on as its own run."""
    if origin.metrics.is_file():
        folder.metrics.write_bytes(origin.metrics.read_bytes()[: state.get("metrics_bytes", 0)])
    state = {key: value for key, value in state.items() if key != "wandb_id"}
    save_checkpoint(folder.checkpoints, state["progress"]["step"], state, keep=keep)


def load_newest(folder: RunFolder, state: PartialState) -> tuple[dict[str, Any], list[str]]:
    """The newest valid checkpoint ({} where there is none), equal on all processes; and what is wrong with others."""
    found: list[Any] = [None]
    if state.is_main_process:
        checkpoint, problems = newest_checkpoint(folder.checkpoints)
        if checkpoint and "best" in checkpoint:
            problems += _put_back(checkpoint.pop("best"), folder.best)
        found = [(checkpoint, problems)]
    checkpoint, problems = broadcast_object_list(found)[0]
    return checkpoint or {}, problems


def file_bytes(path: Path) -> torch.Tensor:
    """A file's bytes, uint8."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _put_back(content: torch.Tensor, best: Path) -> list[str]:
    """Makes the best weights those that a checkpoint knows of; says so if they were damaged or gone."""
    try:
        load_weights(best)
        problems = []
    except (OSError, ValueError) as error:
        problems = [f"{error}; put back from the checkpoint"]
    if problems or not torch.equal(file_bytes(best), content):
        staged = best.with_name(best.name + ".tmp")
        staged.write_bytes(content.numpy().tobytes())
        staged.replace(best)
    return problems
