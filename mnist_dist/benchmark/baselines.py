"""Defines the setup of all timed loops, and the two baselines without a DataLoader: the bare step and the tensor loop.

Every loop trains the same model with the same batch size, augmentation and precision, on the same device and in the
same process group. The loops that use a DataLoader are in `frameworks`.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from functools import cached_property, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn

from mnist_dist.data import Dataset
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.distributed.devices import device_name, share_cores, synchronize
from mnist_dist.distributed.gradients import FlatGradients, GradientClock
from mnist_dist.distributed.launcher import check_size, launched_world
from mnist_dist.engine.cuda_graph import WARM_UP_STEPS, capture_cuda_graph
from mnist_dist.engine.optimizers import build_optimizer
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import check_fit, check_world, class_weights
from mnist_dist.run.data import load_data
from mnist_dist.run.model_setup import build_module, prepare_model
from mnist_dist.run.model_trial import to_device
from mnist_dist.run.provenance import git_commit, versions

COMPARED_PRECISIONS = ("no", "bf16")
"""Value of `mixed_precision` that the benchmark measures -> its name in tables."""
DDP_STEP = "bare step, DistributedDataParallel"
"""Name of a timed loop of several processes."""
Step = Callable[..., object]

# --- the setup ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimedLoop:
    """A training loop that the benchmark times."""

    name: str
    run: Callable[[int], float]
    """Makes this number of further steps; returns their duration in seconds, including the work of the device."""
    close: Callable[[], object] = lambda: None


@dataclass(frozen=True)
class BenchmarkSetup:
    """The recipe, data and process group that every timed loop uses."""

    recipe: Recipe
    precision: str
    """One of `COMPARED_PRECISIONS`."""
    dataset: Dataset
    state: PartialState

    @classmethod
    def prepare(cls, recipe: Recipe) -> BenchmarkSetup:
        """Checks the recipe against the launched processes and reads the data. Collective: call on every rank.

        Raises:
            RecipeError: on all ranks, if this device or process group cannot run the recipe, or the frameworks cannot
                train it.
        """
        state = launched_world()
        check_size(state)
        share_cores(state)
        precision = check_world(recipe, state)
        if precision not in COMPARED_PRECISIONS:
            problem = recipe.problem if recipe.mixed_precision else partial(Problem, "the launcher")
            message = f"the benchmark compares fp32 and bf16 only, not {precision}; use mixed_precision=no or bf16"
            raise RecipeError([problem("mixed_precision", message, "unsupported")])
        if recipe.distill.teachers:
            message = 'the frameworks learn from labels alone; remove the teachers: "distill={}"'
            raise RecipeError([recipe.problem("distill.from", message, "unsupported")])
        if mixes := [name for name in ("mixup", "cutmix") if getattr(recipe.data.augment, name)]:
            message = "the other loops augment single images and cannot mix two; set this key to 0"
            raise RecipeError([recipe.problem(f"data.augment.{name}", message, "unsupported") for name in mixes])
        dataset = load_data(recipe, state)
        if recipe.batch_size > len(dataset.train):
            message = (
                f"the frameworks drop an incomplete batch, so a batch must not exceed the {len(dataset.train):,} "
                "training images"
            )
            raise RecipeError([recipe.problem("batch_size", message, "conflict")])
        check_fit(recipe, dataset.train)
        prepared = run_on_all_ranks(state, lambda: prepare_model(recipe, dataset, state.num_processes, state.device))
        return cls(prepared.recipe, precision, dataset, state)

    def in_default_layout(self) -> BenchmarkSetup:
        """Returns the same setup with PyTorch's default memory layout of images, which tutorials use."""
        engine = self.recipe.engine.model_copy(update={"channels_last": False})
        return replace(self, recipe=self.recipe.model_copy(update={"engine": engine}))

    def about(self) -> dict[str, Any]:
        """Returns the recipe, machine, date and versions of a measurement as plain values."""
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
    def local_batch_size(self) -> int:
        """Images of a global batch that one process computes."""
        return self.recipe.batch_size // self.state.num_processes

    @property
    def is_compiled(self) -> bool:
        """Whether the recipe compiles the network."""
        return bool(self.recipe.compile)

    @property
    def is_captured(self) -> bool:
        """Whether the bare step is captured as one CUDA graph: the recipe captures steps, and the device is a GPU."""
        return self.recipe.engine.capture != "off" and self.state.device.type == "cuda"

    def module(self) -> nn.Module:
        """Builds the network with its initial weights, on the device, in the recipe's memory layout."""
        module = build_module(self.recipe, self.dataset)
        return to_device(module, self.state.device, channels_last=self.recipe.engine.channels_last)

    def optimizer(self, module: nn.Module) -> torch.optim.Optimizer:
        """Builds the recipe's optimizer with a constant learning rate."""
        recipe = self.recipe.optimizer
        return build_optimizer(module, recipe.name, lr=recipe.lr or 0.01, **recipe.keywords)

    def autocast(self) -> torch.autocast:
        """Returns the context in which a forward pass runs in the setup's precision."""
        return torch.autocast(self.state.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    @cached_property
    def class_weights(self) -> Tensor | None:
        """Weight of each class in the loss, float32 on the device; None: all 1."""
        weights = class_weights(self.recipe, self.dataset.train)
        return None if weights is None else torch.tensor(weights, device=self.state.device)

    def loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Returns the recipe's mean cross entropy of logits (n, classes) and labels int64 (n,)."""
        smoothing = self.recipe.label_smoothing
        return F.cross_entropy(logits, labels, weight=self.class_weights, label_smoothing=smoothing)

    def synchronize(self) -> None:
        """Waits until the device has finished its work."""
        synchronize(self.state.device)

    def time_steps(self, step: Step, batches: Iterator[Any], count: int) -> float:
        """Returns the seconds of `count` steps. Each step is called with the items of the next batch."""
        started = time.perf_counter()
        for _ in range(count):
            step(*next(batches))
        self.synchronize()
        return time.perf_counter() - started

    def baseline(self, name: str, step: Step, batches: Iterator[Any]) -> TimedLoop:
        """Returns a timed loop that may use the fastest kernels, because it need not be reproducible."""
        return TimedLoop(name, fastest_kernels()(lambda count: self.time_steps(step, batches, count)))


@contextmanager
def fastest_kernels() -> Iterator[None]:
    """Allows non-deterministic kernels and lets cuDNN choose by trial, as PyTorch's performance guide advises."""
    deterministic, benchmark = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        torch.backends.cudnn.benchmark = benchmark


def median_and_range(values: list[float], digits: int) -> dict[str, float]:
    """Returns the median, the minimum and the maximum, rounded."""
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


# --- baselines ----------------------------------------------------------------------------------------------------


def bare_step(setup: BenchmarkSetup, *, fastest: bool = False, with_ddp: bool = False) -> TimedLoop:
    """Builds the upper limit for any trainer: forward, loss, backward and optimizer on one fixed batch on the device.

    The step is compiled, or captured as one CUDA graph, if the recipe compiles or captures. Several processes sum their
    gradients as the trainer does.

    Args:
        fastest: use the fastest kernels instead of those that the recipe's `deterministic` chooses.
        with_ddp: make an eager step in which DistributedDataParallel sums the gradients, to compare the two sums.
    """
    data, device = setup.dataset.train[slice(setup.local_batch_size)], setup.state.device
    batch = data.normalize(data.images).to(device), data.labels.to(device)
    step = partial(plain_step(setup, is_limit=not with_ddp), *batch)
    with fastest_kernels() if fastest else nullcontext():  # a graph keeps the kernels of its capture
        once = captured(step) if setup.is_captured and not with_ddp else step
    if fastest:
        return setup.baseline("bare step, fastest kernels", once, itertools.repeat(()))
    name = DDP_STEP if with_ddp else "bare step"
    return TimedLoop(name, lambda count: setup.time_steps(once, itertools.repeat(()), count))


def tensor_loop(setup: BenchmarkSetup) -> TimedLoop:
    """Builds a plain loop that reads tensors on the device and uses the trainer's batched augmentation.

    Data and augmentation are the trainer's, so a difference in speed is due to the loop alone.
    """
    state, data, size = setup.state, setup.dataset.train.to(setup.state.device), setup.recipe.batch_size
    augmentation, device = setup.recipe.data.augment.build(), setup.state.device
    shuffle = torch.Generator(device).manual_seed(setup.recipe.seed)  # the same order on all ranks

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            order = torch.randperm(len(data), generator=shuffle, device=device)
            for rows in order[: len(data) // size * size].view(-1, size)[:, state.process_index :: state.num_processes]:
                batch = data.images[rows]
                if not augmentation.is_identity:
                    draws = torch.rand(len(rows), augmentation.count_draws(data.shape[1:]), device=device)
                    batch = augmentation.apply(batch, augmentation.changes(draws, data.shape[1:]))
                yield data.normalize(batch), data.labels[rows]

    return setup.baseline("plain loop, device tensors", plain_step(setup), batches())


def plain_step(setup: BenchmarkSetup, *, is_limit: bool = False) -> Step:
    """Builds a network and returns (images, labels) -> one update of it, the same on all processes.

    Args:
        is_limit: the step is that of `bare_step`. Compile the network, or prepare the optimizer for capture, if the
            recipe compiles or captures, and sum gradients as the trainer does, not with DistributedDataParallel.
    """
    module = setup.module()
    optimizer, parameters = setup.optimizer(module), list(module.parameters())
    for group in optimizer.param_groups:
        if "capturable" in group and is_limit:
            group["capturable"] = setup.is_captured
    backward: Callable[[Tensor], object] = Tensor.backward
    if setup.state.num_processes > 1 and is_limit:
        backward = _backward_with_sum(module, setup.state.num_processes)
    elif setup.state.num_processes > 1:
        devices = None if setup.state.device.type == "cpu" else [setup.state.device]
        module = nn.parallel.DistributedDataParallel(module, device_ids=devices)
    network: Any = torch.compile(module) if is_limit and setup.is_compiled else module

    def compute_loss(images: Tensor, labels: Tensor) -> Tensor:
        with setup.autocast():
            return setup.loss(network(images), labels)

    limit = setup.recipe.clip_grad_norm
    clip = None if limit is None else partial(nn.utils.clip_grad_norm_, parameters, limit)
    return training_step(optimizer, compute_loss, backward=backward, clip=clip)


def _backward_with_sum(module: nn.Module, world_size: int) -> Callable[[Tensor], object]:
    """Returns loss -> the mean of the loss's gradient over the processes, in the parameters."""
    reduction = FlatGradients(module, "none", allows_unused=False, clock=GradientClock())

    def backward(loss: Tensor) -> None:
        reduction.start()
        (loss / world_size).backward()
        reduction.finish()

    return backward


def training_step(
    optimizer: Any,
    compute_loss: Callable[[Tensor, Tensor], Tensor],
    *,
    backward: Callable[[Tensor], object] = Tensor.backward,
    clip: Callable[[], object] | None = None,
) -> Step:
    """Returns (images, labels) -> one update, in the order of PyTorch's tutorial.

    Args:
        optimizer: of the network's parameters.
        compute_loss: (images, labels) -> loss, a scalar.
        backward: computes the gradients of the loss.
        clip: clips the gradients; None for no clipping.
    """

    def step(images: Tensor, labels: Tensor) -> None:
        optimizer.zero_grad()
        backward(compute_loss(images, labels))
        if clip is not None:
            clip()
        optimizer.step()

    return step


def captured(call: Step) -> Callable[[], None]:
    """Captures `call` as a CUDA graph and returns its replay. `call` must use the same memory at every call.

    The replay keeps `call` and everything that `call` refers to.

    Warm-up and capture follow the notes on CUDA semantics in PyTorch's documentation.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP_STEPS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    replay = capture_cuda_graph(call, stream)

    def run(_kept: Step = call) -> None:  # a graph holds addresses; `call` holds the tensors at these addresses
        replay()

    return run
