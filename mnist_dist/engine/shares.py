"""The positions of a process in a global batch, and the number of its micro-batches."""

from __future__ import annotations

from dataclasses import dataclass

from mnist_dist.data.batches import piece
from mnist_dist.distributed.logical_shards import shards_of


@dataclass(frozen=True)
class Shares:
    """Divides global batches among processes."""

    rank: int
    world_size: int
    shards: int | None = None
    """Number of logical shards; None: the batch is divided into one piece per process."""
    needs_no_filler: bool = False
    """Whether a process without a share runs its forward pass on no images, as synchronized batch norm requires."""

    def own(self, size: int) -> range:
        """Returns the positions of this process in a global batch of `size` samples."""
        return piece(size, self.rank, self.world_size)

    def loaded(self, size: int) -> range:
        """Returns the positions whose images this process loads of a global batch of `size` samples."""
        if self.shards is not None:
            mine = shards_of(self.shards, self.rank, self.world_size)
            first, last = (piece(size, shard, self.shards) for shard in (mine[0], mine[-1]))
            return range(first.start, last.stop)
        if not self.own(size) and not self.needs_no_filler:
            # A short last batch can leave a process without rows, but every process must take part in the reduction.
            return range(1)
        return self.own(size)


def largest_share(batch_size: int, pieces: int) -> int:
    """Returns the size of the largest piece of a batch that is divided among processes or logical shards."""
    return -(-batch_size // pieces)


def count_micro_batches(largest_share: int, micro_batch_size: int | None) -> int:
    """Returns the number of micro-batches per process for a batch whose largest share has `largest_share` samples."""
    return -(-largest_share // (micro_batch_size or largest_share))
