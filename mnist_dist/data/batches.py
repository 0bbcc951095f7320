"""The samples of each step: the order of an epoch, its global batches, and the rows of each process.

Everything here is a pure function. (seed, epoch) determines the permutation of an epoch, the step determines the
global batch, (rank, world size) determines the rows of a process, and (seed, epoch, sample index) determines the random
numbers of a sample. A resume therefore needs no saved state, and no result depends on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mnist_dist.data.augment import Augmentation
from mnist_dist.data.images import SIDE

# The constants of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014).
_BITS = (1 << 64) - 1
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _hash(*parts: int) -> int:
    """Returns a 64-bit hash of integers; their order matters."""
    bits = 0
    for part in parts:
        bits = (bits + _GOLDEN + part) & _BITS
        bits = ((bits ^ (bits >> 30)) * _MULTIPLY_1) & _BITS
        bits = ((bits ^ (bits >> 27)) * _MULTIPLY_2) & _BITS
        bits ^= bits >> 31
    return bits


def _hash_with(bits: int | Tensor, parts: Tensor) -> Tensor:
    """Adds one more part to a hash: `_hash(*first, part) == _hash_with(_hash(*first), part)`, for a tensor of parts.

    int64 represents the 64 bits, because torch multiplies int64 with wrap-around on every device.
    """

    def shifted(bits: Tensor, count: int) -> Tensor:  # torch's >> copies the sign bit
        return (bits >> count) & ((1 << (64 - count)) - 1)

    def signed(number: int) -> int:
        return number - (1 << 64) if number >> 63 else number

    start = signed((bits + _GOLDEN) & _BITS) if isinstance(bits, int) else bits + signed(_GOLDEN)
    bits = start + parts
    bits = (bits ^ shifted(bits, 30)) * signed(_MULTIPLY_1)
    bits = (bits ^ shifted(bits, 27)) * signed(_MULTIPLY_2)
    return bits ^ shifted(bits, 31)


def derive_seed(*parts: int) -> int:
    """Returns a 63-bit seed from integers such as (seed, step, rank); the same on every machine."""
    return _hash(*parts) >> 1


def uniform(seed: int, epoch: int, indices: Tensor, count: int, first: int = 0) -> Tensor:
    """Returns uniform random numbers that depend only on seed, epoch and sample, not on process, batch or device.

    Args:
        indices: int64 (N,), positions in the data set.
        count: random numbers per sample.
        first: number of the first one, of any sign.

    Returns:
        float32 in [0, 1), shape (N, count), on the device of `indices`. Each has 24 random bits, which float32 holds
        exactly.
    """
    columns = torch.arange(first, first + count, device=indices.device)

    def draw(part: Tensor) -> Tensor:
        bits = _hash_with(_hash_with(_hash(seed, epoch), part[:, None]), columns[None, :])
        return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

    if indices.device.type != "cpu":
        return draw(indices)
    # Chunks fit into a CPU's cache. In one piece, the 133 numbers of an elastic warp took ten times as long.
    return torch.cat([draw(part) for part in indices.split(CHUNK)])


CHUNK = 4096
"""Samples whose random numbers are drawn at once."""


@dataclass(frozen=True)
class EpochPlan:
    """The order of an epoch's samples."""

    epoch: int
    order: Tensor
    """int64 (N,), a permutation of the sample indices, on the CPU."""


@dataclass(frozen=True)
class Batch:
    """The samples of one process in a global batch, on the device."""

    size: int
    """Images of the global batch."""
    start: int
    """Position of the first sample in the global batch."""
    images: Tensor
    """uint8 (n, C, H, W), as they are in the data set; prepared ones are changed, mixed and normalised, float32."""
    labels: Tensor
    """int64 (n,); of prepared mixed images the classes' probabilities, float32 (n, classes)."""
    changes: Tensor | None = None
    """The random changes of each image: the return value of `Batches.changes`."""
    partner: Batch | None = None
    """The samples that these are mixed with, one for each."""
    scale: Tensor | None = None
    """float32 (n,), factor of each sample's loss; None: 1."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def is_prepared(self) -> bool:
        """Whether the images can be given to the network without further changes."""
        return self.images.is_floating_point()

    def __getitem__(self, part: slice) -> Batch:
        """Returns consecutive samples of this batch, without a copy."""
        return replace(self._map(lambda tensor: tensor[part]), start=self.start + part.indices(len(self))[0])

    def split(self, count: int) -> list[Batch]:
        """Returns `count` consecutive pieces, the larger ones first; the sizes differ by at most one."""
        pieces = (piece(len(self), number, count) for number in range(count))
        return [self[each.start : each.stop] for each in pieces]

    @staticmethod
    def join(parts: Sequence[Batch]) -> Batch:
        """Returns the images, labels and changes of several batches as one."""
        changes = [part.changes for part in parts if part.changes is not None]
        images, labels = torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts])
        return Batch(len(labels), 0, images, labels, torch.cat(changes) if changes else None)

    def clone(self) -> Batch:
        """Returns a copy with its own memory."""
        return self._map(Tensor.clone)

    def copy_(self, source: Batch) -> None:
        """Overwrites the tensors of this batch with those of a batch of the same shape."""
        for tensor, value in zip(self.tensors(), source.tensors(), strict=True):
            tensor.copy_(value)

    def tensors(self) -> list[Tensor]:
        """Returns all tensors, with those of the partner."""
        own = [each for each in (self.images, self.labels, self.changes, self.scale) if each is not None]
        return own + (self.partner.tensors() if self.partner else [])

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(
            self.size,
            self.start,
            function(self.images),
            function(self.labels),
            None if self.changes is None else function(self.changes),
            self.partner and self.partner._map(function),
            None if self.scale is None else function(self.scale),
        )


def piece(size: int, rank: int, world_size: int) -> range:
    """Returns the positions of process `rank` in a global batch of `size` samples.

    Each process has one consecutive piece of the batch. The sizes differ by at most one and the larger pieces come
    first. A batch smaller than the world leaves the last ranks empty, never rank 0, whose batch norm statistics belong
    to the run.
    """
    share, longer = divmod(size, world_size)
    start, stop = (number * share + min(number, longer) for number in (rank, rank + 1))
    return range(start, stop)


@dataclass(frozen=True)
class Batches:
    """Divides an epoch into global batches, and a global batch into the rows of each process."""

    num_samples: int
    batch_size: int
    """Images of a global batch: the sum over all processes."""
    seed: int
    shape: tuple[int, int, int] = (1, SIDE, SIDE)
    """Channels, height and width of the images."""
    augmentation: Augmentation | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch. The last may be smaller: an epoch contains every sample exactly once."""
        return -(-self.num_samples // self.batch_size)

    def plan(self, epoch: int) -> EpochPlan:
        """Returns the permutation of an epoch.

        It is drawn on the CPU, because the generators of other devices give other numbers.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        return EpochPlan(epoch, torch.randperm(self.num_samples, generator=generator))

    def size(self, index: int) -> int:
        """Returns the number of samples in global batch `index` of an epoch."""
        return min(self.batch_size, self.num_samples - index * self.batch_size)

    def rows(self, plan: EpochPlan, index: int, *, rank: int = 0, world_size: int = 1) -> Tensor:
        """Returns the sample indices of process `rank` in global batch `index`: int64 (n,); see `piece`."""
        return self.rows_at(plan.order, index, piece(self.size(index), rank, world_size))

    def rows_at(self, order: Tensor, index: int, positions: range) -> Tensor:
        """Returns the sample indices at these positions of global batch `index`: int64 (n,)."""
        first = index * self.batch_size
        return order[first + positions.start : first + positions.stop]

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with a partner."""
        return self.augmentation is not None and self.augmentation.mixes

    def rows_with_partner(self, order: Tensor, index: int, positions: range) -> Tensor:
        """Returns the partner of the first sample, then the samples at these positions of global batch `index`.

        The partner of a sample is the sample before it, and of the first sample of the global batch the last one. The
        order is random, so the partner is too, and it is the same at any number of processes.

        Returns:
            int64 (n + 1,); empty without positions.
        """
        own = self.rows_at(order, index, positions)
        if not positions:
            return own
        before = (positions.start or self.size(index)) - 1
        return torch.cat([self.rows_at(order, index, range(before, before + 1)), own])

    def augmented(self, batch: Batch) -> Tensor:
        """Returns the changed and mixed images of a batch: levels 0 to 255, float32 (uint8 without augmentation)."""
        if self.augmentation is None or batch.changes is None:
            return batch.images
        if batch.partner is None or batch.partner.changes is None:
            return self.augmentation.apply(batch.images, batch.changes)
        # The partner is the sample before: only that of the first sample is not changed with the batch itself.
        images = torch.cat([batch.partner.images[:1], batch.images])
        changed = self.augmentation.apply(images, torch.cat([batch.partner.changes[:1], batch.changes]))
        return self.augmentation.mix(changed[1:], changed[:-1], batch.changes)

    def mixed(self, batch: Batch, partners: Batch, classes: int) -> Batch:
        """Returns a batch of changed images mixed with others, with the probabilities of `classes` as labels."""
        assert self.augmentation is not None and batch.changes is not None
        images = self.augmentation.mix(batch.images, partners.images, batch.changes)
        labels = self.augmentation.mix_labels(batch.labels, partners.labels, batch.changes, classes)
        return replace(batch, images=images, labels=labels)

    def targets(self, batch: Batch, classes: int) -> Tensor:
        """Returns the labels, int64 (n,), or for mixed images the classes' probabilities, float32 (n, classes)."""
        if self.augmentation is None or batch.changes is None or batch.partner is None:
            return batch.labels
        return self.augmentation.mix_labels(batch.labels, batch.partner.labels, batch.changes, classes)

    def changes(self, epoch: int, rows: Tensor) -> Tensor | None:
        """Returns the random changes of samples in an epoch, for `Augmentation.apply`; None without augmentation.

        Args:
            rows: int64 (n,), sample indices.
        """
        augmentation = self.augmentation
        if augmentation is None or augmentation.is_identity:
            return None
        size = self.shape[1:]
        draws = uniform(self.seed, epoch, rows, augmentation.count_draws(size), augmentation.first_draw)
        return augmentation.changes(draws, size)
