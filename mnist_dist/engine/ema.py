"""Exponential moving average of the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel


class MovingAverage(AveragedModel):
    """Averages weights and buffers after every step: decay × average + (1 - decay) × new.

    The first update copies the new values. Integer tensors have no mean; the average uses the network's own. PyTorch's
    `update_parameters` is not used: it waits for the device to find out whether an update is the first, and it cannot
    leave out a skipped step.

    Args:
        module: the network, on the device that it trains on.
        decay: between 0 and 1.
    """

    def __init__(self, module: nn.Module, decay: float):
        device = next(module.parameters()).device
        with device:  # otherwise the number of updates would be a tensor on the CPU
            super().__init__(module, use_buffers=True)
        for own, new in zip(self.module.modules(), module.modules(), strict=True):
            whole = {key: each for key, each in new._buffers.items() if each is not None}
            own._buffers.update({key: each for key, each in whole.items() if not each.is_floating_point()})
        self._smallest_rate = torch.full((), 1 - decay, device=device)
        self._rate = torch.ones((), device=device)
        """The weight of the new values: 1 until an update has been made, then 1 - decay."""
        self.register_state_dict_pre_hook(MovingAverage._count)
        self.register_load_state_dict_post_hook(MovingAverage._set_rate)

    def _count(self, *_: Any) -> None:
        """Sets `n_averaged`, the number of updates, before it is saved; 1 stands for any number."""
        self.n_averaged.copy_(self._rate < 1)

    def _set_rate(self, *_: Any) -> None:
        self._rate.copy_(torch.where(self.n_averaged > 0, self._smallest_rate, 1.0))

    def restart(self) -> None:
        """Makes the next update the first one."""
        self._rate.fill_(1.0)

    @torch.no_grad()
    def move(self, module: nn.Module, skipped: Tensor) -> None:
        """Updates the average from `module`.

        Args:
            skipped: scalar on the device, bool, or float32 0 or 1: whether the step was skipped.
        """
        skipped = skipped.to(torch.float32).view(())
        pairs = list(zip(_tensors(self.module), _tensors(module), strict=True))
        means = [pair for pair in pairs if pair[0].is_floating_point()]
        if self._rate.device.type == "cuda":
            self._move_together(means, skipped)
        else:
            rate = torch.where(skipped > 0, 0.0, self._rate)
            for average, new in means:
                average.lerp_(new, rate.to(average.dtype))
        for average, new in pairs:
            if not average.is_floating_point() and average is not new:  # the network has replaced its tensor
                average.copy_(torch.where(skipped > 0, average, new))
        torch.clamp(skipped, self._smallest_rate, self._rate, out=self._rate)  # stays 1 after a skipped first step

    def _move_together(self, pairs: list[tuple[Tensor, Tensor]], skipped: Tensor) -> None:
        """Updates all tensors of a dtype with two kernels: SGD on the distance, which the device can skip."""
        for dtype in {average.dtype for average, _ in pairs}:
            averages = [average for average, _ in pairs if average.dtype == dtype]
            distances = torch._foreach_sub(averages, [new for average, new in pairs if average.dtype == dtype])
            torch._fused_sgd_(
                averages,
                distances,
                [],
                weight_decay=0.0,
                momentum=0.0,
                lr=self._rate,
                dampening=0.0,
                nesterov=False,
                maximize=False,
                is_first_step=False,
                found_inf=skipped,
            )


def _tensors(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]
