"""Differences between two recipes, and whether a run can resume with a changed recipe."""

from __future__ import annotations

from typing import Any

from mnist_dist.recipe.schema import Recipe

HARMLESS_KEYS = ("checkpoint.", "tracking.", "data.root", "engine.hang_seconds")
"""Beginnings of recipe keys that do not change a run's result."""

FIXED_KEYS = ("model.", "optimizer.name", "optimizer.amsgrad", "optimizer.centered", "data.dataset", "data.split")
"""Beginnings of recipe keys that determine the tensors of a checkpoint."""


def describe_changes(old: Recipe, new: Recipe) -> list[str]:
    """Returns one line, `key: old -> new`, per key that differs and changes the result."""
    before, after = (flatten(recipe.model_dump()) for recipe in (old, new))
    keys = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    return [f"{key}: {before.get(key)} -> {after.get(key)}" for key in keys if not key.startswith(HARMLESS_KEYS)]


def refuse_changes(old: Recipe, new: Recipe, allowed: bool) -> str:
    """Returns why a run of the recipe `old` cannot resume with `new`, and what to do. Empty if it can.

    Args:
        allowed: the user allows changes of the recipe (`--allow-recipe-change`).
    """
    changes = describe_changes(old, new)
    if fixed := [change for change in changes if change.startswith(FIXED_KEYS)]:
        return "\n".join(
            [*fixed, "the saved weights do not fit; use a new folder, or start from the weights with model.init_from"]
        )
    if changes and not allowed:
        return "\n".join([*changes, "use a new folder, or resume with --allow-recipe-change"])
    return ""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns a nested recipe as one dictionary from dotted keys to values."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat
