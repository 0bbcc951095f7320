"""The Lion optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from mnist_dist.distributed.fsdp import local_part


class Lion(Optimizer):
    """Lion (Chen et al. 2023, arXiv 2302.06675): every weight moves by the learning rate, in the sign of its momentum.

    The sign makes the update larger than AdamW's. The paper recommends a learning rate 3 to 10 times smaller, and a
    weight decay as many times larger.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ):
        for name, value in {"lr": lr, "weight_decay": weight_decay}.items():
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be at least 0 and below 1, got {betas}")
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Updates every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                if "exp_avg" not in self.state[parameter]:
                    self.state[parameter]["exp_avg"] = torch.zeros_like(parameter)
            if parameters:
                _update(
                    [local_part(parameter) for parameter in parameters],
                    [local_part(parameter.grad) for parameter in parameters],
                    [local_part(self.state[parameter]["exp_avg"]) for parameter in parameters],
                    group,
                )
        return loss


def _update(weights: list[Tensor], gradients: list[Tensor], averages: list[Tensor], group: dict[str, Any]) -> None:
    """Makes a step of Lion in place."""
    lr, (beta1, beta2) = float(group["lr"]), group["betas"]
    updates = torch._foreach_lerp(averages, gradients, 1 - beta1)
    torch._foreach_sign_(updates)
    torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
    torch._foreach_add_(weights, updates, alpha=-lr)
    torch._foreach_lerp_(averages, gradients, 1 - beta2)
