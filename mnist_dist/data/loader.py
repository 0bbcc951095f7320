"""Loads batches: gathers the images of a process's rows and draws their random changes."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from mnist_dist.data.batches import CHUNK, Batch, Batches, EpochPlan
from mnist_dist.data.images import Images
from mnist_dist.data.store import is_memory_mapped, read_ahead

BLOCK_BYTES = 2**26
"""Size of the normalised images that are prepared at once on a GPU, if that is more than one batch."""


@dataclass(frozen=True)
class _Ahead:
    """The images and labels of the next batch, which a thread gathers."""

    batches: Batches
    epoch: int
    index: int
    future: Future[tuple[Tensor, Tensor, Tensor]]
    """The order of the epoch, images and labels."""


class Loader:
    """Gathers the batches of one process.

    If the device is the CPU, images are gathered when they are asked for. Images on a GPU are gathered, changed and
    normalised for several batches at once: a small batch needs as many kernels as a large one, and the launch of a
    kernel takes longer than its work. Images in host memory or on disk, for a GPU, are gathered by a thread, one batch
    ahead: the order is a pure function, so the next rows are always known. They are copied from pinned memory on a
    stream of their own, so neither the host nor the network waits for them.

    Random changes are drawn on the device for several batches at once, because drawing them for one small batch costs
    nearly as much. They are equal wherever the images lie.

    Args:
        data: images and labels, both on the device or both on the CPU.
        positions: returns the positions that this process computes in a global batch of a given size.
        device: where the batches are used; None: where the labels lie.
        ahead: whether a thread gathers the next batch. Must be True if `device` is not that of the images.
    """

    def __init__(
        self,
        data: Images,
        positions: Callable[[int], range],
        device: torch.device | None = None,
        ahead: bool = False,
    ):
        self.data, self._positions, self._device = data, positions, device or data.labels.device
        self._order: tuple[Tensor, Tensor] | None = None
        """The newest order, and its copy on the device."""
        self._block: tuple[Batches, EpochPlan, int, list[Tensor | None]] | None = None
        """Batches, plan and first index of the newest block of random changes, and the changes of its batches."""
        self.prepares = not ahead and self._device.type != "cpu"
        """Whether batches are prepared: see `Batch.is_prepared`."""
        self._prepared: tuple[Batches, EpochPlan, int, list[Batch]] | None = None
        """Batches, plan and first index of the newest block of prepared batches, and these."""
        self._thread = ThreadPoolExecutor(1, "loader") if ahead else None
        self._ahead: _Ahead | None = None
        self._is_mapped = ahead and data.images.is_contiguous() and is_memory_mapped(data.images)
        self._stream = torch.cuda.Stream(self._device) if ahead and self._device.type == "cuda" else None

    def load(self, batches: Batches, plan: EpochPlan, index: int) -> Batch:
        """Returns this process's part of global batch `index`."""
        if self.prepares:
            return self._prepare(batches, plan, index)
        size = batches.size(index)
        positions, order = self._positions(size), self._order_on_device(plan.order)
        images, labels = self._fetch(batches, plan, index)
        batch = Batch(size, positions.start, images, labels, self._changes(batches, plan, order, index))
        return replace(batch[1:], start=positions.start, partner=batch[:-1]) if batches.mixes else batch

    def _prepare(self, batches: Batches, plan: EpochPlan, index: int) -> Batch:
        """Returns a prepared batch; prepares the next ones too."""
        images, positions = self.data.images, self._positions(batches.batch_size)
        count = max(1, BLOCK_BYTES // (4 * images[:1].numel() * max(1, len(positions))))
        first = index - index % count
        if self._prepared is None or not _is_same(self._prepared[:3], (batches, plan, first)):
            indices = range(first, min(first + count, batches.steps_per_epoch))
            self._prepared = (batches, plan, first, self._prepare_block(batches, plan, indices))
        return self._prepared[3][index - first]

    def _prepare_block(self, batches: Batches, plan: EpochPlan, indices: range) -> list[Batch]:
        """Returns this process's parts of several global batches, gathered, changed and normalised together."""
        order = self._order_on_device(plan.order)
        counts = [len(self._positions(batches.size(each))) for each in indices]
        rows = torch.cat([self._rows(batches, order, each) for each in indices])
        changes = batches.changes(plan.epoch, rows)
        block = Batch(len(rows), 0, self.data.images[rows], self.data.labels[rows], changes)
        block = replace(block, images=batches.augmented(block))
        if batches.mixes:
            block = batches.mixed(*_own_and_partners(block, counts), len(self.data.classes))
        block = replace(block, images=self.data.normalize(block.images), changes=None)
        ends = accumulate(counts)
        return [
            replace(block[end - count : end], size=batches.size(each), start=self._positions(batches.size(each)).start)
            for each, count, end in zip(indices, counts, ends, strict=True)
        ]

    # --- images and labels --------------------------------------------------------------------------------------------

    def _fetch(self, batches: Batches, plan: EpochPlan, index: int) -> tuple[Tensor, Tensor]:
        if self._thread is None:
            return self._gather(self._rows(batches, self._order_on_device(plan.order), index))
        ahead, self._ahead = self._ahead, None
        found = None
        if ahead and (ahead.batches, ahead.epoch, ahead.index) == (batches, plan.epoch, index):
            order, *found = ahead.future.result()
            if order is not plan.order and not torch.equal(order, plan.order):
                found = None
        images, labels = found or self._thread.submit(self._gather_rows, batches, plan, index).result()[1:]
        self._wait_for_copies(images, labels)
        self._gather_ahead(batches, plan, index)
        return images, labels

    def _gather_ahead(self, batches: Batches, plan: EpochPlan, index: int) -> None:
        """Starts to gather the batch after batch `index`."""
        assert self._thread is not None
        if index + 1 < batches.steps_per_epoch:
            future = self._thread.submit(self._gather_rows, batches, plan, index + 1)
            self._ahead = _Ahead(batches, plan.epoch, index + 1, future)
        else:
            first = self._thread.submit(lambda: self._gather_rows(batches, batches.plan(plan.epoch + 1), 0))
            self._ahead = _Ahead(batches, plan.epoch + 1, 0, first)

    def _gather_rows(self, batches: Batches, plan: EpochPlan, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return plan.order, *self._gather(self._rows(batches, plan.order, index))

    def _rows(self, batches: Batches, order: Tensor, index: int) -> Tensor:
        """Returns the sample indices of this process's part of a batch; with mixing, a partner precedes them."""
        rows = batches.rows_with_partner if batches.mixes else batches.rows_at
        return rows(order, index, self._positions(batches.size(index)))

    def _gather(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        images, labels = self.data.images, self.data.labels
        if self._is_mapped:
            read_ahead(images, rows)
        if self._stream is None:
            return images[rows].to(self._device), labels[rows].to(self._device)
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            return self._copy(images, rows), self._copy(labels, rows)

    def _copy(self, source: Tensor, rows: Tensor) -> Tensor:
        """Copies rows to the GPU. PyTorch keeps the pinned memory until the copy is done, then uses it again."""
        pinned = torch.empty((len(rows), *source.shape[1:]), dtype=source.dtype, pin_memory=True)
        return torch.index_select(source, 0, rows, out=pinned).to(self._device, non_blocking=True)

    def _wait_for_copies(self, *tensors: Tensor) -> None:
        """Makes the device wait for the copies of the thread."""
        if self._stream is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(self._stream)
            for tensor in tensors:
                tensor.record_stream(current)  # its memory may be used again only after the step

    # --- order and random changes -------------------------------------------------------------------------------------

    def _order_on_device(self, order: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return order
        if self._order is None or self._order[0] is not order:
            # The host need not wait for a copy from pinned memory.
            pinned = order.pin_memory() if torch.cuda.is_available() else order
            self._order = (order, pinned.to(self._device, non_blocking=True))
        return self._order[1]

    def _changes(self, batches: Batches, plan: EpochPlan, order: Tensor, index: int) -> Tensor | None:
        """Returns the random changes of this process's part of a batch; draws those of the next batches too."""
        count = max(1, CHUNK // max(1, len(self._positions(batches.batch_size))))
        first = index - index % count
        if self._block is None or not _is_same(self._block[:3], (batches, plan, first)):
            indices = range(first, min(first + count, batches.steps_per_epoch))
            rows = [self._rows(batches, order, each) for each in indices]
            changes = batches.changes(plan.epoch, torch.cat(rows))
            parts = [None] * len(rows) if changes is None else list(changes.split([len(each) for each in rows]))
            self._block = (batches, plan, first, parts)
        return self._block[3][index - first]


def _is_same(one: tuple[Batches, EpochPlan, int], other: tuple[Batches, EpochPlan, int]) -> bool:
    plans = one[1].epoch == other[1].epoch and one[1].order is other[1].order
    return plans and one[0] == other[0] and one[2] == other[2]


def _own_and_partners(block: Batch, counts: list[int]) -> tuple[Batch, Batch]:
    """Divides a block of several parts, each after the partner of its first sample, into samples and their partners."""
    parts, end = [], 0
    for count in counts:
        start, end = end, end + count + bool(count)  # an empty part has no partner
        parts.append(block[start:end])
    return Batch.join([part[1:] for part in parts]), Batch.join([part[: max(0, len(part) - 1)] for part in parts])
