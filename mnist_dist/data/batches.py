"""The samples of each step: the order of an epoch, its global batches, and the rows of each process.

Everything here is a pure function. (seed, epoch) determines the permutation of an epoch, the step determines the
global batch, (rank, world size) determines the rows of a process, and (seed, epoch, sample index) determines the random
numbers of a sample. A resume therefore needs no saved state, and no result depends on the number of processes.
"""

from __future__ import annotations

from dataclasses import dataclass

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


def uniform(seed: int, epoch: int, indices: Tensor, count: int) -> Tensor:
    """Returns uniform random numbers that depend only on seed, epoch and sample, not on process, batch or device.

    Args:
        indices: int64 (N,), positions in the data set.
        count: random numbers per sample.

    Returns:
        float32 in [0, 1), shape (N, count), on the device of `indices`. Each has 24 random bits, which float32 holds
        exactly.
    """
    columns = torch.arange(count, device=indices.device)

    def draw(part: Tensor) -> Tensor:
        bits = _hash_with(_hash_with(_hash(seed, epoch), part[:, None]), columns[None, :])
        return ((bits >> 40) & 0xFFFFFF).to(torch.float32) * 2.0**-24

    # Chunks fit into a CPU's cache. In one piece, the 133 numbers of an elastic warp took ten times as long.
    return torch.cat([draw(part) for part in indices.split(4096)])


@dataclass(frozen=True)
class EpochPlan:
    """The order of an epoch's samples and the warp of each sample, on the device."""

    epoch: int
    order: Tensor
    """int64 (N,), a permutation of the sample indices."""
    warps: Tensor | None
    """The return value of `Augmentation.warps`, indexed by sample; None without augmentation."""


@dataclass(frozen=True)
class Batches:
    """Divides an epoch into global batches, and a global batch into the rows of each process."""

    num_samples: int
    batch_size: int
    """Images of a global batch: the sum over all processes."""
    seed: int
    side: int = SIDE
    augmentation: Augmentation | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Global batches of an epoch. The last may be smaller: an epoch contains every sample exactly once."""
        return -(-self.num_samples // self.batch_size)

    def plan(self, epoch: int, device: torch.device | str = "cpu") -> EpochPlan:
        """Returns the permutation and the warps of an epoch on `device`.

        The permutation is drawn on the CPU, because the generators of other devices give other numbers.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, epoch))
        order = torch.randperm(self.num_samples, generator=generator).to(device)
        if self.augmentation is None or self.augmentation.is_identity:
            return EpochPlan(epoch, order, None)
        samples = torch.arange(self.num_samples, device=device)
        draws = uniform(self.seed, epoch, samples, self.augmentation.count_draws(self.side))
        return EpochPlan(epoch, order, self.augmentation.warps(draws, self.side))

    def size(self, index: int) -> int:
        """Returns the number of samples in global batch `index` of an epoch."""
        return min(self.batch_size, self.num_samples - index * self.batch_size)

    def rows(self, plan: EpochPlan, index: int, *, rank: int = 0, world_size: int = 1) -> Tensor:
        """Returns the sample indices of process `rank` in global batch `index`: int64 (n,).

        Each process has one consecutive piece of the batch. The sizes differ by at most one and the larger pieces come
        first. A batch smaller than the world leaves the last ranks empty, never rank 0, whose batch norm statistics
        belong to the run.
        """
        share, longer = divmod(self.size(index), world_size)
        first = index * self.batch_size
        start, stop = (piece * share + min(piece, longer) for piece in (rank, rank + 1))
        return plan.order[first + start : first + stop]
