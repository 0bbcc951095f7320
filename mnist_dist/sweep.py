"""Hyperparameter search on this machine: `python -m mnist_dist.sweep lenet5 optimizer.lr=0.001,0.01 batch_size=64,128`.

Takes a W&B sweep file too, and searches as `wandb agent` would, without a server. Every trial is a run folder of its
own, trained by a process of its own, and judged on held-out training images: the test set has no say in the choice.
"""

from __future__ import annotations

from mnist_dist.cli import FAILED, answer_early, parser_of, run_command

if __name__ == "__main__":
    answer_early("sweep")  # before the imports below load torch

import argparse
import itertools
import json
import math
import random
import re
import shlex
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from mnist_dist.distributed.launcher import launched_world
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.errors import Problem, RecipeError, unknown_key
from mnist_dist.recipe.file import Dumper, find_recipe, parse, read_recipe
from mnist_dist.recipe.schema import Recipe, load_recipe
from mnist_dist.run.build import load_data
from mnist_dist.run.folder import RunFolder, describe_changes, write_text
from mnist_dist.run.tables import markdown_table, table_console

VALIDATION = 5000
"""Training images held out to judge trials by, where the recipe holds none out; at most a sixth."""

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


# --- trials -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    name: str
    choice: Choice
    words: list[str]
    """Its overrides."""
    recipe: Recipe
    folder: RunFolder


def plan(sweep: Sweep, directory: Path) -> list[Trial]:
    """The trials, each with its resolved recipe and its folder.

    Raises:
        RecipeError: any of them could not be trained, or its folder holds something else.
    """
    if "data.validation" in sweep.choices[0]:
        what = "trials are compared by these images: it cannot be searched"
        raise RecipeError([Problem("the search", "data.validation", what)])
    base, shared = load_recipe(sweep.recipe, *sweep.words), []
    if base.data.validation == 0:
        everything = base.model_copy(update={"data": base.data.model_copy(update={"limit_train": None})})
        size = len(load_data(everything, launched_world()).train)
        shared.append(f"data.validation={min(VALIDATION, size // 6)}")
        print(f"{shared[0]}: so many training images are held out, and trials judged by them, not by the test set")
    if base.tracking.wandb.group is None:
        shared += [_word("tracking.wandb.group", sweep.name), "tracking.wandb.job_type=sweep"]
    trials, problems = [], []
    for name, choice in zip(_names(sweep.choices), sweep.choices, strict=True):
        words = [*(_word(*pair) for pair in choice.items()), *shared, _word("name", name)]
        try:
            recipe = load_recipe(sweep.recipe, *sweep.words, *words)
        except RecipeError as error:
            problems += error.problems
            continue
        folder = RunFolder(directory / name)
        if folder.recipe.is_file():
            begun = load_recipe(folder.recipe)
            resolved = {"mixed_precision": recipe.mixed_precision or begun.mixed_precision}
            if changes := describe_changes(begun, recipe.model_copy(update=resolved)):
                listed = "\n".join([*changes, "name another --run-dir"])
                problems.append(Problem(str(folder.path), "", f"holds a trial of another recipe:\n{listed}"))
        trials.append(Trial(name, choice, words, recipe, folder))
    if problems:
        raise RecipeError(list(dict.fromkeys(problems)))
    return trials


def _word(key: str, value: Any) -> str:
    """The override that gives `key` this value."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=sys.maxsize, allow_unicode=True)
    return f"{key}={text.removesuffix('...' + chr(10)).strip()}"


def _names(choices: list[Choice]) -> list[str]:
    """A folder's name for each: its values, by the last part of their keys where that is no other's."""
    names: list[str] = []
    for choice in choices:
        lasts = Counter(key.rpartition(".")[2] for key in choice)
        short = {key: last if lasts[last := key.rpartition(".")[2]] == 1 else key for key in choice}
        text = ",".join(f"{short[key]}={value}" for key, value in choice.items())
        name = re.sub(r"[^\w.=,+-]+", "_", text)[:80]
        names.append(f"{name}-{len(names)}" if name in names else name)
    return names


def train_trial(sweep: Sweep, trial: Trial, log: Path) -> int:
    """Trains it in a process of its own, whose words go to `log`; returns its exit code.

    SIGTERM and SIGUSR1 are passed on to it, so that it saves and does not train on alone; the code is PREEMPTED then.

    Raises:
        RecipeError: the command cannot be started.
    """
    where = ["--recipe", sweep.recipe, "--run-dir", str(trial.folder.path)]
    command = [*sweep.command, *where, *sweep.words, *trial.words]
    with log.open("w", encoding="utf-8") as output:
        try:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT)
        except OSError as error:
            raise RecipeError([Problem(shlex.join(command), "", f"cannot be started: {error.strerror}")]) from error
        asked: list[int] = []

        def pass_on(number: int, frame: object) -> None:
            asked.append(number)
            process.send_signal(number)

        before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGUSR1)}
        try:
            code = process.wait()
            return PREEMPTED if asked else code
        except KeyboardInterrupt:  # Ctrl-C reached it too: it saves
            process.wait()
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def result(trial: Trial, log: Path) -> dict[str, Any]:
    """What became of it, for the table."""
    row: dict[str, Any] = {"trial": trial.name, "values": trial.choice}
    if not trial.folder.is_done:
        return row | {"failed": _failure_of(log)}
    summary = json.loads(trial.folder.summary.read_text(encoding="utf-8"))
    assert summary["eval.split"] == "validation"
    keys = ("eval.best.accuracy", "eval.best.epoch", "eval.last.accuracy", "eval.last.loss", "train_seconds")
    return row | {key: summary[key] for key in keys} | {"test.accuracy": summary["test.accuracy"]}


def _failure_of(log: Path) -> str:
    """Why a trial failed, on one line: the trainer's own screen, else the end of a traceback."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    screen = [place for place, line in enumerate(lines) if line.startswith("mnist_dist: ")]
    words = " ".join(lines[screen[-1] if screen else -1 :]) or "without a word"
    return words.removeprefix("mnist_dist: ")[:200]


# --- the table ----------------------------------------------------------------------------------------------------


def ranked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Best validation accuracy first, lower loss where equal, failed ones last."""
    return sorted(rows, key=lambda row: (-row.get("eval.best.accuracy", -1.0), row.get("eval.last.loss", 0.0)))


def cells(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table as text, headings first."""
    keys = list(rows[0]["values"])
    lines = [[*keys, "validation", "at epoch", "last epoch", "loss", "time", "trial"]]
    for row in rows:
        figures = [f"failed: {row['failed'][:80]}", "", "", "", ""] if "failed" in row else _figures(row)
        lines.append([*(str(row["values"][key]) for key in keys), *figures, row["trial"]])
    return lines


def _figures(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['eval.best.accuracy']:.2f} %",
        f"{row['eval.best.epoch']:g}",
        f"{row['eval.last.accuracy']:.2f} %",
        f"{row['eval.last.loss']:.4f}",
        f"{row['train_seconds']:.0f} s",
    ]


def write(directory: Path, sweep: Sweep, rows: list[dict[str, Any]]) -> str:
    """Writes sweep.json and sweep.md; returns what is to be said of the best trial."""
    rows = ranked(rows)
    best, lines = rows[0], cells(rows)
    said = "every trial failed"
    if "failed" not in best:
        # The recipe and the sweep file's command may hold images out too; the last word counts.
        words = [*sweep.words, *(_word(*pair) for pair in best["values"].items()), "data.validation=0"]
        said = (
            f"best: {best['trial']}, {best['eval.best.accuracy']:.2f} % of the validation images "
            f"({best['test.accuracy']:.2f} % of the test images, after its last epoch)\n\n"
            f"on all training images: python -m mnist_dist.train --recipe {sweep.recipe} {shlex.join(words)}"
        )
    write_text(
        directory / "sweep.json", json.dumps({"sweep": sweep.name, "recipe": sweep.recipe, "trials": rows}, indent=2)
    )
    write_text(directory / "sweep.md", f"# {sweep.name}\n\n{markdown_table(lines)}\n\n{said}\n")
    return said


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, 1 if every trial failed, 2 for bad input, 75 when asked to stop (run me again)."""
    parser = parser_of("sweep")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.count is not None and arguments.count < 1:
        parser.error("--count is at least 1")
    if launched_world().num_processes > 1:
        parser.error("start a sweep as one process; a W&B sweep file's command may start each trial with several")
    path, words = find_recipe(arguments.sweep), arguments.overrides
    if read_recipe(path)[0].keys() & {"parameters", "method"}:
        sweep = read_file(path, words, arguments.count, arguments.seed)
    else:
        sweep = read_words(arguments.sweep, words, arguments.count)
    directory = arguments.run_dir or Path("runs", "sweeps", sweep.name)
    trials = plan(sweep, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RecipeError([Problem("command line: --run-dir", "", f"{directory}: {error.strerror}")]) from error

    console = Console(highlight=False, markup=False, soft_wrap=True)
    console.print(f"{len(trials)} trials of {sweep.recipe} in {directory}")
    rows: list[dict[str, Any]] = []
    said = ""
    for number, trial in enumerate(trials, start=1):
        log = directory / f"{trial.name}.log"
        again = trial.folder.is_done
        if not again:
            with console.status(f"{number}/{len(trials)}  {trial.name}: tail -f {log}"):
                code = train_trial(sweep, trial, log)
            if code == PREEMPTED:
                console.print(f"{trial.name} was asked to stop and has saved; the same command goes on from there")
                return PREEMPTED
        rows.append(result(trial, log))
        failed = rows[-1].get("failed")
        what = f"failed: {failed}; see {log}" if failed else f"{rows[-1]['eval.best.accuracy']:.2f} %"
        console.print(f"{number}/{len(trials)}  {trial.name}: {what}{' (was done)' if again else ''}")
        if not failed:
            log.unlink(missing_ok=True)
        said = write(directory, sweep, rows)
    heads, *lines = cells(ranked(rows))
    table = Table(*heads, box=None)
    for line in lines:
        table.add_row(*line)
    table_console(highlight=False, markup=False).print(table)
    console.print(f"{said}\n{directory / 'sweep.md'}")
    return FAILED if all("failed" in row for row in rows) else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
