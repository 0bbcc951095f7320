"""Reads the data of a recipe, on every process of the launcher's world."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import partial
from pathlib import Path

from accelerate import PartialState

from mnist_dist.data import Dataset, is_data_code, load_dataset
from mnist_dist.data.form import DataError
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.engine.files import expand_path
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.models import CodeRefused, refuse_code
from mnist_dist.recipe.schema import Recipe

DATA_KEYS = (
    "split", "test", "validation", "limit_train", "limit_test", "image_size", "channels", "resize", "on_bad_image",
)  # fmt: skip
"""Recipe keys below `data` that `load_dataset` takes."""


def load_data(recipe: Recipe, state: PartialState, allow_code: Iterable[str] = ()) -> Dataset:
    """Reads the data on every process. Collective: call on every rank.

    Rank 0 downloads what is missing and decodes image files; the others wait. Then the first process of each other node
    does the same, which takes no time where the node shares the folder with rank 0. Then all others read.

    Args:
        allow_code: see `load_run`; for the function in `data.dataset` of a recipe that no person has named.

    Raises:
        RecipeError: the data cannot be read, or the recipe names code that is not allowed.
    """
    if is_data_code(recipe.data.dataset) and not recipe.may_import("data.dataset"):
        require_permission(recipe.data.dataset, allow_code, "data set")
    root = data_root(recipe)
    sizes = {key: getattr(recipe.data, key) for key in DATA_KEYS}

    def load(download: bool) -> Dataset:
        try:
            return load_dataset(recipe.data.dataset, root=root, download=download, **sizes)
        except (ValueError, ImportError, OSError) as error:
            raise RecipeError([_data_problem(recipe, error)]) from error

    first = run_on_all_ranks(state, lambda: load(download=True) if state.is_main_process else None)
    first = run_on_all_ranks(state, lambda: first or (load(download=True) if state.is_local_main_process else None))
    return run_on_all_ranks(state, lambda: first or load(download=False))


def require_permission(name: str, allow_code: Iterable[str], what: str) -> None:
    """Checks that code which a file names is allowed.

    Args:
        name: package.module:Name.
        allow_code: see `load_run`.
        what: "network" or "data set", for the message.

    Raises:
        RecipeError: `allow_code` does not name the code. Nothing was imported.
    """
    try:
        refuse_code(name, tuple(allow_code), what)
    except CodeRefused as error:
        raise RecipeError([Problem("command line", "--allow-code", str(error), "code")]) from error


def data_root(recipe: Recipe) -> Path:
    """Returns the folder of the data: data.root, else the environment variable MNIST_DIST_DATA, else ./data."""
    if recipe.data.root:
        return expand_path(recipe.data.root, partial(recipe.problem, "data.root"))
    named = os.environ.get("MNIST_DIST_DATA") or "data"
    return expand_path(named, partial(Problem, "the environment", "MNIST_DIST_DATA"))


def _data_problem(recipe: Recipe, error: Exception) -> Problem:
    """Returns the problem that an error of `load_dataset` stands for."""
    message = f"{recipe.data.dataset}: {error}"
    if isinstance(error, DataError):
        return recipe.problem(f"data.{error.key}", message, error.kind)
    if isinstance(error, FileNotFoundError):
        hint = "put the files there, or name another folder with data.root=… or MNIST_DIST_DATA"
        return recipe.problem("data.root", f"{error}\n{hint}", "missing")
    if isinstance(error, ImportError):
        return recipe.problem("data.dataset", message, "missing")
    if isinstance(error, OSError):
        return recipe.problem("data.root", message[:300], "damaged")
    return recipe.problem("data", message, "damaged")
