"""Measures training speed: interleaved rounds of the trainer, the baselines and the frameworks.

Rounds are interleaved, so a change of the machine's speed affects all loops equally.
"""

from __future__ import annotations

import math
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate.utils import broadcast_object_list

from mnist_dist.benchmark.baselines import BenchmarkSetup, TimedLoop, bare_step, median_and_range, tensor_loop
from mnist_dist.benchmark.frameworks import (
    HAS_LIGHTNING,
    accelerate_loader,
    best_workers,
    lightning_loader,
    plain_loader,
)
from mnist_dist.benchmark.report import OURS
from mnist_dist.distributed.collectives import wait_for_all_ranks
from mnist_dist.distributed.devices import peak_memory
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components
from mnist_dist.run.components import TrainingComponents
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.model_setup import build_module
from mnist_dist.run.summary import close_trackers, open_trackers
from mnist_dist.run.timed_training import TimedTraining

# Commands do not import commands, except for the training loop, which this command measures.
from mnist_dist.train import fit

SHORTEST_ROUND = 0.1
"""Seconds. A loop makes more steps than requested if a round would be shorter than this, because a shorter round cannot
be measured exactly."""
WARM_UP_STEPS = 5
"""Untimed steps of each loop: they choose kernels, start workers, compile, and capture (after 3 eager steps)."""


def measure(recipe: Recipe, rounds: int, steps: int) -> dict[str, Any]:
    """Measures all loops in interleaved rounds. Collective: call on every rank.

    Args:
        rounds: number of rounds per loop.
        steps: smallest number of steps per round.

    Returns:
        Plain values, equal on all ranks except for the times. Speeds are images/s, summed over all processes. Memory is
        the peak of the trainer alone on a GPU, and the peak of the process on a CPU.

    Raises:
        RecipeError: from `BenchmarkSetup.prepare`.
        RunError: the training failed or was stopped.
    """
    setup = BenchmarkSetup.prepare(recipe)
    if hasattr(backend := getattr(torch, setup.state.device.type), "reset_peak_memory_stats"):
        backend.reset_peak_memory_stats(setup.state.device)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours, components = trainer_loop(setup, Path(folder))
        stack.callback(ours.close)
        first_step_seconds = ours.run(1)  # compilation takes nearly all of this time
        since_process_start = time.time() - psutil.Process().create_time()
        _warm_up(setup, ours, steps)
        memory = peak_memory(setup.state.device) / 2**20
        # In PyTorch's default memory layout, which the loops of tutorials use.
        workers = best_workers(setup.in_default_layout(), steps=min(steps, 20))
        loops = [ours]
        for loop in _other_loops(setup, workers, Path(folder)):
            stack.callback(loop.close)
            _warm_up(setup, loop, steps)
            loops.append(loop)
        step_seconds = {loop.name: loop.run(steps) / steps for loop in loops}
        counts = _steps_per_round(step_seconds, steps)
        seconds = run_rounds(setup, loops, counts, rounds)
    return {
        **circumstances_of(setup, components, rounds, counts, workers),
        "seconds_from_process_start_to_first_step": round(since_process_start, 2),
        "compile_seconds": round(first_step_seconds - step_seconds[OURS], 3) if setup.is_compiled else None,
        "peak_memory_mb": round(memory),
        **figures(recipe.batch_size, counts, seconds),
    }


def circumstances_of(
    setup: BenchmarkSetup, components: TrainingComponents, rounds: int, counts: dict[str, int], workers: int
) -> dict[str, Any]:
    """Returns what a result says about its measurement; the times that were not measured are None."""
    capture = components.captured
    return {
        **setup.about(),
        "rounds": rounds,
        "steps_per_round": counts,
        "dataloader_workers": workers,
        "seconds_from_process_start_to_first_step": None,
        "capture_seconds": capture.seconds if capture else None,
        "compile_seconds": None,
        "peak_memory_mb": round(peak_memory(setup.state.device) / 2**20),
    }


def trainer_loop(
    setup: BenchmarkSetup, folder: Path, name: str = OURS, *, evaluates: bool = False
) -> tuple[TimedLoop, TrainingComponents]:
    """Builds the trainer as a user runs it: data, augmentation, clipping, metrics, console, W&B as in the recipe.

    Args:
        folder: an existing folder; the run folder is created in it.
        evaluates: evaluate all held-out images, and time evaluations and checkpoints too; else one image, untimed.
    """
    recipe, dataset = setup.recipe, setup.dataset
    components = build_components(recipe, setup.precision, dataset.train, build_module(recipe, dataset))
    run = RunFolder.open(folder / f"{name}-{setup.state.process_index}", recipe)
    open_trackers(recipe, components, dataset, run, {}, quiet=True)
    eval_images = dataset.held_out if evaluates else dataset.test[slice(1)]
    training = TimedTraining(fit, recipe, components, eval_images, run)

    def run_everything(steps: int) -> float:
        started = time.perf_counter()
        training.run(steps)
        setup.synchronize()
        return time.perf_counter() - started

    def close() -> None:
        close_trackers(components)
        components.close()

    return TimedLoop(name, run_everything if evaluates else training.run, close), components


def _other_loops(setup: BenchmarkSetup, workers: int, folder: Path) -> Iterator[TimedLoop]:
    """Builds the baselines, the frameworks, and the variants that the recipe's settings call for, one after another."""
    yield bare_step(setup)
    if setup.state.num_processes > 1:
        yield bare_step(setup, with_ddp=True)
    if setup.recipe.deterministic:  # the price of results that can be repeated
        yield bare_step(setup, fastest=True)
    tutorial = setup.in_default_layout()
    yield tensor_loop(setup)
    yield plain_loader(tutorial, workers)
    yield accelerate_loader(tutorial, workers)
    if HAS_LIGHTNING:
        yield lightning_loader(tutorial, workers)
    if setup.recipe.engine.channels_last:  # what a user of PyTorch gains by this setting
        yield plain_loader(setup, workers, "PyTorch + DataLoader, channels last")
    if setup.recipe.logical_shards:  # the price of results that do not depend on the number of processes
        without = replace(setup, recipe=setup.recipe.model_copy(update={"logical_shards": None}))
        yield trainer_loop(without, folder, f"{OURS} without logical shards")[0]
    if setup.precision != "no":  # what a user of PyTorch has without autocast
        yield plain_loader(replace(tutorial, precision="no"), workers, "PyTorch + DataLoader, fp32")


def _warm_up(setup: BenchmarkSetup, loop: TimedLoop, steps: int) -> None:
    """Runs a loop untimed, on a CPU for at most `steps` steps."""
    loop.run(WARM_UP_STEPS if setup.state.device.type == "cuda" else min(WARM_UP_STEPS, steps))


def _steps_per_round(step_seconds: dict[str, float], steps: int) -> dict[str, int]:
    """Returns each loop's steps per round: `steps`, or more to fill `SHORTEST_ROUND`.

    Collective: call on every rank.
    """
    counts = {name: max(steps, math.ceil(SHORTEST_ROUND / each)) for name, each in step_seconds.items()}
    return broadcast_object_list([counts])[0]


def run_rounds(
    setup: BenchmarkSetup, loops: list[TimedLoop], counts: dict[str, int], rounds: int
) -> dict[str, list[float]]:
    """Runs the loops in turn; returns the seconds of each loop's rounds. Collective: call on every rank."""
    seconds: dict[str, list[float]] = {loop.name: [] for loop in loops}
    for _ in range(rounds):
        for loop in loops:
            wait_for_all_ranks()
            seconds[loop.name].append(loop.run(counts[loop.name]))
    return seconds


def figures(
    batch_size: int, counts: dict[str, int], seconds: dict[str, list[float]], limit: str = "bare step"
) -> dict[str, Any]:
    """Returns speeds, step times and ratios of all loops.

    Args:
        counts: steps per round of each loop.
        seconds: of each round of each loop.
        limit: name of the loop that is the upper limit.
    """
    speeds = {name: [counts[name] * batch_size / each for each in times] for name, times in seconds.items()}
    step_times = {name: [1000 * each / counts[name] for each in times] for name, times in seconds.items()}
    bare, ours = speeds[limit], speeds[OURS]
    return {
        "images_per_second": {name: median_and_range(each, 3) for name, each in speeds.items()},
        "ms_per_step": {name: median_and_range(each, 4) for name, each in step_times.items()},
        "share_of_bare_step": {name: _ratio(each, bare) for name, each in speeds.items() if name != limit},
        "ratio_of_mnist_dist_to": {name: _ratio(ours, each) for name, each in speeds.items() if name != OURS},
    }


def _ratio(numerators: list[float], denominators: list[float]) -> float:
    """Returns the median of each round's ratio. A change of the machine's speed affects both numbers of a round."""
    return round(statistics.median(a / b for a, b in zip(numerators, denominators, strict=True)), 3)
