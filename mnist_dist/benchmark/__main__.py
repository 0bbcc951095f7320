"""How fast a recipe trains here, beside the bare step and beside what one would write instead; how fast it answers.

`accelerate launch -m mnist_dist.benchmark --recipe model_v1_onecycle`. Every loop trains the same model with the
same batch size, augmentation and precision, in one process group; rounds are interleaved, so that a machine whose speed
drifts drifts for all of them alike. Figures are images/s of the whole world: median, lowest and highest round.
"""

from __future__ import annotations

from mnist_dist.cli import Parser, answer_early, parser_of, run_command

if __name__ == "__main__":
    answer_early("benchmark")  # before the imports below load torch

import argparse
import json
import math
import re
import resource
import shlex
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list
from rich.table import Table

from mnist_dist.benchmark import time_to_accuracy
from mnist_dist.benchmark.baselines import BenchmarkSetup, TimedLoop, bare_step, median_and_range, tensor_loop
from mnist_dist.benchmark.frameworks import (
    HAS_LIGHTNING,
    accelerate_loader,
    best_workers,
    lightning_loader,
    plain_loader,
)
from mnist_dist.benchmark.inference import measure_inference
from mnist_dist.benchmark.report import OURS, circumstances, floors, table_of, title_of, to_markdown
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.errors import Problem, RecipeError, RunError
from mnist_dist.recipe.file import find_recipe
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components
from mnist_dist.run.checkpointing import Checkpointer
from mnist_dist.run.components import Progress, TrainingComponents
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.model_setup import build_module
from mnist_dist.run.summary import close_trackers, open_trackers
from mnist_dist.run.tables import table_console
from mnist_dist.train import fit

SHORTEST_ROUND = 0.1
"""Seconds: who makes the steps asked for in less makes more of them, so that the clock has something to measure."""

# --- measuring ----------------------------------------------------------------------------------------------------


def trainer(task: BenchmarkSetup, folder: Path, name: str = OURS) -> tuple[TimedLoop, TrainingComponents]:
    """The trainer as a user runs it: data, augmentation, clipping, metrics, console, W&B offline."""
    recipe, dataset = task.recipe, task.dataset
    components = build_components(recipe, task.precision, dataset.train, build_module(recipe, dataset))
    run = RunFolder.open(folder / f"{name}-{task.state.process_index}", recipe)
    open_trackers(recipe, components, dataset, run, {}, quiet=True)
    progress = Progress()
    checkpointer = Checkpointer(run, recipe, components, progress)
    eval_images = dataset.test[slice(1)].to(task.state.device)

    def train(steps: int) -> float:
        before, last = components.meter.train_seconds, progress.step + steps  # the clock stands still during evaluation
        components.meter.resume()
        try:
            finished = fit(recipe, replace(components, total_steps=last), eval_images, checkpointer, progress)
        except Exception as error:
            if message := checkpointer.describe_failure(error):
                raise RunError(message.rpartition("\n")[0]) from error  # but for where the run goes on: it does not
            raise
        if not finished:
            raise RunError("asked to stop while measuring")
        assert progress.step == last, "a round that ends early looks fast"
        return components.meter.train_seconds - before

    return TimedLoop(name, train, lambda: close_trackers(components)), components


def measure(recipe: Recipe, rounds: int, steps: int) -> dict[str, Any]:
    """Interleaved rounds of all loops; returns the table as plain values (equal on all processes but for time).

    Memory is what the trainer alone had taken at most; on a CPU the whole process, also before.

    Raises:
        RecipeError: what `BenchmarkSetup.prepare` finds. RunError: the training broke off.
    """
    task = BenchmarkSetup.prepare(recipe)
    device = task.state.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:

        def enter(loop: TimedLoop) -> TimedLoop:
            stack.callback(loop.close)
            # What is slow once: kernels are chosen, workers start, a step is compiled or, after three others, captured.
            loop.run(5 if device.type == "cuda" else min(5, steps))
            return loop

        ours, components = trainer(task, Path(folder))
        first_run = ours.run(1)  # of which compiling, where it is asked for, is nearly all
        first_step = time.time() - psutil.Process().create_time()
        loops = [enter(ours)]
        memory = _peak_memory_mb(device)
        tutorial = task.in_default_layout()  # as who follows a tutorial has it
        workers = best_workers(tutorial, steps=min(steps, 20))
        loops += [enter(loop) for loop in (bare_step(task), tensor_loop(task))]
        loaders = [plain_loader, accelerate_loader, *([lightning_loader] if HAS_LIGHTNING else [])]
        loops += [enter(loader(tutorial, workers)) for loader in loaders]
        if recipe.engine.channels_last:  # as who has read further has it
            loops.append(enter(plain_loader(task, workers, "PyTorch + DataLoader, channels last")))
        if recipe.logical_shards:  # what exactness costs
            plain = replace(task, recipe=recipe.model_copy(update={"logical_shards": None}))
            loops.append(enter(trainer(plain, Path(folder), f"{OURS} without logical shards")[0]))
        if task.precision != "no":  # what a user has who does not turn autocast on
            fp32 = replace(tutorial, precision="no")
            loops.append(enter(plain_loader(fp32, workers, "PyTorch + DataLoader, fp32")))
        paces = {each.name: each.run(steps) / steps for each in loops}
        counts = {name: max(steps, math.ceil(SHORTEST_ROUND / pace)) for name, pace in paces.items()}
        [counts] = broadcast_object_list([counts])
        seconds: dict[str, list[float]] = {name: [] for name in counts}
        for _ in range(rounds):
            for loop in loops:
                task.state.wait_for_everyone()
                seconds[loop.name].append(loop.run(counts[loop.name]))
    speeds = {name: [counts[name] * recipe.batch_size / each for each in times] for name, times in seconds.items()}
    return task.about() | {
        "rounds": rounds,
        "steps_per_round": counts,
        "dataloader_workers": workers,
        "seconds_from_process_start_to_first_step": round(first_step, 2),
        "capture_seconds": components.captured.seconds if components.captured else None,
        "compile_seconds": round(first_run - paces[OURS], 3) if task.is_compiled else None,
        "peak_memory_mb": round(memory),
        "images_per_second": {name: median_and_range(each, 3) for name, each in speeds.items()},
        "ms_per_step": {
            name: median_and_range([1000 * s / counts[name] for s in each], 4) for name, each in seconds.items()
        },
        "share_of_bare_step": {
            name: _ratio(each, speeds["bare step"]) for name, each in speeds.items() if name != "bare step"
        },
        "ratio_of_mnist_dist_to": {name: _ratio(speeds[OURS], each) for name, each in speeds.items() if name != OURS},
    }


def _ratio(ours: list[float], theirs: list[float]) -> float:
    """Pair by pair, round by round: what the machine did in a round it did to both."""
    return round(statistics.median(a / b for a, b in zip(ours, theirs, strict=True)), 3)


def _peak_memory_mb(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if sys.platform == "darwin" else 2**10  # of bytes there, of kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# --- what is shown ------------------------------------------------------------------------------------------------


def print_table(result: dict[str, Any]) -> None:
    heads, *rows = table_of(result)
    table = Table(*heads, box=None, title=title_of(result))
    for row in rows:
        table.add_row(*row)
    console = table_console()
    console.print(table)
    console.print(circumstances(result), highlight=False)


def print_floors(paths: list[Path]) -> None:
    """Floors beside what the files of `--json` hold."""
    table = Table("recipe", "floor", "at least", "measured", "", box=None)
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            for result in content.get("results", [content]):
                for what, least, found in floors(result):
                    verdict = "met" if found >= least else "not met"
                    table.add_row(result["recipe"], what, f"{least:,}", f"{found:,}", verdict)
        except (OSError, ValueError, AttributeError, KeyError) as error:
            raise RecipeError([Problem(str(path), "", f"holds no figures of --json: {error!r}")]) from error
    table_console().print(table)


def show_time_to_accuracy(arguments: argparse.Namespace, words: list[str]) -> None:
    """Measures a record, prints it and writes it where it was asked for."""
    result = time_to_accuracy.measure(load_recipe(arguments.time_to_accuracy, *arguments.overrides), arguments.seeds)
    time_to_accuracy.print_lines(result)
    if arguments.note:
        time_to_accuracy.note_in_recipe(find_recipe(arguments.time_to_accuracy), result)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        with arguments.markdown.open("a", encoding="utf-8") as file:
            file.write(
                time_to_accuracy.to_markdown(result, shlex.join(["python", "-m", "mnist_dist.benchmark", *words]))
            )


# --- the command line ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, 1 where the training broke off, 2 for bad input."""
    parser = parser_of("benchmark")
    arguments = parser.parse_intermixed_args(argv)
    _check_words(parser, arguments)
    if arguments.floors:
        print_floors(arguments.floors)
        return 0
    if arguments.time_to_accuracy:
        show_time_to_accuracy(arguments, sys.argv[1:] if argv is None else argv)
        return 0
    recipes = _recipes(parser, arguments)
    command = shlex.join(["python", "-m", "mnist_dist.benchmark", *(sys.argv[1:] if argv is None else argv)])
    results: list[dict[str, Any]] = []
    for change, recipe in recipes.items():
        if arguments.inference:
            batch_sizes = [int(size) for size in arguments.batches.split(",")]
            result = measure_inference(recipe, batch_sizes, arguments.rounds, arguments.steps)
        else:
            result = measure(recipe, arguments.rounds, arguments.steps)
        if change:
            result["sweep"] = change
            if results:  # the process did other things before
                result["seconds_from_process_start_to_first_step"] = None
        results.append(result)
        if launched_world().is_main_process:  # after each value, so that what one breaks leaves the others
            print_table(result)
            _write(arguments, results, command)
    launched_world().destroy_process_group()
    return 0


# So long that no schedule and no loop comes to its end while we measure, and nothing stops it early.
ENDLESS = {"epochs": "1000", "eval_every": "1000", "max_steps": "null", "early_stopping.patience": "null"}


def _check_words(parser: Parser, arguments: argparse.Namespace) -> None:
    """Refuses, before anything is measured, numbers out of range and files that could not be written."""
    if min(arguments.rounds, arguments.steps, arguments.seeds) < 1:
        parser.error("--rounds, --steps and --seeds are at least 1")
    if arguments.time_to_accuracy and (arguments.sweep is not None or arguments.inference):
        parser.error("--time-to-accuracy times whole seeds, and neither a --sweep nor --inference")
    if arguments.note and not arguments.time_to_accuracy:
        parser.error("--note is of --time-to-accuracy")
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", arguments.batches):
        parser.error(f"--batches: expected numbers of images, e.g. 1,32, got {arguments.batches!r}")
    for file in filter(None, (arguments.json, arguments.markdown, arguments.plot)):
        if file.is_dir():
            parser.error(f"{file} is a folder; name a file")
        if not file.absolute().parent.is_dir():
            parser.error(f"there is no folder {file.absolute().parent}")
    if arguments.plot and arguments.sweep is None:
        parser.error("--plot draws a --sweep")


def _recipes(parser: Parser, arguments: argparse.Namespace) -> dict[str, Recipe]:
    """What to measure: one recipe under "", or one under each `key=value` of the sweep."""
    changes = [""]
    if arguments.sweep is not None:
        key, _, listed = arguments.sweep.partition("=")
        changes = [f"{key}={value}" for value in dict.fromkeys(listed.split(","))]
        if not key or "" in listed.split(","):
            parser.error(f"--sweep: expected a key and its values, e.g. batch_size=32,128, got {arguments.sweep!r}")
        if key in ENDLESS or arguments.inference:
            parser.error(f"--sweep {key}: makes no difference to what is measured")
    words = list(arguments.overrides)
    if not any(word.startswith("tracking.wandb.mode=") for word in words):
        words.append("tracking.wandb.mode=offline")
    words += [f"{key}={value}" for key, value in ENDLESS.items()]
    return {change: load_recipe(arguments.recipe, *words, *([change] if change else [])) for change in changes}


def _write(arguments: argparse.Namespace, results: list[dict[str, Any]], command: str) -> None:
    """The files that were asked for, with the last of `results` new."""
    last = results[-1]
    if arguments.json:
        content = {"sweep": arguments.sweep, "results": results} if arguments.sweep else last
        arguments.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    if arguments.markdown:
        with arguments.markdown.open("a", encoding="utf-8") as file:
            file.write(to_markdown(last, command))
    if arguments.sweep:
        from mnist_dist.benchmark.sweep_plot import plot_sweep  # matplotlib: not before the first step

        key, values = arguments.sweep.partition("=")[0], [each["sweep"].partition("=")[2] for each in results]
        title = f"{last['recipe']}, {last['device']}, {last['world_size']} process(es)"
        speeds = [each["images_per_second"] for each in results]
        plot_sweep(values, speeds, arguments.plot or Path("sweep.png"), key=key, title=title)


if __name__ == "__main__":
    sys.exit(run_command(main))
