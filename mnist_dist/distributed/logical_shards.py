"""Logical shards: the same bytes at world size 1, 2, 4 and 8, batch norm and dropout included.

The global batch is cut into a fixed number of pieces, the shards. Whoever computes a shard, its dropout draws from a
seed of its own, and its batch norm starts from the step's buffers and sees its rows alone. Gradients and buffers are
added as one balanced tree over all shards; a process that holds 2^n neighbours adds a whole branch of it, so the order
of every addition is the same wherever it is made.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mnist_dist.distributed.gradients import GradientClock


class LogicalShards:
    """Which shards this process computes, and the sum of all.

    Args:
        count: a power of two that the world size divides.
        clock: measures the wait for the others.
    """

    def __init__(self, count: int, accelerator: Accelerator, module: nn.Module, clock: GradientClock):
        world_size, rank = accelerator.num_processes, accelerator.process_index
        assert count & (count - 1) == 0 and count % world_size == 0, (count, world_size)
        self.count, self._accelerator, self._clock = count, accelerator, clock
        self.mine = range(rank * count // world_size, (rank + 1) * count // world_size)
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # A layer in eval mode is frozen: adding its buffers up and dividing again would not give the same bits.
        trained = (part for part in module.modules() if part.training)
        named = [pair for part in trained for pair in part.named_buffers(recurse=False)]
        self._buffers = list(dict.fromkeys(buffer for _, buffer in named if buffer.is_floating_point()))
        # Batch norm counts the step once, in whichever shard. Other whole numbers are tables: they stay as they are.
        self._counters = list(dict.fromkeys(buffer for name, buffer in named if name == "num_batches_tracked"))
        self._branches: list[tuple[int, Tensor]] = []

    def each(self, used: int) -> Iterator[int]:
        """This process's shards; between two of them gradients and buffers are put by and set back.

        Args:
            used: shards that have a row; a short last batch can leave the later ones none.
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
        """Sums the gradients of all shards of all processes into `grad`, and averages the buffers."""
        ((_, total),) = self._branches
        self._branches = []
        if self._accelerator.num_processes > 1:
            with self._clock.backward():
                self._clock.arrived()
                branches = self._accelerator.gather(total[None])
            total = _tree_sum(list(branches))
        pieces = iter(total.split([tensor.numel() for tensor in [*self._parameters, *self._buffers]]))
        for parameter in self._parameters:
            parameter.grad = torch.empty_like(parameter).copy_(next(pieces).view(parameter.shape))
        for buffer in self._buffers:
            buffer.copy_(next(pieces).view(buffer.shape) / used)

    def _add(self, vector: Tensor) -> None:
        """Adds a leaf on the right: two branches of the same height become one, so few are held at a time."""
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
    while len(branches) > 1:
        branches = [left + right for left, right in zip(branches[::2], branches[1::2], strict=True)]
    return branches[0]
