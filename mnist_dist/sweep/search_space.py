"""What is searched: a grid or random draws, from the command line or a W&B sweep file."""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mnist_dist.errors import Problem, RecipeError, unknown_key
from mnist_dist.recipe.file import find_recipe, parse, read_recipe

Choice = dict[str, Any]
"""The values of one trial by dotted key."""


# --- what is searched ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sweep:
    name: str
    recipe: str
    words: list[str]
    """Overrides that all trials share."""
    choices: list[Choice]
    command: list[str]
    """How the trainer is started: all but recipe, overrides and run folder."""


def read_words(recipe: str, words: list[str], count: int | None) -> Sweep:
    """The grid of all words with several values, `key=a,b,c`."""
    grid, shared = {}, []
    for word in words:
        key, _, text = word.partition("=")
        values, _ = parse(f"[{text}]", lambda line: "command line", key)
        if isinstance(values, list) and len(values) > 1:
            grid[key] = values
        else:
            shared.append(word)
    if not grid:
        what = "nothing is searched; give a key several values, e.g. optimizer.lr=0.01,0.1, or name a W&B sweep file"
        raise RecipeError([Problem("command line", "", what)])
    command = [sys.executable, "-m", "mnist_dist.train"]
    return Sweep(find_recipe(recipe).stem, recipe, shared, _grid(grid)[:count], command)


KNOWN = ("program", "method", "metric", "parameters", "command", "run_cap", "name", "description", "project", "entity")


def read_file(path: Path, words: list[str], count: int | None, seed: int) -> Sweep:
    """A W&B sweep file of method grid or random.

    Raises:
        RecipeError: with everything in it that only W&B's server can do, or nobody.
    """
    values, origins = read_recipe(path)
    problems = [origins.problem(key, unknown_key(key, KNOWN)) for key in values if key not in KNOWN]
    method, spaces = values.get("method"), values.get("parameters")
    if method not in ("grid", "random"):
        what = f"grid and random are searched here, not {method}; that needs W&B's server: wandb sweep {path}"
        problems.append(origins.problem("method", what))
    metric = values.get("metric", {"name": "eval/accuracy"})
    if metric not in ({"name": "eval/accuracy"}, {"name": "eval/accuracy", "goal": "maximize"}):
        problems.append(origins.problem("metric", "trials are judged by eval/accuracy, which is to be maximized"))
    draws: dict[str, Any] = {}
    if not isinstance(spaces, dict) or not spaces:
        problems.append(origins.problem("parameters", "a mapping of recipe keys to what is tried is needed"))
    else:
        for key, space in spaces.items():
            try:
                draws[key] = _draw(space) if method == "random" else _values(space)
            except ValueError as error:
                problems.append(origins.problem(f"parameters.{key}", str(error)))
    count = count or values.get("run_cap")
    if method == "random" and count is None:
        problems.append(origins.problem("run_cap", "a random search has no end; give it one, here or by --count"))
    elif not isinstance(count, int | None) or (count is not None and count < 1):
        problems.append(origins.problem("run_cap", f"expected a whole number of at least 1, got {count}"))
    try:
        command, recipe, shared = _read_command(values)
    except ValueError as error:
        problems.append(origins.problem("command", str(error)))
    if problems:
        raise RecipeError(problems)
    name = values.get("name") or path.stem
    searched = [word for word in words if word.partition("=")[0] in draws]
    if searched:
        raise RecipeError([Problem("command line", word, f"{path} searches this key") for word in searched])
    choices = _grid(draws)[:count] if method == "grid" else _random(draws, count or 0, seed)
    return Sweep(str(name), recipe, [*shared, *words], choices, command)


def _grid(values: dict[str, list[Any]]) -> list[Choice]:
    """All combinations; the last key changes fastest."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def _random(draws: dict[str, Callable[[random.Random], Any]], count: int, seed: int) -> list[Choice]:
    """So many draws, the same for the same seed, each combination once."""
    generator = random.Random(seed)
    drawn = [{key: draw(generator) for key, draw in draws.items()} for _ in range(count)]
    return [each for place, each in enumerate(drawn) if each not in drawn[:place]]


def _values(space: Any) -> list[Any]:
    """What a grid tries of one parameter.

    Raises:
        ValueError: it is no list of values.
    """
    if isinstance(space, dict) and space.keys() <= {"value", "distribution"} and "value" in space:
        return [space["value"]]
    values = space.get("values") if isinstance(space, dict) else None
    if not isinstance(values, list) or not values or not space.keys() <= {"values", "distribution"}:
        raise ValueError("expected `values: [a, b]` or `value: a`; with method random also `min` and `max`")
    return values


def _draw(space: Any) -> Callable[[random.Random], Any]:
    """How a random search draws one parameter, as W&B describes it.

    Raises:
        ValueError: it is none of the distributions that are known here.
    """
    if not isinstance(space, dict) or {"value", "values"} & space.keys():
        values = _values(space)
        return lambda generator: generator.choice(values)
    low, high = space.get("min"), space.get("max")
    numbers = [each for each in (low, high) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < 2 or not space.keys() <= {"min", "max", "distribution"}:
        raise ValueError("expected `min` and `max`, numbers, with or without a `distribution`; or `values: [a, b]`")
    low, high = numbers
    whole = all(isinstance(each, int) for each in numbers)
    kind = space.get("distribution", "int_uniform" if whole else "uniform")
    if not low < high:
        raise ValueError(f"min is to be less than max, got {low} and {high}")
    if kind == "int_uniform" and whole:
        return lambda generator: generator.randint(int(low), int(high))
    if kind == "uniform":
        return lambda generator: _short(generator.uniform(low, high), low, high)
    if kind == "log_uniform_values" and low > 0:
        return lambda generator: _short(math.exp(generator.uniform(math.log(low), math.log(high))), low, high)
    raise ValueError(
        f"{kind} from {low} to {high} is not drawn here; "
        "int_uniform takes whole numbers, uniform any, log_uniform_values what is above 0"
    )


def _short(value: float, low: float, high: float) -> float:
    """Four digits are enough, and can be read in a folder's name."""
    return min(max(float(f"{value:.4g}"), low), high)


def _read_command(values: dict[str, Any]) -> tuple[list[str], str, list[str]]:
    """A sweep file's command line, taken apart: how the trainer is started, the recipe, and overrides.

    Raises:
        ValueError: a trial could not be started so.
    """
    words = values.get("command")
    if values.get("program") != "mnist_dist.train" or not isinstance(words, list):
        raise ValueError("program: mnist_dist.train and a command are needed, as in launch/sweep.yaml")
    replaced = {"${interpreter}": sys.executable, "python": sys.executable, "${program}": "mnist_dist.train"}
    line = [replaced.get(word, word) for word in map(str, words) if word != "${env}"]
    if line.count("${args_no_hyphens}") != 1:
        raise ValueError("${args_no_hyphens} is needed once: it is where a trial's key=value words go")
    if other := [word for word in line if "${" in word and word != "${args_no_hyphens}"]:
        raise ValueError(f"{other[0]} is not known here; ${{env}}, ${{interpreter}}, ${{program}} are")
    line.remove("${args_no_hyphens}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", required=True)
    try:
        given, line = parser.parse_known_args(line)
    except (argparse.ArgumentError, SystemExit) as error:
        raise ValueError("--recipe=NAME is needed in it") from error
    shared = [word for word in line if re.match(r"[A-Za-z_][\w.]*=", word)]
    return [word for word in line if word not in shared], given.recipe, shared
