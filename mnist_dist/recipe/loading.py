"""Loads a recipe: schema default < file < `key=value` overrides, then checks that find every problem at once."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from mnist_dist.engine import optimizers
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.checks import OPEN_SECTIONS, check_code, check_combinations, check_keywords, check_schema
from mnist_dist.recipe.file import Origins, apply_overrides, find_recipe, read_recipe
from mnist_dist.recipe.schema import Recipe


def load_recipe(name: str | Path, *overrides: str, import_code: bool = True) -> Recipe:
    """Reads a recipe, applies the overrides, and checks all values.

    Args:
        name: a path, or the name of a bundled recipe.
        overrides: `key=value` words with dotted keys, e.g. "optimizer.lr=0.05".
        import_code: the user named this recipe, so the classes and functions in `model.name` and `data.dataset` may
            be imported. False for the recipe in a run folder, which may come from a stranger: its network is neither
            imported nor built, and its function is not called.

    Raises:
        RecipeError: with all problems found.
    """
    path = find_recipe(name)
    values, origins = read_recipe(path)
    problems = list(apply_overrides(values, origins, overrides, _default_names()))
    if values.get("name") is None:
        values["name"] = path.stem
    for check in (check_schema, partial(check_code, import_code)):
        problems += [origins.problem(*finding) for finding in check(values)]
    problems += _advise([origins.problem(*finding) for finding in check_keywords(import_code, values)], values, origins)
    recipe = _resolve(values, {problem.key.partition(".")[0] for problem in problems})
    problems += [origins.problem(*finding) for finding in check_combinations(recipe, import_code)]
    if problems:
        raise RecipeError(problems)
    origins.named_by_user, recipe._origins = import_code, origins
    return recipe


def _advise(problems: list[Problem], values: dict[str, Any], origins: Origins) -> list[Problem]:
    """Adds advice where the command line names another class and the file still holds keywords of the former one."""
    advised: set[str] = set()
    found = []
    for problem in problems:
        section = problem.key.partition(".")[0]
        renamed = origins.places.get(f"{section}.name") == "command line" != problem.where
        if problem.kind == "unknown" and renamed and section not in advised:
            advised.add(section)
            name = values[section]["name"]
            advice = f'to replace the whole section of the file, write "{section}={{name: {name}}}"'
            problem = replace(problem, message=f"{problem.message}\n{advice}")
        found.append(problem)
    return found


def _default_names() -> dict[str, str]:
    """Returns open section -> the default of its key `name`."""
    names = {section: schema.model_fields["name"] for section, (schema, _, _) in OPEN_SECTIONS.items()}
    return {section: field.default for section, field in names.items() if not field.is_required()}


def _resolve(values: dict[str, Any], faulty: set[str]) -> Recipe:
    """Builds the recipe. Sections with a problem get their defaults, so that the later checks can still run."""
    if "batch_size" in faulty:
        faulty |= {"micro_batch_size", "logical_shards"}  # they are compared with batch_size
    stand_ins = {"name": "recipe", "model": {"name": "lenet5"}}
    sound = {key: value for key, value in values.items() if key.partition(".")[0] not in faulty}
    recipe = Recipe.model_validate(stand_ins | sound)
    if recipe.optimizer.lr is not None or recipe.schedule.name == "onecycle":
        return recipe
    # The only default that depends on another key: PyTorch's learning rate for the optimizer.
    lr = optimizers.default_lr(recipe.optimizer.name)
    return recipe.model_copy(update={"optimizer": recipe.optimizer.model_copy(update={"lr": lr})})
