"""Logical shards: identical bytes at world size 1, 2, 4 and 8, with batch norm and dropout.

The global batch is split into a fixed number of shards. The result of a shard does not depend on the process that
computes it: its dropout has its own seed, and its batch norm starts from the buffers at the beginning of the step and
sees the rows of this shard only. Gradients and buffers are added as one balanced binary tree over all shards. A process
holds 2^n adjacent shards and adds a complete branch of the tree, so every addition has the same order at every world
size.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mnist_dist.distributed.gradients import GradientClock


class LogicalShards:
    """Assigns shards to this process and sums the gradients of all shards.

    Args:
        count: number of shards, a power of two and a multiple of the world size.
        clock: measures the wait for the other processes.
    """

    def __init__(self, count: int, accelerator: Accelerator, module: nn.Module, clock: GradientClock):
        world_size, rank = accelerator.num_processes, accelerator.process_index
        assert count & (count - 1) == 0 and count % world_size == 0, (count, world_size)
        self.count, self._accelerator, self._clock = count, accelerator, clock
        self.mine = range(rank * count // world_size, (rank + 1) * count // world_size)
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Only buffers of layers in training mode are reset and averaged. A layer in eval mode is frozen: its buffers
        # are equal in all shards, and an average of equal values could differ from them in the last bits.
        trained = (part for part in module.modules() if part.training)
        named = [pair for part in trained for pair in part.named_buffers(recurse=False)]
        self._buffers = list(dict.fromkeys(buffer for _, buffer in named if buffer.is_floating_point()))
        # Batch norm counts a step once, not once per shard. Other integer buffers are tables, which never change.
        self._counters = list(dict.fromkeys(buffer for name, buffer in named if name == "num_batches_tracked"))
        self._branches: list[tuple[int, Tensor]] = []

    def each(self, used: int) -> Iterator[int]:
        """Yields the shards of this process. The caller computes the gradients of one shard in each pass of its loop.

        Before each shard, gradients and buffers are reset. After it, they are added to the sum over the shards.

        Args:
            used: number of shards with at least one row; in a short last batch, only the first shards have rows.
        """
        state = [*self._buffers, *self._counters]
        before = [buffer.clone() for buffer in state]
        for shard in self.mine:
            if shard < used:
                for buffer, value in zip(state, before, strict=True):
                    buffer.copy_(value)
                for parameter in self._parameters:
                    parameter.grad = None
                yield shard
                self._add(self._flat([self._gradient(p) for p in self._parameters] + self._buffers))
            else:
                self._add(self._flat([torch.zeros_like(t) for t in [*self._parameters, *self._buffers]]))
        for buffer, value in zip(self._counters, before[len(self._buffers) :], strict=True):
            buffer.copy_(value + 1)

    def combine(self, used: int) -> None:
        """Writes the sum over all shards into `grad` and the mean over the used shards into the buffers.

        Collective: call on every rank.
        """
        ((_, total),) = self._branches
        self._branches = []
        if self._accelerator.num_processes > 1:
            with self._clock.waiting():
                branches = self._accelerator.gather(total[None])
            total = _tree_sum(list(branches))
        pieces = iter(total.split([tensor.numel() for tensor in [*self._parameters, *self._buffers]]))
        for parameter in self._parameters:
            parameter.grad = torch.empty_like(parameter).copy_(next(pieces).view(parameter.shape))
        for buffer in self._buffers:
            buffer.copy_(next(pieces).view(buffer.shape) / used)

    def _add(self, vector: Tensor) -> None:
        """Adds a leaf on the right of the tree. Branches of equal height are added at once, to limit memory."""
        height = 0
        while self._branches and self._branches[-1][0] == height:
            vector, height = self._branches.pop()[1] + vector, height + 1
        self._branches.append((height, vector))

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    @staticmethod
    def _flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def _tree_sum(branches: list[Tensor]) -> Tensor:
    """Adds neighbours until one tensor is left; the number of branches is a power of two."""
    while len(branches) > 1:
        branches = [left + right for left, right in zip(branches[::2], branches[1::2], strict=True)]
    return branches[0]
