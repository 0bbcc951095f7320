"""Reads the trials of a search from the command line or a W&B sweep file: a grid or random draws."""

from __future__ import annotations

import argparse
import itertools
import math
import random
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from mnist_dist.distributed.launcher import starts_trainer
from mnist_dist.errors import Kind, Problem, RecipeError, unknown_key
from mnist_dist.recipe.file import Origins, find_recipe, parse, read_recipe

Choice = dict[str, Any]
"""The values of one trial by dotted key."""
Refuse = Callable[[str, Kind], RecipeError]
"""(message, kind) -> the error of one key of a sweep file."""


@dataclass(frozen=True)
class Sweep:
    """A search before any trial is trained."""

    name: str
    recipe: str
    words: list[str]
    """Overrides that all trials share."""
    choices: list[Choice]
    command: list[str]
    """Starts the trainer; recipe, overrides and run folder are appended."""
    typed: list[str] = field(default_factory=list)
    """The words of the command line. A person has named the code in them, but not the code in a file."""
    allow_code: list[str] = field(default_factory=list)
    """Modules of which the files may name classes and functions."""


# --- from the command line ----------------------------------------------------------------------------------------


def read_words(recipe: str, words: list[str], count: int | None) -> Sweep:
    """Returns the grid of all overrides with several values, `key=a,b,c`.

    Args:
        count: largest number of trials; None for all.

    Raises:
        RecipeError: no key has several values, or a value cannot be parsed.
    """
    grid, shared = {}, []
    for word in words:
        key, _, text = word.partition("=")
        values, _ = parse(f"[{text}]", lambda line: "command line", key)
        if isinstance(values, list) and len(values) > 1:
            grid[key] = values
        else:
            shared.append(word)
    if not grid:
        message = "no key has several values; write e.g. optimizer.lr=0.01,0.1, or name a W&B sweep file"
        raise RecipeError([Problem("command line", "key=value", message, "missing")])
    command = [sys.executable, "-m", "mnist_dist.train"]
    return Sweep(find_recipe(recipe).stem, recipe, shared, _grid(grid)[:count], command)


# --- from a W&B sweep file ----------------------------------------------------------------------------------------

KNOWN = ("program", "method", "metric", "parameters", "command", "run_cap", "name", "description", "project", "entity")
"""Keys of a W&B sweep file that are accepted."""
METRICS = ({"name": "eval/accuracy"}, {"name": "eval/accuracy", "goal": "maximize"})


def read_file(path: Path, words: list[str], count: int | None, seed: int) -> Sweep:
    """Reads a W&B sweep file of method grid or random.

    Args:
        words: overrides that all trials share.
        count: largest number of trials; None for the file's run_cap.
        seed: of a random search.

    Raises:
        RecipeError: with every problem of the file, also every setting that needs W&B's server.
    """
    values, origins = read_recipe(path)
    problems = _check_keys(path, values, origins)
    draws = _collect(problems, lambda: _read_parameters(values, origins)) or {}
    count = _collect(problems, lambda: _read_count(values, origins, count))
    read = _collect(problems, lambda: _read_command(values, partial(_refuse, origins, "command")))
    if problems or read is None:
        raise RecipeError(problems)
    command, recipe, shared = read
    searched = [word for word in words if word.partition("=")[0] in draws]
    if searched:
        message = f"{path} searches this key; remove the override"
        raise RecipeError([Problem("command line", word.partition("=")[0], message, "conflict") for word in searched])
    choices = _grid(draws)[:count] if values["method"] == "grid" else _random(draws, count or 0, seed)
    return Sweep(str(values.get("name") or path.stem), recipe, [*shared, *words], choices, command)


def _collect(problems: list[Problem], action: Callable[[], Any]) -> Any:
    """Returns what `action` returns; if it raises RecipeError, adds the problems to the list and returns None."""
    try:
        return action()
    except RecipeError as error:
        problems += error.problems
        return None


def _refuse(origins: Origins, key: str, message: str, kind: Kind) -> RecipeError:
    return RecipeError([origins.problem(key, message, kind)])


def _check_keys(path: Path, values: dict[str, Any], origins: Origins) -> list[Problem]:
    """Returns the problems of the file's keys, its method and its metric."""
    problems = [origins.problem(key, unknown_key(key, KNOWN), "unknown") for key in values if key not in KNOWN]
    if (method := values.get("method")) not in ("grid", "random"):
        message = f"expected grid or random, got {method}; other methods need W&B's server: wandb sweep {path}"
        problems.append(origins.problem("method", message, "unsupported"))
    if values.get("metric", METRICS[0]) not in METRICS:
        message = "trials are compared by eval/accuracy with goal maximize; no other metric is supported"
        problems.append(origins.problem("metric", message, "unsupported"))
    return problems


def _read_parameters(values: dict[str, Any], origins: Origins) -> dict[str, Any]:
    """Returns for each recipe key the values of a grid; for a random search, a function that draws one value."""
    spaces = values.get("parameters")
    if not isinstance(spaces, dict) or not spaces:
        raise _refuse(origins, "parameters", "expected a mapping of recipe keys to the values to try", "missing")
    read = _draw if values.get("method") == "random" else _values
    draws: dict[str, Any] = {}
    problems: list[Problem] = []
    for path, key, space in _flatten("parameters", "", spaces):
        refuse = partial(_refuse, origins, path)
        if key in draws:
            problems += refuse(f"{key} is given twice; remove one", "conflict").problems
        draws[key] = _collect(problems, partial(read, space, refuse))
    if problems:
        raise RecipeError(problems)
    return draws


def _flatten(path: str, prefix: str, spaces: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields place in the file, recipe key and values of each parameter; `parameters` may be nested, as in W&B."""
    for name, space in spaces.items():
        inner = space.get("parameters") if isinstance(space, dict) else None
        if isinstance(inner, dict) and inner and len(space) == 1:
            yield from _flatten(f"{path}.{name}.parameters", f"{prefix}{name}.", inner)
        else:
            yield f"{path}.{name}", f"{prefix}{name}", space


def _read_count(values: dict[str, Any], origins: Origins, count: int | None) -> int | None:
    """Returns the number of trials: the option --count, else the file's run_cap; None for a complete grid."""
    count = count or values.get("run_cap")
    if values.get("method") == "random" and count is None:
        message = "a random search needs a number of trials; give run_cap in the file or --count"
        raise _refuse(origins, "run_cap", message, "missing")
    if not isinstance(count, int | None) or isinstance(count, bool):
        raise _refuse(origins, "run_cap", f"expected a whole number, got {count}", "type")
    if count is not None and count < 1:
        raise _refuse(origins, "run_cap", f"expected at least 1, got {count}", "range")
    return count


def _read_command(values: dict[str, Any], refuse: Refuse) -> tuple[list[str], str, list[str]]:
    """Splits a sweep file's command line into the words that start the trainer, the recipe, and overrides."""
    words = values.get("command")
    if values.get("program") != "mnist_dist.train" or not isinstance(words, list):
        raise refuse("expected `program: mnist_dist.train` and a command, as in launch/sweep.yaml", "missing")
    replaced = {"${interpreter}": sys.executable, "python": sys.executable, "${program}": "mnist_dist.train"}
    line = [replaced.get(word, word) for word in map(str, words) if word != "${env}"]
    if line.count("${args_no_hyphens}") != 1:
        raise refuse("expected ${args_no_hyphens} once; a trial's key=value words replace it", "missing")
    if other := [word for word in line if "${" in word and word != "${args_no_hyphens}"]:
        known = "${env}, ${interpreter}, ${program} and ${args_no_hyphens}"
        raise refuse(f"{other[0]} is not supported; supported are {known}", "unsupported")
    line.remove("${args_no_hyphens}")
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--recipe", required=True)
    try:
        given, line = parser.parse_known_args(line)
    except (argparse.ArgumentError, SystemExit) as error:
        raise refuse("expected --recipe=NAME in the command", "missing") from error
    shared = [word for word in line if re.match(r"[A-Za-z_][\w.]*=", word)]
    command = [word for word in line if word not in shared]
    if not starts_trainer(command):
        expected = "python -m ${program}, accelerate launch … -m ${program} or torchrun … -m ${program}"
        raise refuse(f"expected a command that starts with {expected}; no other program is started", "code")
    if any(word.startswith("--allow-code") for word in command):
        raise refuse("--allow-code is your decision, not the file's; give it to sweep itself", "code")
    return command, given.recipe, shared


# --- drawing ------------------------------------------------------------------------------------------------------


def _grid(values: dict[str, list[Any]]) -> list[Choice]:
    """Returns all combinations; the last key changes fastest."""
    return [dict(zip(values, each, strict=True)) for each in itertools.product(*values.values())]


def _random(draws: dict[str, Callable[[random.Random], Any]], count: int, seed: int) -> list[Choice]:
    """Returns up to `count` different draws, as a function of the seed. A larger `count` only adds draws."""
    generator = random.Random(seed)
    drawn = [{key: draw(generator) for key, draw in draws.items()} for _ in range(count)]
    return [each for index, each in enumerate(drawn) if each not in drawn[:index]]


def _values(space: Any, refuse: Refuse) -> list[Any]:
    """Returns the values that a grid tries for one parameter."""
    if isinstance(space, dict) and space.keys() <= {"value", "distribution"} and "value" in space:
        return [space["value"]]
    values = space.get("values") if isinstance(space, dict) else None
    if not isinstance(values, list) or not values or not space.keys() <= {"values", "distribution"}:
        raise refuse("expected `values: [a, b]` or `value: a`; with method random also `min` and `max`", "type")
    return values


def _draw(space: Any, refuse: Refuse) -> Callable[[random.Random], Any]:
    """Returns a function that draws one parameter of a random search, as W&B's documentation defines it."""
    if not isinstance(space, dict) or {"value", "values"} & space.keys():
        values = _values(space, refuse)
        return lambda generator: generator.choice(values)
    low, high = space.get("min"), space.get("max")
    numbers = [each for each in (low, high) if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) < 2 or not space.keys() <= {"min", "max", "distribution"}:
        message = "expected numbers `min` and `max` and optionally a `distribution`; or `values: [a, b]`"
        raise refuse(message, "type")
    low, high = numbers
    are_whole = all(isinstance(each, int) for each in numbers)
    distribution = space.get("distribution", "int_uniform" if are_whole else "uniform")
    if not low < high:
        raise refuse(f"min must be less than max, got {low} and {high}", "range")
    if distribution == "int_uniform" and are_whole:
        return lambda generator: generator.randint(int(low), int(high))
    if distribution == "uniform":
        return lambda generator: _short(generator.uniform(low, high), low, high)
    if distribution == "log_uniform_values" and low > 0:
        return lambda generator: _short(math.exp(generator.uniform(math.log(low), math.log(high))), low, high)
    message = (
        f"{distribution} from {low} to {high} is not supported; "
        "use int_uniform (whole numbers), uniform, or log_uniform_values (above 0)"
    )
    raise refuse(message, "unsupported")


def _short(value: float, low: float, high: float) -> float:
    """Rounds to four significant digits, so that the name of the trial's folder is short."""
    return min(max(float(f"{value:.4g}"), low), high)
