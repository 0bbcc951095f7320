"""Opening the run folder, and finding and loading the checkpoint that a run resumes from."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.engine.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    load_weights,
    newest_checkpoint,
    save_checkpoint,
)
from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.recipe.changes import refuse_changes
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.folder import RunFolder

# --- the run folder -----------------------------------------------------------------------------------------------


def open_folder(
    recipe: Recipe, run_dir: str | Path | None, state: PartialState, resume: str, allow_recipe_change: bool
) -> RunFolder:
    """Creates or opens the run folder on rank 0 and returns it on every rank. Collective: call on every rank.

    If `resume` names a checkpoint or another run, its checkpoint is copied into the new folder.

    Raises:
        RecipeError: the folder cannot be used, or there is no checkpoint to resume from.
    """

    def open_on_main() -> RunFolder | None:
        if not state.is_main_process:
            return None
        # The same command again after a kill: the folder's own checkpoints are newer, and the source may be gone.
        starts_from_source = resume not in ("auto", "never") and not holds_checkpoint(run_dir)
        source = find_checkpoint(resume, recipe, allow_recipe_change) if starts_from_source else None
        folder = RunFolder.open(run_dir, recipe, resume, allow_recipe_change)
        if source:
            adopt(folder, *source, recipe.checkpoint.keep)
        return folder

    opened = run_on_all_ranks(state, open_on_main)
    return RunFolder(Path(broadcast_object_list([str(opened.path) if opened else None])[0]))


def has_checkpoint(run_dir: str | Path | None, resume: str, state: PartialState) -> bool:
    """Returns whether the run will start from a checkpoint, valid or damaged. Collective: call on every rank."""
    found = resume not in ("auto", "never") or (state.is_main_process and holds_checkpoint(run_dir))
    return broadcast_object_list([found])[0]


def holds_checkpoint(run_dir: str | Path | None) -> bool:
    """Returns whether a run folder holds a checkpoint, valid or damaged."""
    with suppress(OSError):  # a folder that cannot be read is reported when it is opened
        return run_dir is not None and bool(list_checkpoints(RunFolder(Path(run_dir)).checkpoints))
    return False


# --- a checkpoint of another run ----------------------------------------------------------------------------------


def find_checkpoint(source: str, recipe: Recipe, allow_recipe_change: bool) -> tuple[RunFolder, dict[str, Any]]:
    """Finds the checkpoint that a new run starts from.

    Args:
        source: a checkpoint, or a run folder, whose newest valid checkpoint is taken.
        recipe: the recipe of the new run.
        allow_recipe_change: accept a recipe that changes the result.

    Returns:
        The run folder that the checkpoint lies in, and the checkpoint's state.

    Raises:
        RecipeError: there is no valid checkpoint, or it belongs to another recipe.
    """

    def refusal(message: str, kind: Kind) -> RecipeError:
        return RecipeError([Problem("command line", "--resume", message, kind)])

    path = Path(source)
    named = [path] if path.name.startswith("step-") else list_checkpoints(path / "checkpoints")[::-1]
    candidates = [each for each in named if each.exists()]
    if not candidates:
        raise refusal(f"{path} holds no checkpoint; name a run folder or its checkpoints/step-N", "missing")
    problems = []
    for candidate in candidates:
        try:
            state = load_checkpoint(candidate)
            break
        except ValueError as error:
            problems.append(str(error))
    else:
        raise refusal("\n".join(problems), "damaged")
    origin = RunFolder(candidate.absolute().parent.parent)
    if origin.recipe.is_file() and (changes := refuse_changes(load_recipe(origin.recipe), recipe, allow_recipe_change)):
        raise refusal(f"{candidate} belongs to a run of another recipe:\n{changes}", "conflict")
    return origin, state


def adopt(folder: RunFolder, origin: RunFolder, state: dict[str, Any], keep: int) -> None:
    """Copies another run's checkpoint, and its metrics up to that step, into a new folder."""
    if origin.metrics.is_file():
        write_atomically(folder.metrics, origin.metrics.read_bytes()[: state.get("metrics_bytes", 0)])
    state = {key: value for key, value in state.items() if key != "wandb_id"}  # the new run is a new W&B run
    save_checkpoint(folder.checkpoints, state["progress"]["step"], state, keep=keep)


# --- the checkpoint of this run -----------------------------------------------------------------------------------


def load_newest(folder: RunFolder, state: PartialState) -> tuple[dict[str, Any], list[str]]:
    """Loads the newest valid checkpoint and restores its best weights. Collective: call on every rank.

    Returns:
        The checkpoint's state, equal on all ranks, empty if there is none; and a message for each damaged file.
    """
    found: list[Any] = [None]
    if state.is_main_process:
        checkpoint, problems = newest_checkpoint(folder.checkpoints)
        if checkpoint and "best" in checkpoint:
            problems += _restore_best(checkpoint.pop("best"), folder.best)
        found = [(checkpoint, problems)]
    checkpoint, problems = broadcast_object_list(found)[0]
    return checkpoint or {}, problems


def components_state(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Returns the state of the training components that a checkpoint holds."""
    # Earlier versions wrote "parts". A run that one of them started must resume.
    return checkpoint["components" if "components" in checkpoint else "parts"]


def file_bytes(path: Path) -> torch.Tensor:
    """Returns the content of a file as a uint8 tensor, which a checkpoint can hold."""
    return torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8)


def _restore_best(content: torch.Tensor, best: Path) -> list[str]:
    """Writes the checkpoint's best weights if the file differs; returns a message if it was damaged or missing."""
    try:
        load_weights(best)
        problems = []
    except (OSError, ValueError) as error:
        problems = [f"{error}; restored from the checkpoint"]
    if problems or not torch.equal(file_bytes(best), content):
        write_atomically(best, content.numpy().tobytes())
    return problems
