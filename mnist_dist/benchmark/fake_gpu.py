"""Counts operations on CUDA tensors without a GPU.

PyTorch's fake tensors have a device, a dtype and a shape, but no content.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.utils._foreach_utils as foreach_utils
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import optimizer as torch_optimizer
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)

# --- counting -----------------------------------------------------------------------------------------------------


@dataclass
class Operations:
    """Counts of what a part of the training asks of the device."""

    launches: float = 0
    """Kernels. An operation on a list of tensors counts once if PyTorch has one kernel for the list."""
    syncs: float = 0
    """Waits of the host for the device."""
    copies: float = 0
    """Copies from the host to the device. For the trainer's step: per epoch, not per step."""

    def __add__(self, other: Operations) -> Operations:
        return Operations(self.launches + other.launches, self.syncs + other.syncs, self.copies + other.copies)

    def times(self, steps: int) -> Operations:
        """Returns the operations of this many equal steps."""
        return Operations(*(each * steps for each in asdict(self).values()))

    def per(self, steps: int) -> Operations:
        """Returns the mean per step of the operations of this many steps, rounded."""
        return Operations(*(round(each / steps, 2) for each in asdict(self).values()))


ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "lift_fresh", "detach")
"""Operations that launch no kernel, in addition to views."""


class OperationCounter(TorchDispatchMode):
    """Counts the operations on CUDA tensors in its context. The host reads every value as 1, or False for a bool."""

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
    """Returns whether PyTorch updates lists of tensors in one kernel: same types, and layouts that match."""
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
    waiting: dict[Any, int] = {}
    found = [root]
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


# --- the fake GPU -----------------------------------------------------------------------------------------------------


class _FakeMode(FakeTensorMode):
    def __deepcopy__(self, memo: Any) -> _FakeMode:
        return self  # averaged weights start as a deep copy, which must belong to the same mode


@contextmanager
def fake_gpu() -> Iterator[None]:
    """Allows CUDA tensors without a GPU inside the context. They have no content."""
    supported: Any = [foreach_utils._foreach_supported_types, torch_optimizer._foreach_supported_types]
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    for types in supported:  # else PyTorch would update fake tensors one by one
        types.append(FakeTensor)
    try:
        with warnings.catch_warnings(), _FakeMode(allow_non_fake_inputs=True), PythonBackward():
            warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
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
        """Returns the network unchanged."""
        return model

    def autocast(self) -> AbstractContextManager[None]:
        """Does nothing."""
        return nullcontext()

    def backward(self, loss: Tensor, **keywords: Any) -> None:
        """Computes the gradients."""
        loss.backward(**keywords)

    def clip_grad_norm_(self, parameters: list[Tensor], max_norm: float) -> Tensor:
        """Clips the gradients as Accelerate does."""
        return nn.utils.clip_grad_norm_(parameters, max_norm)
