"""The settings of a run's trackers, from its recipe and the environment."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from mnist_dist.errors import RecipeError
from mnist_dist.recipe.changes import flatten
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.folder import RunFolder
from mnist_dist.tracking import JSONLReader, OtherTracker, missing_packages


def project_name(recipe: Recipe) -> str:
    """Returns the project of the run in all trackers: the recipe's, else WANDB_PROJECT, else a default."""
    return recipe.tracking.wandb.project or os.environ.get("WANDB_PROJECT") or "mnist_dist"


def run_name(recipe: Recipe) -> str:
    """Returns the name of the run in the trackers, unless the user names it."""
    return f"{recipe.name}-seed{recipe.seed}"


def wandb_settings(recipe: Recipe) -> dict[str, Any]:
    """Returns keywords for `wandb.init`, each from the recipe, else from W&B's environment variable, else a default."""
    wandb, environ = recipe.tracking.wandb, os.environ
    tags = [tag.strip() for tag in environ.get("WANDB_TAGS", "").split(",") if tag.strip()]
    return {
        "entity": wandb.entity or environ.get("WANDB_ENTITY") or None,
        "name": environ.get("WANDB_NAME") or run_name(recipe),
        "group": wandb.group or environ.get("WANDB_RUN_GROUP") or recipe.name,
        "job_type": wandb.job_type or environ.get("WANDB_JOB_TYPE") or "train",
        "tags": wandb.tags or tags,
    }


def refuse_missing_trackers(recipe: Recipe) -> None:
    """Raises RecipeError if a package that `tracking.also` needs is not installed. Only rank 0 needs it."""
    missing = {name: packages for name in recipe.tracking.also if (packages := missing_packages(name))}
    if missing:
        listed = ", ".join(dict.fromkeys(each for some in missing.values() for each in some))
        message = f'not installed: {listed}; pip install "mnist_dist[{",".join(missing)}]"'
        raise RecipeError([recipe.problem("tracking.also", message, "missing")])


def other_trackers(recipe: Recipe, folder: RunFolder, notify: Callable[[str], None]) -> list[OtherTracker]:
    """Returns the trackers of `tracking.also`, which first log what metrics.jsonl holds.

    Args:
        folder: the run folder, where metrics.jsonl ends with the step that the run resumes from.
        notify: called with one line for the user when a tracker fails.
    """
    names = dict.fromkeys(recipe.tracking.also)  # each once
    lines = JSONLReader(folder.metrics).read() if names else []
    run = {
        "folder": folder.path.absolute(),
        "project": project_name(recipe),
        "name": run_name(recipe),
        "group": recipe.name,
        "config": flatten(recipe.model_dump()),
    }
    return [OtherTracker(name, run, lines, notify) for name in names]
