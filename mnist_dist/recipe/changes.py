"""Describes the differences between two recipes, and refuses to resume a run with a recipe that does not fit."""

from __future__ import annotations

from typing import Any

from mnist_dist.data.sources import OWN
from mnist_dist.recipe.schema import Recipe

HARMLESS_KEYS = ("checkpoint.", "tracking.", "data.place", "engine.hang_seconds")
"""Recipe keys that do not change a run's result; `data.root` changes it for images of the user's own only."""

FIXED_KEYS = (
    "model.",
    "optimizer.name",
    "optimizer.amsgrad",
    "optimizer.centered",
    "data.dataset",
    "data.split",
    "data.image_size",
    "data.channels",
)
"""Recipe keys that determine which tensors a checkpoint holds, or their shapes."""


def describe_changes(old: Recipe, new: Recipe) -> list[str]:
    """Returns one line, `key: old -> new`, for each key that differs and changes the result."""
    before, after = (flatten(recipe.model_dump()) for recipe in (old, new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    keys = [key for key in keys if not is_harmless(key, new.data.dataset)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys]


def is_harmless(key: str, dataset: Any) -> bool:
    """Returns whether a dotted key does not change the result of a run on a data set (its name in the recipe)."""
    return key.startswith(HARMLESS_KEYS) or (key == "data.root" and dataset not in OWN)


def refuse_changes(
    old: Recipe, new: Recipe, allowed: bool, *, other_way: str = "name a new folder with --run-dir"
) -> str:
    """Returns why a run with the recipe `old` cannot resume with `new`, and what to do; empty if it can.

    Args:
        old: the recipe of the run or checkpoint.
        new: the recipe that was asked for.
        allowed: the user accepts changes of the result (`--allow-recipe-change`).
        other_way: what else the user can do.
    """
    changes = describe_changes(old, new)
    if fixed := [change for change in changes if change.startswith(FIXED_KEYS)]:
        hint = f"the checkpoint does not fit this recipe; {other_way}, or start from the weights: "
        hint += "model.init_from=RUN and a new folder"
        return "\n".join([*fixed, hint])
    if changes and not allowed:
        return "\n".join([*changes, f"{other_way}, or add --allow-recipe-change"])
    return ""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested recipe as one dictionary with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
