"""What the benchmark times: a loop, the task that all of them are given, and the two that load no data.

All train the same model with the same batch size, augmentation and precision, on a device and in a world that they
share. `frameworks` has those that one would write with a DataLoader.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from mnist_dist.data import Dataset
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.distributed.devices import choose_threads, device_name
from mnist_dist.distributed.launcher import check_size, launched_world
from mnist_dist.engine.cuda_graph import WARM_UP_STEPS, capture_cuda_graph
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import check_world, load_data
from mnist_dist.run.model_setup import build_module, to_device
from mnist_dist.run.provenance import git_commit, versions

PRECISIONS = {"no": "fp32", "bf16": "bf16"}
Step = Callable[..., object]


@dataclass(frozen=True)
class TimedLoop:
    name: str
    run: Callable[[int], float]
    """Trains so many more steps; returns the seconds they took, the device's work included."""
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class BenchmarkSetup:
    """What every loop is given."""

    recipe: Recipe
    precision: str
    dataset: Dataset
    state: PartialState

    @classmethod
    def prepare(cls, recipe: Recipe) -> BenchmarkSetup:
        """Reads the data, in the world that the launcher made.

        Raises:
            RecipeError: on all processes, for whatever this world, device or recipe lacks for a comparison.
        """
        state = launched_world()
        check_size(state)
        choose_threads(state)
        precision = check_world(recipe, state)
        if precision not in PRECISIONS:
            raise RecipeError([Problem("the recipe", "mixed_precision", "the benchmark compares fp32 and bf16 only")])
        if recipe.distill.teachers:
            what = 'the frameworks learn from labels alone; leave the teachers out: "distill={}"'
            raise RecipeError([recipe.problem("distill.from", what)])
        dataset = load_data(recipe, state)
        if recipe.batch_size > len(dataset.train):
            what = f"the frameworks drop short batches, and there are but {len(dataset.train):,} training images"
            raise RecipeError([recipe.problem("batch_size", what)])
        run_on_all_ranks(state, lambda: build_module(recipe, dataset))
        return cls(recipe, precision, dataset, state)

    def in_default_layout(self) -> BenchmarkSetup:
        """The same with PyTorch's own memory layout of images, which no tutorial changes."""
        engine = self.recipe.engine.model_copy(update={"channels_last": False})
        return replace(self, recipe=self.recipe.model_copy(update={"engine": engine}))

    def about(self) -> dict[str, Any]:
        """What was measured, where and with what, in plain values."""
        return {
            "recipe": self.recipe.name,
            "model": self.recipe.model.name,
            "batch_size": self.recipe.batch_size,
            "mixed_precision": self.precision,
            "world_size": self.state.num_processes,
            "device": device_name(self.state.device),
            "threads": torch.get_num_threads(),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "versions": versions() | {name: version(name) for name in ("lightning", "onnxruntime") if find_spec(name)},
            "git_commit": git_commit(),
        }

    @property
    def share(self) -> int:
        """Images of a global batch that a process computes."""
        return self.recipe.batch_size // self.state.num_processes

    @property
    def is_compiled(self) -> bool:
        """Whether the recipe has the network compiled."""
        return bool(self.recipe.compile)

    @property
    def is_captured(self) -> bool:
        """Whether the recipe has a step be one CUDA graph, here: a world of several brings calls of its own into it."""
        asked = self.recipe.engine.capture != "off"
        return asked and self.state.device.type == "cuda" and self.state.num_processes == 1

    def module(self) -> nn.Module:
        """A network with its initial weights, on the device, in the recipe's memory layout."""
        module = build_module(self.recipe, self.dataset)
        return to_device(module, self.state.device, channels_last=self.recipe.engine.channels_last)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """The recipe's, at a constant rate."""
        recipe = self.recipe.optimizer
        return build_optimizer(module.parameters(), recipe.name, lr=recipe.lr or 0.01, **recipe.keywords)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.state.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels, label_smoothing=self.recipe.label_smoothing)

    def wait(self) -> None:
        """Until the device has done its work."""
        if self.state.device.type == "cuda":
            torch.cuda.synchronize(self.state.device)

    def time(self, step: Step, source: Iterator[Any], steps: int) -> float:
        """Seconds of so many steps, each given the next batch of `source`."""
        started = time.perf_counter()
        for _ in range(steps):
            step(*next(source))
        self.wait()
        return time.perf_counter() - started

    def peer(self, name: str, step: Step, source: Iterator[Any]) -> TimedLoop:
        """A loop that promises no bytes, so is free in its kernels."""
        return TimedLoop(name, fastest_kernels()(lambda steps: self.time(step, source, steps)))


def median_and_range(values: list[float], digits: int) -> dict[str, float]:
    """Median, lowest and highest."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def bare_step(task: BenchmarkSetup) -> TimedLoop:
    """Forward, loss, backward and optimizer on one fixed batch that lies on the device: the limit of any trainer.

    Compiled, or captured as one CUDA graph, where the recipe's own step is.
    """
    data, device = task.dataset.train[slice(task.share)], task.state.device
    step = partial(plain_step(task, is_limit=True), data.normalize(data.images).to(device), data.labels.to(device))
    once = captured(step) if task.is_captured else step
    return TimedLoop("bare step", lambda steps: task.time(once, itertools.repeat(()), steps))


def tensor_loop(task: BenchmarkSetup) -> TimedLoop:
    """A plain loop fed from tensors on the device, with our batched augmentation: what is left is the loop itself."""
    state, data, size = task.state, task.dataset.train.to(task.state.device), task.recipe.batch_size
    augmentation, device = task.recipe.data.augment.build(), task.state.device
    shuffle = torch.Generator(device).manual_seed(task.recipe.seed)  # the same order in all processes

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(data), generator=shuffle, device=device)
            for rows in order[: len(data) // size * size].view(-1, size)[:, state.process_index :: state.num_processes]:
                batch = data.images[rows].float()
                if not augmentation.is_identity:
                    side = batch.shape[-1]
                    draws = torch.rand(len(rows), augmentation.count_draws(side), device=device)
                    batch = augmentation.apply(batch, augmentation.warps(draws, side))
                yield data.normalize(batch), data.labels[rows]

    return task.peer("plain loop, device tensors", plain_step(task), batches())


def plain_step(task: BenchmarkSetup, *, is_limit: bool = False) -> Step:
    """(images, labels) -> one update of a network of its own, data parallel in a world of several processes.

    Args:
        is_limit: compile the network, or prepare for capture, where the recipe does.
    """
    module = task.module()
    optimizer, parameters = task.optimizer(module), list(module.parameters())
    for group in optimizer.param_groups:
        if "capturable" in group and is_limit:
            group["capturable"] = task.is_captured
    if task.state.num_processes > 1:
        devices = None if task.state.device.type == "cpu" else [task.state.device]
        module = nn.parallel.DistributedDataParallel(module, device_ids=devices)
    network: Any = torch.compile(module) if is_limit and task.is_compiled else module

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        with task.autocast():
            loss = task.loss(network(images), labels)
        loss.backward()
        if task.recipe.clip_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, task.recipe.clip_grad_norm)
        optimizer.step()

    return step


def captured(call: Step) -> Callable[[], None]:
    """A CUDA graph of `call`, which uses the same memory each time; made as PyTorch's notes on CUDA semantics ask."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    return capture_cuda_graph(call, stream)


@contextmanager
def fastest_kernels() -> Iterator[None]:
    """Kernels chosen by trial, as PyTorch's tuning guide advises: who promises no bytes shall not pay for them."""
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = benchmark
