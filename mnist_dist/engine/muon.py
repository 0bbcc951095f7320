"""One optimizer that updates the hidden layers of a network by Muon and its other parameters by AdamW."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from mnist_dist.distributed.devices import emulates_bf16
from mnist_dist.distributed.fsdp import is_sharded, shard_like, unshard

AdjustLr = Literal["original", "match_rms_adamw", "spectral_unclamped"]


def split_hidden(module: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Splits the trained parameters of a network into those for Muon and those for AdamW.

    Muon takes the weight matrices and convolution kernels between the first and the last layer, in the order of the
    network's modules. AdamW takes the first and the last layer, biases, gains, embeddings, position tables, and
    depthwise kernels.
    This is the practice of Keller Jordan, https://kellerjordan.github.io/posts/muon/.
    """
    embeddings = {id(part.weight) for part in module.modules() if isinstance(part, nn.Embedding | nn.EmbeddingBag)}
    layers = [
        parameter
        for name, parameter in module.named_parameters()
        if "weight" in name.rpartition(".")[2] and parameter.ndim >= 2 and id(parameter) not in embeddings
    ]
    hidden = {id(each) for each in layers[1:-1] if each.is_floating_point() and min(_matrix_shape(each)) > 1}
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # A depthwise kernel (channels, 1, height, width) has no matrix that mixes channels.
    hidden -= {id(each) for each in layers if each.ndim > 2 and each.shape[1] == 1}
    return [each for each in trained if id(each) in hidden], [each for each in trained if id(each) not in hidden]


class Muon(Optimizer):
    """Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/), with AdamW for a part of the parameters.

    The update of a matrix is its momentum with all singular values moved close to 1 by a Newton-Schulz iteration.
    Keywords, defaults and arithmetic are those of `torch.optim.Muon`, which accepts matrices only. Here a convolution
    kernel (out, in, height, width) is the matrix (out, in · height · width), and matrices of one shape are iterated as
    one batch. The keywords that start with `adamw_` are those of `torch.optim.AdamW`.

    `lr` is the rate of both methods; AdamW's is multiplied by `adamw_lr_ratio`. With adjust_lr_fn="match_rms_adamw"
    (Liu et al. 2025, arXiv 2502.16982) both need about the same rate. Jordan's own settings are lr=0.02,
    adamw_lr_ratio=0.015, weight_decay=0.01.

    Args:
        params: parameters, of which those with two or more dimensions are updated by Muon; or parameter groups with
            the key `use_muon`.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: AdjustLr | None = None,
        adamw_lr_ratio: float = 1.0,
        adamw_betas: tuple[float, float] = (0.9, 0.999),
        adamw_eps: float = 1e-8,
        adamw_weight_decay: float = 0.01,
    ):
        at_least_0 = {"lr": lr, "weight_decay": weight_decay, "eps": eps, "adamw_lr_ratio": adamw_lr_ratio}
        for name, value in (at_least_0 | {"adamw_eps": adamw_eps, "adamw_weight_decay": adamw_weight_decay}).items():
            _require(value >= 0, f"{name} must be at least 0, got {value}")
        _require(0 <= momentum < 1, f"momentum must be at least 0 and below 1, got {momentum}")
        _require(1 <= ns_steps < 100, f"ns_steps must be from 1 to 99, got {ns_steps}")
        _require(
            all(0 <= beta < 1 for beta in adamw_betas), f"adamw_betas must be at least 0 and below 1, got {adamw_betas}"
        )
        _require(adjust_lr_fn in (None, *_LR_RATIOS), f"adjust_lr_fn must be {' or '.join(_LR_RATIOS)}")
        # Each group has only the settings of its method: a schedule that changes the momentum sets `betas` in groups
        # that have them, else `momentum`.
        muon: dict[str, Any] = {"weight_decay": weight_decay, "eps": eps, "momentum": momentum, "nesterov": nesterov}
        muon |= {"ns_coefficients": ns_coefficients, "ns_steps": ns_steps, "adjust_lr_fn": adjust_lr_fn}
        rest: dict[str, Any] = {"weight_decay": adamw_weight_decay, "eps": adamw_eps, "betas": adamw_betas}
        rest |= {"lr_ratio": adamw_lr_ratio}
        groups = [(muon if group["use_muon"] else rest) | group for group in _as_groups(params)]
        super().__init__(groups, {"lr": lr})
        for group in self.param_groups:
            if not group["use_muon"]:  # on a GPU, one kernel updates all, and the number of steps is on the GPU too
                group["fused"] = all(each.device.type == "cuda" and not is_sharded(each) for each in group["params"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]  # torch overloads it
        """Updates every parameter that has a gradient. Collective if the parameters are sharded."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            (self._step_muon if group["use_muon"] else self._step_adamw)(parameters, group)
        return loss

    def _step_muon(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        lr, momentum = float(group["lr"]), group["momentum"]
        by_shape: dict[tuple[int, int], list[tuple[nn.Parameter, Tensor]]] = {}
        for parameter in parameters:
            state, gradient = self.state[parameter], parameter.grad
            assert gradient is not None
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(gradient)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
            update = gradient.lerp(buffer, momentum) if group["nesterov"] else buffer
            # The iteration needs complete matrices; every rank computes those of all ranks.
            by_shape.setdefault(_matrix_shape(parameter), []).append((parameter, unshard(update)))
        for shape, members in by_shape.items():
            matrices = torch.stack([update.reshape(shape) for _, update in members])
            matrices = newton_schulz(matrices, group["ns_coefficients"], group["ns_steps"], group["eps"])
            ratio = _LR_RATIOS[group["adjust_lr_fn"] or "original"](*shape)
            for (parameter, _), matrix in zip(members, matrices, strict=True):
                update = matrix.view(parameter.shape)
                if hasattr(parameter, "device_mesh"):
                    update = shard_like(update, parameter)
                parameter.mul_(1 - lr * group["weight_decay"]).add_(update, alpha=-lr * ratio)

    def _step_adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] |= {
                    "step": torch.zeros((), device=parameter.device if group["fused"] else "cpu"),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
        exp_avgs, exp_avg_sqs, steps = (
            [self.state[parameter][key] for parameter in parameters] for key in ("exp_avg", "exp_avg_sq", "step")
        )
        adamw(
            list(parameters),
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            fused=group["fused"],
            has_complex=any(parameter.is_complex() for parameter in parameters),
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=float(group["lr"]) * group["lr_ratio"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def newton_schulz(matrices: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Moves all singular values of each matrix close to 1 by a quintic iteration.

    The iteration is the one of Jordan et al. 2024. It ends with singular values of about 0.7 to 1.2. It runs in
    bfloat16, as in `torch.optim.Muon`, or in float32 on a CPU that emulates bfloat16.

    Args:
        matrices: (N, rows, columns).
        coefficients: a, b, c of the polynomial a·x + b·x³ + c·x⁵.
        eps: smallest norm that a matrix is divided by.

    Returns:
        bfloat16 or float32 (N, rows, columns).
    """
    a, b, c = coefficients
    tall = matrices.shape[1] > matrices.shape[2]
    found = matrices.to(torch.float32 if emulates_bf16(matrices.device) else torch.bfloat16)
    found = found.mT if tall else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = found @ found.mT
        found = torch.baddbmm(found, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), found, beta=a)
    return (found.mT if tall else found).contiguous()


_LR_RATIOS: dict[str, Callable[[int, int], float]] = {
    "original": lambda rows, columns: math.sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * math.sqrt(max(rows, columns)),
    "spectral_unclamped": lambda rows, columns: math.sqrt(rows / columns),
}
"""`adjust_lr_fn` -> factor of the learning rate for a matrix of this shape, as in `torch.optim.Muon`."""


def _matrix_shape(parameter: Tensor) -> tuple[int, int]:
    """Returns the shape of a parameter as a matrix: all dimensions after the first are flattened."""
    return parameter.shape[0], math.prod(parameter.shape[1:])


def _as_groups(params: Iterable[nn.Parameter] | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns parameter groups with the key `use_muon`; no group is empty."""
    given: list[Any] = list(params)
    if not any(isinstance(each, dict) for each in given):
        matrices, others = [each for each in given if each.ndim >= 2], [each for each in given if each.ndim < 2]
        given = [{"params": matrices, "use_muon": True}, {"params": others, "use_muon": False}]
    return [group for group in given if group["params"]]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
