"""Loading a recipe: file, overrides, schema, checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mnist_dist.engine import optimizers
from mnist_dist.errors import RecipeError
from mnist_dist.recipe.checks import check_combinations, check_keywords, check_schema
from mnist_dist.recipe.file import apply_overrides, find_recipe, read_recipe
from mnist_dist.recipe.schema import Recipe

# --- loading ------------------------------------------------------------------------------------------------------


def load_recipe(name: str | Path, *overrides: str) -> Recipe:
    """Reads, merges, types and checks a recipe.

    Args:
        name: a path, or the name of a bundled recipe.
        overrides: `key=value` words with dotted keys, e.g. "optimizer.lr=0.05".

    Raises:
        RecipeError: with every problem there is.
    """
    path = find_recipe(name)
    values, origins = read_recipe(path)
    problems = list(apply_overrides(values, origins, overrides))
    if values.get("name") is None:
        values["name"] = path.stem
    for check in (check_schema, check_keywords):
        problems += [origins.problem(key, message) for key, message in check(values)]
    recipe = _sound(values, {problem.key.partition(".")[0] for problem in problems})
    problems += [origins.problem(key, message) for key, message in check_combinations(recipe)]
    if problems:
        raise RecipeError(problems)
    recipe._origins = origins
    return recipe


def _sound(values: dict[str, Any], faulty: set[str]) -> Recipe:
    """The resolved recipe, with defaults for what is faulty, so that no mistake hides another."""
    if "batch_size" in faulty:
        faulty |= {"micro_batch_size", "logical_shards"}  # which are judged by it
    stand_ins = {"name": "recipe", "model": {"name": "lenet5"}}
    sound = {key: value for key, value in values.items() if key.partition(".")[0] not in faulty}
    recipe = Recipe.model_validate(stand_ins | sound)
    if recipe.optimizer.lr is not None or recipe.schedule.name == "onecycle":
        return recipe
    # The one default that depends on another key: PyTorch's learning rate for the optimizer.
    lr = optimizers.default_lr(recipe.optimizer.name)
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": lr})})
