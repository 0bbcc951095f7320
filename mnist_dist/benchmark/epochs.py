"""Measures whole epochs with everything on: evaluation, best weights, a checkpoint, log lines.

The limit is the bare step and a bare evaluation of the same images. The trainer is compared with it, and with
Accelerate's tutorial followed by the bare evaluation.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mnist_dist.benchmark.baselines import BenchmarkSetup, TimedLoop, bare_step
from mnist_dist.benchmark.frameworks import accelerate_loader, best_workers
from mnist_dist.benchmark.training import circumstances_of, figures, run_rounds, trainer_loop
from mnist_dist.recipe.schema import Recipe


def measure_epochs(recipe: Recipe, rounds: int, steps: int) -> dict[str, Any]:
    """Measures epochs in interleaved rounds of one epoch each. Collective: call on every rank.

    Args:
        rounds: number of rounds per loop.
        steps: steps per trial when the number of DataLoader workers is chosen.

    Returns:
        Plain values, like those of `training.measure`. Speeds count the images that were trained on.

    Raises:
        RecipeError: from `BenchmarkSetup.prepare`.
        RunError: the training failed or was stopped.
    """
    setup = BenchmarkSetup.prepare(recipe)
    epoch = -(-len(setup.dataset.train) // recipe.batch_size)
    checkpoint = recipe.checkpoint.model_copy(update={"every_steps": epoch})
    everything = replace(setup, recipe=setup.recipe.model_copy(update={"eval_every": 1, "checkpoint": checkpoint}))
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        ours, components = trainer_loop(everything, Path(folder), evaluates=True)
        stack.callback(ours.close)
        started = time.perf_counter()
        ours.run(epoch)  # untimed: chooses kernels, compiles, captures
        first_epoch_seconds = time.perf_counter() - started
        workers = best_workers(setup.in_default_layout(), steps=min(steps, 20))
        loops = [ours, with_evaluation(setup, bare_step(setup), epoch)]
        loops.append(with_evaluation(setup, accelerate_loader(setup.in_default_layout(), workers), epoch))
        for loop in loops[1:]:
            loop.run(1)
        counts = {loop.name: epoch for loop in loops}
        seconds = run_rounds(setup, loops, counts, rounds)
    about = circumstances_of(setup, components, rounds, counts, workers)
    about |= {"kind": "everything on", "evaluated_images": len(setup.dataset.held_out)}
    about["first_epoch_seconds"] = round(first_epoch_seconds, 2)
    return about | figures(recipe.batch_size, counts, seconds, limit=loops[1].name)


def with_evaluation(setup: BenchmarkSetup, loop: TimedLoop, epoch: int) -> TimedLoop:
    """Returns a loop that evaluates the held-out images after every `epoch` steps, with as few operations as possible.

    The processes share the images. The network has its initial weights: they do not change the duration.
    """
    world, rank = setup.state.num_processes, setup.state.process_index
    data = setup.dataset.held_out[slice(rank, None, world)].to(setup.state.device)
    module = setup.module().eval()

    @torch.no_grad()
    def evaluate() -> int:
        correct, size = torch.zeros((), dtype=torch.int64, device=setup.state.device), setup.recipe.eval_batch_size
        for start in range(0, len(data), size):
            part = data[slice(start, start + size)]
            with setup.autocast():
                correct += (module(data.normalize(part.images)).argmax(dim=1) == part.labels).sum()
        return int(correct)

    def run(count: int) -> float:
        seconds = loop.run(count)
        started = time.perf_counter()
        for _ in range(count // epoch):
            evaluate()
        return seconds + time.perf_counter() - started

    return TimedLoop(f"{loop.name} + bare evaluation", run, loop.close)
