"""Logical shards: identical bytes at every world size, with batch norm and dropout.

The global batch is split into a fixed number of shards. The result of a shard does not depend on the process that
computes it: its dropout has its own seed, and its batch norm starts from the buffers at the beginning of the step and
sees the rows of this shard only. Gradients and buffers are added as one balanced binary tree over all shards. A process
holds adjacent shards and adds the complete branches of the tree that they form, so every addition has the same operands
at every world size. A process of 2^n has one branch. Three processes of eight shards have up to two each.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mnist_dist.distributed.gradients import GradientClock

Node = tuple[int, int]
"""Height and place of a branch: it is the sum of the shards place · 2^height to (place + 1) · 2^height - 1."""


class LogicalShards:
    """Assigns shards to this process and sums the gradients of all shards.

    Args:
        count: number of shards, a power of two; at least the world size.
        clock: measures the wait for the other processes.
    """

    def __init__(self, count: int, accelerator: Accelerator, module: nn.Module, clock: GradientClock):
        world_size, rank = accelerator.num_processes, accelerator.process_index
        assert count & (count - 1) == 0 and count >= world_size, (count, world_size)
        self.count, self._accelerator, self._clock = count, accelerator, clock
        self.mine = shards_of(count, rank, world_size)
        self._nodes = [branches_of(shards_of(count, each, world_size)) for each in range(world_size)]
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        # Only buffers of layers in training mode are reset and averaged. A layer in eval mode is frozen: its buffers
        # are equal in all shards, and an average of equal values could differ from them in the last bits.
        trained = (part for part in module.modules() if part.training)
        named = [pair for part in trained for pair in part.named_buffers(recurse=False)]
        self._buffers = list(dict.fromkeys(buffer for _, buffer in named if buffer.is_floating_point()))
        # Batch norm counts a step once, not once per shard. Other integer buffers are tables, which never change.
        self._counters = list(dict.fromkeys(buffer for name, buffer in named if name == "num_batches_tracked"))
        self._branches: list[tuple[Node, Tensor]] = []

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
                self._add(shard, self._flat([self._gradient(p) for p in self._parameters] + self._buffers))
            else:
                self._add(shard, self._flat([torch.zeros_like(t) for t in [*self._parameters, *self._buffers]]))
        for buffer, value in zip(self._counters, before[len(self._buffers) :], strict=True):
            buffer.copy_(value + 1)

    def combine(self, used: int) -> None:
        """Writes the sum over all shards into `grad` and the mean over the used shards into the buffers.

        Collective: call on every rank.
        """
        branches, self._branches = self._branches, []
        if self._accelerator.num_processes > 1:
            own = torch.stack([branch for _, branch in branches])
            most = max(map(len, self._nodes))  # gather needs equally many from each process
            with self._clock.waiting():
                rows = self._accelerator.gather(torch.cat([own, own[:1].expand(most - len(own), -1)])[None])
            branches = []
            for nodes, found in zip(self._nodes, rows, strict=True):
                for node, branch in zip(nodes, found, strict=False):
                    _add_node(branches, node, branch)
        ((_, total),) = branches
        pieces = iter(total.split([tensor.numel() for tensor in [*self._parameters, *self._buffers]]))
        for parameter in self._parameters:
            parameter.grad = torch.empty_like(parameter).copy_(next(pieces).view(parameter.shape))
        for buffer in self._buffers:
            buffer.copy_(next(pieces).view(buffer.shape) / used)

    def _add(self, shard: int, vector: Tensor) -> None:
        """Adds a leaf on the right of the tree. Complete branches are added at once, to limit memory."""
        _add_node(self._branches, (0, shard), vector)

    @staticmethod
    def _gradient(parameter: nn.Parameter) -> Tensor:
        return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad

    @staticmethod
    def _flat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])


def shards_of(count: int, rank: int, world_size: int) -> range:
    """Returns the shards of a process, of `count` shards."""
    return range(rank * count // world_size, (rank + 1) * count // world_size)


def branches_of(shards: range) -> list[Node]:
    """Returns the complete branches of the tree that adjacent shards form, from left to right."""
    branches: list[tuple[Node, Any]] = []
    for shard in shards:
        _add_node(branches, (0, shard), None)
    return [node for node, _ in branches]


def _add_node(branches: list[tuple[Node, Any]], node: Node, value: Any) -> None:
    """Appends a branch; adds it to its left sibling, if that is the last one, and so on upwards."""
    height, place = node
    while place % 2 and branches and branches[-1][0] == (height, place - 1):
        left = branches.pop()[1]
        value = None if left is None else left + value  # None: only the node counts
        height, place = height + 1, place // 2
    branches.append(((height, place), value))
