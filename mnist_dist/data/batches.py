"""Which samples a step trains on: order, global batch and each process's rows, as pure functions.

Nothing here has state. The permutation of an epoch follows from (seed, epoch), a batch from the step, a process's rows
from (rank, world size), a sample's random numbers from (seed, epoch, sample index). So there is nothing to save for a
resume and nothing that could differ between one process and sixty-four.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mnist_dist.data.augment import Augmentation

# splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
_BITS = (1 << 64) - 1
_GOLDEN, _MULTIPLY_1, _MULTIPLY_2 = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def _hash(*parts: int) -> int:
    """64 bits that follow from the whole numbers given, in their order."""
    bits = 0
    for part in parts:
        bits = (bits + _GOLDEN + part) & _BITS
        bits = ((bits ^ (bits >> 30)) * _MULTIPLY_1) & _BITS
        bits = ((bits ^ (bits >> 27)) * _MULTIPLY_2) & _BITS
        bits ^= bits >> 31
    return bits


def _hash_with(bits: int | Tensor, parts: Tensor) -> Tensor:
    """One more round of `_hash`, for a tensor of parts: torch multiplies int64 with wrap-around on every device."""

    def shifted(bits: Tensor, count: int) -> Tensor:  # torch's own >> copies the sign bit
        return (bits >> count) & ((1 << (64 - count)) - 1)

    def signed(number: int) -> int:
        return number - (1 << 64) if number >> 63 else number

    start = signed((bits + _GOLDEN) & _BITS) if isinstance(bits, int) else bits + signed(_GOLDEN)
    bits = start + parts
    bits = (bits ^ shifted(bits, 30)) * signed(_MULTIPLY_1)
    bits = (bits ^ shifted(bits, 27)) * signed(_MULTIPLY_2)
    return bits ^ shifted(bits, 31)


def derive_seed(*parts: int) -> int:
    """A seed of 63 bits from whole numbers, e.g. (seed, step, rank); equal parts give equal seeds on any machine."""
    return _hash(*parts) >> 1


def uniform(seed: int, epoch: int, indices: Tensor, count: int) -> Tensor:
    """Random numbers that belong to the sample, whichever process, batch or device asks.

    Args:
        indices: int64, shape (N,): positions in the data set.
        count: how many numbers a sample needs.

    Returns:
        float32 in [0, 1), shape (N, count), on the device of `indices`; 24 random bits each, so exact on any device.
    """
    columns = torch.arange(count, device=indices.device)

    def draw(part: Tensor) -> Tensor:
        bits = _hash_with(_hash_with(_hash(seed, epoch), part[:, None]), columns[None, :])
        return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

    # In parts that stay in a CPU's cache: whole, the hundred numbers of an elastic warp took ten times as long.
    return torch.cat([draw(part) for part in indices.split(4096)])


@dataclass(frozen=True)
class EpochPlan:
    """What an epoch is made of, on the device: the order of the samples and the warp of each.

    `order`: int64 (N,), a permutation. `warps`: indexed by sample, as `Augmentation.warps` gives them, or None without
    augmentation.
    """

    epoch: int
    order: Tensor
    warps: Tensor | None


@dataclass(frozen=True)
class Batches:
    """Cuts epochs of `num_samples` into global batches and these into each process's rows."""

    num_samples: int
    batch_size: int
    seed: int
    side: int = 28
    augmentation: Augmentation | None = None

    @property
    def steps_per_epoch(self) -> int:
        """The last batch may be short: every sample is seen exactly once an epoch."""
        return -(-self.num_samples // self.batch_size)

    def plan(self, epoch: int, device: torch.device | str = "cpu") -> EpochPlan:
        """The epoch's permutation and warps; the permutation is drawn on the CPU to be the same for every device."""
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.num_samples, generator=generator).to(device)
        if self.augmentation is None or self.augmentation.is_identity:
            return EpochPlan(epoch, order, None)
        samples = torch.arange(self.num_samples, device=device)
        draws = uniform(self.seed, epoch, samples, self.augmentation.count_draws(self.side))
        return EpochPlan(epoch, order, self.augmentation.warps(draws, self.side))

    def size(self, index: int) -> int:
        """Samples in global batch `index` of an epoch."""
        return min(self.batch_size, self.num_samples - index * self.batch_size)

    def rows(self, plan: EpochPlan, index: int, *, rank: int = 0, world_size: int = 1) -> Tensor:
        """The sample indices, int64 (n,), that process `rank` computes of global batch `index`.

        The processes' rows are consecutive pieces of the batch whose sizes differ by at most one, the longer ones
        first: a batch smaller than the world leaves the last ranks empty, and never rank 0, whose batch norm statistics
        are the run's.
        """
        share, longer = divmod(self.size(index), world_size)
        first = index * self.batch_size
        start, stop = (piece * share + min(piece, longer) for piece in (rank, rank + 1))
        return plan.order[first + start : first + stop]
