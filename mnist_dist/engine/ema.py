"""Exponential moving average of the weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel

from mnist_dist.distributed.devices import sum_dtype


class MovingAverage(AveragedModel):
    """Averages weights and buffers after every step: decay × average + (1 - decay) × new.

    The first update copies the new values. Integer tensors have no mean and are copied at every update. PyTorch's own
    `update_parameters` is not used: it waits for the device to find out whether an update is the first, and it cannot
    leave out a skipped step.

    Args:
        module: the network, on the device that it trains on.
        decay: between 0 and 1.
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        with next(module.parameters()).device:  # otherwise the number of updates would be a tensor on the CPU
            super().__init__(module, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def move(self, module: torch.nn.Module, skipped: Tensor) -> None:
        """Updates the average from `module`, unless its step was `skipped` (bool scalar on the device)."""
        rate = torch.full_like(self.n_averaged, 1 - self.decay, dtype=sum_dtype(self.n_averaged.device))
        rate = rate.masked_fill(self.n_averaged == 0, 1.0).masked_fill(skipped, 0.0)
        for average, new in zip(_tensors(self.module), _tensors(module), strict=True):
            if average.is_floating_point():
                average.lerp_(new, rate.to(average.dtype))
            else:
                average.copy_(torch.where(skipped, average, new))
        self.n_averaged += ~skipped


def _tensors(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
