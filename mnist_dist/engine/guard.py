"""Finds gradients that are not finite, and undoes what such a step wrote into buffers and counters."""

from __future__ import annotations

import torch
from torch import Tensor

# Tensors are written in place and never replaced: a replayed step addresses them by their memory.

ALIGNMENT = 16
"""Bytes; the kernels of a GPU read vectors of this size."""


class Guard:
    """Undoes a step whose gradient is not finite.

    Args:
        figures: the counters that a step changes, on the device; never saved as a tensor.
        buffers: the network's buffers, of any dtypes, on the same device.
        stays_set: whether all steps after a bad one count as bad, until `take`.
        joins: whether the memory of the tensors is moved into one block for each dtype of the buffers. The tensors stay
            the same objects. On a GPU, a kernel for each of many tensors takes longer than its work. None: on a GPU.
    """

    def __init__(self, figures: Tensor, buffers: list[Tensor], *, stays_set: bool, joins: bool | None = None):
        device = figures.device
        self._stays_set = stays_set
        joins = device.type != "cpu" if joins is None else joins
        self._tensors = _join(figures, buffers) if joins else [figures, *buffers]
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


@torch.no_grad()
def _join(figures: Tensor, buffers: list[Tensor]) -> list[Tensor]:
    """Moves the memory of tensors into blocks; returns the blocks as int64."""
    # `torch.save` refuses tensors of two dtypes in one block. The figures are not saved, so any block may hold them.
    dtypes = list(dict.fromkeys(each.dtype for each in buffers))
    groups = [[each for each in buffers if each.dtype == dtype] for dtype in dtypes] or [[]]
    groups[0].append(figures)
    blocks = []
    for group in groups:
        sizes = [-(-each.nbytes // ALIGNMENT) * ALIGNMENT for each in group]
        block = torch.zeros(sum(sizes), dtype=torch.uint8, device=figures.device)
        for tensor, piece in zip(group, block.split(sizes), strict=True):
            strides = torch.empty_like(tensor, device="meta").stride()  # those of dense memory
            view = piece.view(tensor.dtype).as_strided(tensor.shape, strides)
            view.copy_(tensor)
            tensor.data = view
        blocks.append(block.view(torch.int64))
    return blocks
