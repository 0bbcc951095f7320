"""Loads batches: gathers the images of a process's rows and draws their random changes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mnist_dist.data.batches import CHUNK, Batch, Batches, EpochPlan
from mnist_dist.data.images import Images


class Loader:
    """Gathers the batches of one process from images on the device.

    Random changes are drawn for several batches at once, because drawing them for one small batch costs nearly as much.

    Args:
        data: images and labels on the device.
        positions: returns the positions that this process computes in a global batch of a given size.
    """

    def __init__(self, data: Images, positions: Callable[[int], range]):
        self.data, self._positions = data, positions
        self._order: tuple[Tensor, Tensor] | None = None
        """The newest order, and its copy on the device."""
        self._block: tuple[Batches, EpochPlan, int, list[Tensor | None]] | None = None
        """Batches, plan and first index of the newest block of random changes, and the changes of its batches."""

    def load(self, batches: Batches, plan: EpochPlan, index: int) -> Batch:
        """Returns this process's part of global batch `index`."""
        size = batches.size(index)
        positions, order = self._positions(size), self._order_on_device(plan.order)
        rows = batches.rows_at(order, index, positions)
        changes = self._changes(batches, plan, order, index)
        return Batch(size, positions.start, self.data.images[rows], self.data.labels[rows], changes)

    def _order_on_device(self, order: Tensor) -> Tensor:
        device = self.data.labels.device
        if device.type == "cpu":
            return order
        if self._order is None or self._order[0] is not order:
            pinned = (
                order.pin_memory() if torch.cuda.is_available() else order
            )  # a copy that the host need not wait for
            self._order = (order, pinned.to(device, non_blocking=True))
        return self._order[1]

    def _changes(self, batches: Batches, plan: EpochPlan, order: Tensor, index: int) -> Tensor | None:
        """Returns the random changes of this process's part of a batch; draws those of the next batches too."""
        count = max(1, CHUNK // max(1, len(self._positions(batches.batch_size))))
        first = index - index % count
        if self._block is None or not _is_same(self._block[:3], (batches, plan, first)):
            indices = range(first, min(first + count, batches.steps_per_epoch))
            rows = [batches.rows_at(order, each, self._positions(batches.size(each))) for each in indices]
            changes = batches.changes(plan.epoch, torch.cat(rows))
            parts = [None] * len(rows) if changes is None else list(changes.split([len(each) for each in rows]))
            self._block = (batches, plan, first, parts)
        return self._block[3][index - first]


def _is_same(one: tuple[Batches, EpochPlan, int], other: tuple[Batches, EpochPlan, int]) -> bool:
    plans = one[1].epoch == other[1].epoch and one[1].order is other[1].order
    return plans and one[0] == other[0] and one[2] == other[2]
