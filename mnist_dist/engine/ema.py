"""Averaged weights."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """Averaged weights and buffers of a network that lies where it will train: decay × average + (1 - decay) × new.

    The first update takes the new ones, and so does every update of whole numbers, which have no mean. PyTorch's own
    update asks the device whether it is the first, and knows no step that was passed over.
    """

    def __init__(self, module: torch.nn.Module, decay: float):
        with next(module.parameters()).device:  # else the count of its updates is on the CPU
            super().__init__(module, use_buffers=True)
        self.decay = decay

    @torch.no_grad()
    def move(self, module: torch.nn.Module, passed_over: Tensor) -> None:
        """One update from `module`, unless `passed_over` (bool scalar on the device) says that it made no step."""
        rate = torch.full_like(self.n_averaged, 1 - self.decay, dtype=torch.float64)
        rate = rate.masked_fill(self.n_averaged == 0, 1.0).masked_fill(passed_over, 0.0)
        for mine, new in zip(_content(self.module), _content(module), strict=True):
            if mine.is_floating_point():
                mine.lerp_(new, rate.to(mine.dtype))
            else:
                mine.copy_(torch.where(passed_over, mine, new))
        self.n_averaged += ~passed_over


def _content(module: torch.nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
