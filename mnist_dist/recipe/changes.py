"""What differs between two recipes, and whether a run can resume with the other."""

from __future__ import annotations

from typing import Any

from mnist_dist.recipe.schema import Recipe

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
