"""Finds gradients that are not finite, and undoes what such a step wrote into weights, state, buffers and counters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from mnist_dist.distributed.fsdp import local_part

# Tensors are written in place and never replaced: a replayed step addresses them by their memory.

ALIGNMENT = 16
"""Bytes; the kernels of a GPU read vectors of this size."""


class Guard:
    """Undoes a step whose gradient is not finite.

    Args:
        figures: the counters that a step changes, on the device.
        buffers: the network's buffers, of any dtypes, on the same device.
        stays_set: whether all steps after a bad one count as bad, until `take`.
        joins: whether the memory of the tensors is moved into one block. The tensors stay the same objects. On a GPU, a
            kernel for each of many tensors takes longer than its work. None: on a GPU.
    """

    def __init__(self, figures: Tensor, buffers: list[Tensor], *, stays_set: bool, joins: bool | None = None):
        device = figures.device
        self._stays_set = stays_set
        joins = device.type != "cpu" if joins is None else joins
        tensors = [figures, *buffers]
        self._tensors = [_join(tensors)] if joins else tensors
        self._before = [torch.zeros_like(each) for each in self._tensors]
        self.bad = torch.zeros((), dtype=torch.bool, device=device)
        """Whether the latest step was bad."""
        self.found_inf = torch.zeros((), device=device)
        """1 if the latest step was bad, else 0, as fused optimizers read it. Set by `find_on_device` only."""
        self._one = torch.ones((), device=device)
        self._skipped = torch.zeros((), dtype=torch.int64, device=device)
        self._taken = 0

    @property
    def skipped(self) -> int:
        """Number of bad steps so far. Waits for the device."""
        return int(self._skipped)

    def store(self) -> None:
        """Stores the content of the tensors. Call it before a step."""
        torch._foreach_copy_(self._before, self._tensors)

    def find(self, norm: Tensor) -> None:
        """Sets `bad` if the norm of the gradient is not finite."""
        bad = ~torch.isfinite(norm)
        self.bad.copy_(self.bad | bad if self._stays_set else bad)

    def find_on_device(self, gradients: list[Tensor]) -> None:
        """Sets `bad` and `found_inf` if a gradient contains inf or NaN."""
        if not self._stays_set:
            self.found_inf.zero_()
        for dtype in {each.dtype for each in gradients}:  # one kernel reads all gradients of a dtype
            part = [each for each in gradients if each.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(part, self.found_inf, self._one)
        self.bad.copy_(self.found_inf)

    def undo(self) -> None:
        """If the step was bad, restores the stored content and counts the step as skipped."""
        self._skipped += self.bad
        for before, tensor in zip(self._before, self._tensors, strict=True):
            torch.where(self.bad, before, tensor, out=tensor)

    def take(self) -> int:
        """Returns the number of bad steps since the last call, and resets the flags. Waits for the device."""
        count, self._taken = self.skipped - self._taken, self.skipped
        self.bad.zero_()
        self.found_inf.zero_()
        return count


class UpdateGuard:
    """Undoes the update of an optimizer whose kernels cannot skip a bad gradient, without a wait for the device.

    It keeps a copy of the weights and of the optimizer's state, which must be on the device. The host waits for the
    device only after an update that creates state, as the first one does.
    """

    def __init__(self, optimizer: Optimizer):
        self._optimizer = optimizer
        self._state: dict[Any, dict[str, Any]] = {}
        """The optimizer's state before the update, with the same tensors."""
        self._tensors: list[Tensor] = []
        self._bits: list[Tensor] = []
        """The memory of `_tensors` as integers: NaN × 0 is not 0."""
        self._before: list[Tensor] = []

    @torch.no_grad()
    def store(self) -> None:
        """Stores weights and state. Call it before an update."""
        self._state = {parameter: dict(state) for parameter, state in self._optimizer.state.items()}
        weights = [parameter for group in self._optimizer.param_groups for parameter in group["params"]]
        values = [value for state in self._state.values() for value in state.values() if isinstance(value, Tensor)]
        tensors = [*weights, *values]
        if len(tensors) != len(self._tensors) or any(
            one is not other for one, other in zip(tensors, self._tensors, strict=True)
        ):
            self._tensors = tensors
            self._bits = [_as_integers(local_part(each)) for each in tensors]
            self._before = [torch.empty_like(each) for each in self._bits]
        torch._foreach_copy_(self._before, self._bits)

    @torch.no_grad()
    def undo(self, bad: Tensor) -> None:
        """Restores weights and state if the scalar `bad` is true. Call it after the update."""
        if not self._has_same_state():
            if bad:
                torch._foreach_copy_(self._bits, self._before)
                self._optimizer.state.clear()
                self._optimizer.state.update(self._state)
            return
        for dtype in {each.dtype for each in self._bits}:
            now, before = ([each for each in part if each.dtype == dtype] for part in (self._bits, self._before))
            change = torch._foreach_sub(before, now)
            torch._foreach_mul_(change, bad.to(dtype))
            torch._foreach_add_(now, change)

    def _has_same_state(self) -> bool:
        """Returns whether the optimizer's state consists of the objects that `store` has seen."""
        now = self._optimizer.state
        return now.keys() == self._state.keys() and all(
            now[parameter].keys() == before.keys()
            and all(now[parameter][key] is value for key, value in before.items())
            for parameter, before in self._state.items()
        )


def _as_integers(tensor: Tensor) -> Tensor:
    """Returns the memory of a tensor as integers of the same size."""
    return tensor.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.itemsize])


@torch.no_grad()
def _join(tensors: list[Tensor]) -> Tensor:
    """Moves the memory of tensors into one block; returns the block as int64."""
    sizes = [-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in tensors]
    block = torch.zeros(sum(sizes), dtype=torch.uint8, device=tensors[0].device)
    for tensor, piece in zip(tensors, block.split(sizes), strict=True):
        strides = torch.empty_like(tensor, device="meta").stride()  # those of dense memory
        view = _with_own_storage(piece).view(tensor.dtype).as_strided(tensor.shape, strides)
        view.copy_(tensor)
        tensor.data = view
    return block.view(torch.int64)


def _with_own_storage(piece: Tensor) -> Tensor:
    """Returns the same memory as a tensor of its own storage: `torch.save` refuses a storage of two dtypes."""
    start = piece.storage_offset()
    try:
        storage = piece.untyped_storage()[start : start + piece.nbytes]
    except NotImplementedError:  # a fake tensor, which has no memory
        return piece
    return torch.empty(0, dtype=piece.dtype, device=piece.device).set_(storage)
