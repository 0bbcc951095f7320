"""Counts what a training step asks of a GPU: kernels, waits of the host, copies to the device. Needs no GPU.

PyTorch's fake tensors have a device, a dtype and a shape, but no content. The trainer's step and the bare step run on
fake CUDA tensors while every operation is counted. The trainer's step is the one that `run.build` builds.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.utils._foreach_utils as foreach_utils
from rich.table import Table
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.optim import optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_dist.benchmark.baselines import BenchmarkSetup, plain_step
from mnist_dist.data import Dataset, Images
from mnist_dist.data.sources import SHAPES
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.errors import RecipeError
from mnist_dist.models import build_model
from mnist_dist.recipe.schema import Recipe
from mnist_dist.run.build import build_components
from mnist_dist.run.model_trial import to_device
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.run.tables import markdown_table, table_console

GPU = torch.device("cuda", 0)
WORLD_SIZES = (1, 2)
LARGEST_EXTRA = {"step": 12, "augmentation": 8, "average": 3}
"""Launches that the trainer's step may have more than the bare step, and more again with either feature."""
SAMPLES = 60_000
"""Of an epoch; several times as many as the batches that are loaded together."""

# --- counting -----------------------------------------------------------------------------------------------------


@dataclass
class Operations:
    """What a part of the training asked of the device."""

    launches: float = 0
    """Kernels. An operation on a list of tensors counts once if PyTorch has one kernel for the list."""
    syncs: float = 0
    """Waits of the host for the device."""
    copies: float = 0
    """Copies from the host to the device."""

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.launches + other.launches, self.syncs + other.syncs, self.copies + other.copies)

    def per(self, steps: int) -> Operations:
        """Returns the mean of a number of steps, rounded."""
        return Operations(*(round(each / steps, 2) for each in asdict(self).values()))


ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "detach")
"""Operations without a kernel that are no views."""


class OperationCounter(TorchDispatchMode):
    """Counts the operations on CUDA tensors in its context. A value that the host reads is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.found = Operations()
        self.names: list[str] = []
        """Names of the operations that launch a kernel, wait or copy, in order."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            self._count("read of a value", Operations(syncs=1) if _on_gpu(args) else Operations())
            return False if args[0].dtype == torch.bool else 1
        # The optimizers' kernels work in place, and PyTorch does not know all of them for fake tensors.
        result = None if function.name().startswith("aten::_fused") else function(*args, **kwargs)
        self._count(function.name(), _cost(function, args, kwargs, result))
        return result

    def _count(self, name: str, cost: Operations) -> None:
        if any(asdict(cost).values()):
            self.found += cost
            self.names.append(name)


def _cost(function: Any, args: Any, kwargs: Any, result: Any) -> Operations:
    """Returns what an operation asks of the device."""
    name, namespace = function._schema.name.partition("::")[2], function.namespace
    if namespace in ("prim", "profiler") or function.is_view or name in ALLOCATIONS:
        return Operations()
    inputs = list(_tensors((args, kwargs)))
    target = args[0] if name == "copy_" else result
    if name in ("copy_", "_to_copy") and (args[1] if name == "copy_" else args[0]).device != target.device:
        waits = target.device.type == "cpu" and not (kwargs.get("non_blocking") or args[2:3] == (True,))
        return Operations(syncs=int(waits), copies=int(target.device.type != "cpu"))
    if not any(each.device.type == "cuda" for each in [*inputs, *_tensors(result)]):
        return Operations()
    if name.startswith(("_foreach", "_fused")) and not _has_one_kernel(args):
        return Operations(launches=len(args[0]))
    return Operations(launches=1)


def _has_one_kernel(args: Any) -> bool:
    """Returns whether PyTorch updates lists of tensors in one kernel: same types, and layouts that match across lists."""
    lists = [each for each in args if isinstance(each, list | tuple) and each and isinstance(each[0], Tensor)]
    if len({each.dtype for part in lists[:2] for each in part}) > 1:
        return False
    return all(
        each.shape == first.shape and each.stride() == first.stride()
        for part in lists[1:2]
        for first, each in zip(lists[0], part, strict=False)
    )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors(each)


def _on_gpu(args: Any) -> bool:
    return any(each.device.type == "cuda" for each in _tensors(args))


class PythonBackward(TorchFunctionMode):
    """Computes `Tensor.backward` in Python, because PyTorch's engine needs the driver for a CUDA tensor."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is Tensor.backward:
            return _backward(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@torch.no_grad()
def _backward(loss: Tensor, gradient: Tensor | None = None, **_: Any) -> None:
    """Adds the gradients of a scalar to `grad` of its parameters, in the order of the graph."""
    root: Any = loss.grad_fn
    waiting, found = {}, [root]
    for node in found:
        for successor, _ in node.next_functions:
            if successor is not None:
                if successor not in waiting:
                    found.append(successor)
                waiting[successor] = waiting.get(successor, 0) + 1
    gradients: dict[Any, dict[int, Tensor]] = {root: {0: torch.ones_like(loss) if gradient is None else gradient}}
    ready = [root]
    while ready:
        node = ready.pop()
        results = _apply(node, gradients.pop(node, {}))
        for (successor, slot), result in zip(node.next_functions, results, strict=False):
            if successor is None:
                continue
            if result is not None:
                slots = gradients.setdefault(successor, {})
                slots[slot] = slots[slot] + result if slot in slots else result
            waiting[successor] -= 1
            if not waiting[successor]:
                ready.append(successor)


def _apply(node: Any, gradients: dict[int, Tensor]) -> tuple[Tensor | None, ...]:
    """Returns the gradients of a node's inputs; for a parameter, adds to its `grad` and returns nothing."""
    shapes = [each.shape for each in node._input_metadata]
    values = [
        value if (value := gradients.get(slot)) is None or value.shape == shape else value.sum_to_size(shape)
        for slot, shape in enumerate(shapes)
    ]
    if hasattr(node, "variable"):
        parameter = node.variable
        parameter.grad = values[0] if parameter.grad is None else parameter.grad + values[0]
        for hook in (parameter._post_accumulate_grad_hooks or {}).values():
            hook(parameter)
        return ()
    is_python = isinstance(node, torch.autograd.function.BackwardCFunction)
    results = (node.apply if is_python else node)(*values)
    return results if isinstance(results, tuple) else (results,)


# --- the two steps ------------------------------------------------------------------------------------------------


class _FakeMode(FakeTensorMode):
    def __deepcopy__(self, memo: Any) -> _FakeMode:
        return self  # averaged weights start as a deep copy, which must belong to the same mode


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Makes CUDA tensors possible without a GPU inside the context; they have no content."""
    supported: Any = [foreach_utils._foreach_supported_types, torch_optimizer._foreach_supported_types]
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    for types in supported:  # else PyTorch would update fake tensors one by one
        types.append(FakeTensor)
    try:
        with _FakeMode(allow_non_fake_inputs=True), PythonBackward():
            yield
    finally:
        for types in supported:
            types.remove(FakeTensor)
        torch.use_deterministic_algorithms(before[0], warn_only=True)
        torch.backends.cudnn.benchmark = before[1]


class FakeAccelerator:
    """Stands in for the Accelerator of one of several processes with a GPU each, in fp32.

    The reduction of gradients over the processes is left out, here and in the bare step.
    """

    device, scaler, is_main_process, process_index, mixed_precision = GPU, None, True, 0, "no"

    def __init__(self, world_size: int):
        self.num_processes = world_size

    def prepare_model(self, model: nn.Module, **_: Any) -> nn.Module:
        """Returns the network as it is."""
        return model

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def autocast(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def backward(self, loss: Tensor, **keywords: Any) -> None:
        """Computes the gradients."""
        loss.backward(**keywords)

    def clip_grad_norm_(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        """Clips the gradients as Accelerate does."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)


class _Setup(BenchmarkSetup):
    def module(self) -> nn.Module:
        # Built without the fake mode: `Module.to` can make real parameters fake, but cannot move fake ones.
        with unset_fake_temporarily():
            module = _module(self.recipe)
        return to_device(module, GPU, channels_last=self.recipe.engine.channels_last)


def _module(recipe: Recipe) -> nn.Module:
    return build_model(recipe.model.name, **recipe.model.keywords).train()


def _images(recipe: Recipe) -> Images:
    """Returns images without content. The shape of a set of one's own images is not known: it counts as MNIST's."""
    shape = SHAPES.get(recipe.data.dataset, SHAPES["mnist"])
    images, labels = torch.zeros(SAMPLES, *shape, dtype=torch.uint8), torch.zeros(SAMPLES, dtype=torch.int64)
    statistics = (0.1,) * shape[0], (0.3,) * shape[0]
    return Images(images, labels, tuple("0123456789"), *statistics)


def count_bare_step(recipe: Recipe, world_size: int) -> OperationCounter:
    """Counts one bare step on a process's share of the batch, without the reduction over the processes."""
    with fake_gpu():
        data = _images(recipe)
        setup = _Setup(recipe, "no", Dataset(data, data, data), SimpleNamespace(device=GPU, num_processes=1))  # type: ignore[arg-type]  # stands in for PartialState
        step = plain_step(setup, is_limit=True)
        share = recipe.batch_size // world_size
        images = torch.zeros(share, *data.shape, device=GPU)
        labels = torch.zeros(share, dtype=torch.int64, device=GPU)
        with OperationCounter():
            step(images, labels)  # allocates the optimizer's state
        with OperationCounter() as counter:
            step(images, labels)
    return counter


def count_trainer_step(recipe: Recipe, world_size: int) -> tuple[Operations, OperationCounter]:
    """Counts the trainer's steps.

    Returns:
        The mean over an epoch, and the counter of one step without the loading of its batch.
    """
    module = _module(recipe)
    with fake_gpu():
        accelerator: Any = FakeAccelerator(world_size)
        with OperationCounter():  # building may read values, which fake tensors do not have
            step = build_components(recipe, "no", _images(recipe), module, accelerator=accelerator).update
            assert isinstance(step, TrainStep)
            step.seeds_itself = False  # the seed is set on the host
            plan = step.batches.plan(0)
            step.compute(step.load(plan, 0), 0)  # allocates the optimizer's state
        steps = step.batches.steps_per_epoch
        step.load(plan, steps - 1)  # the order of the epoch is on the device now, and the first batches are not
        with OperationCounter() as loading:
            batches = [step.load(plan, index) for index in range(steps)]
        with OperationCounter() as counter:
            step.compute(batches[0], 1)
    return loading.found.per(steps) + counter.found, counter


# --- results ------------------------------------------------------------------------------------------------------


def count(recipe: Recipe, world_size: int) -> dict[str, Any]:
    """Returns the operations of the bare step and of the trainer's step, as plain values.

    The recipe is counted in fp32, without teachers, compilation and capture, with its images on the device.
    """
    engine = recipe.engine.model_copy(update={"capture": "off"})
    data = recipe.data.model_copy(update={"place": "device"})
    changes = {"engine": engine, "data": data, "compile": False, "mixed_precision": "no", "logical_shards": None}
    recipe = recipe.model_copy(update=changes)
    bare = count_bare_step(recipe, world_size)
    trainer, step = count_trainer_step(recipe, world_size)
    allowed = bare.found.launches + LARGEST_EXTRA["step"]
    allowed += LARGEST_EXTRA["augmentation"] * (not recipe.data.augment.build().is_identity)
    allowed += LARGEST_EXTRA["average"] * (recipe.ema_decay is not None)
    return {
        "recipe": recipe.name,
        "world_size": world_size,
        "batch_size": recipe.batch_size,
        "optimizer": recipe.optimizer.name,
        "bare_step": asdict(bare.found),
        "mnist_dist": asdict(trainer),
        "launches_allowed": allowed,
        "names": step.names,
        "bare_names": bare.names,
    }
