"""Optimizers by PyTorch's names, and the learning rate as a pure function of the step (but for `plateau`'s).

The keywords of every schedule are those of PyTorch's scheduler of that name. Durations (`step_size`, `T_max`,
`total_iters`) are counted in epochs, as papers give them. Nothing is stepped, so nothing can be
stepped once per process.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim import Optimizer

# --- optimizers ---------------------------------------------------------------------------------------------------


# LBFGS calls the loss several times an update and SparseAdam wants sparse gradients: neither fits a training step.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
}


def default_lr(name: str) -> float:
    """PyTorch's own default learning rate of an optimizer."""
    return float(inspect.signature(OPTIMIZERS[name]).parameters["lr"].default)


def build_optimizer(parameters: Iterable[torch.nn.Parameter], name: str, *, lr: float, **keywords: Any) -> Optimizer:
    """Builds `torch.optim`'s optimizer `name` (lower case) over what is not frozen, fused where it can be.

    Raises:
        ValueError: unknown name, or PyTorch refuses a value.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(sorted(OPTIMIZERS))}")
    kind, parameters = OPTIMIZERS[name], [parameter for parameter in parameters if parameter.requires_grad]
    # One kernel for all tensors: the small networks are bound by the number of calls.
    if "fused" in inspect.signature(kind).parameters and not {"foreach", "fused"} & keywords.keys():
        # Adagrad's is for CPUs alone before torch 2.10 or so; for dampening see `fill_momentum`. Shards: none of SGD.
        devices = ("cpu",) if kind is torch.optim.Adagrad or keywords.get("dampening") else ("cpu", "cuda")
        known = (p.device.type in devices and not hasattr(p, "device_mesh") for p in parameters)
        keywords["fused"] = all(known) and all(p.is_floating_point() for p in parameters)
    return kind(parameters, lr=lr, **keywords)  # type: ignore[call-arg]  # torch types only the base class's arguments


def fill_momentum(optimizer: Optimizer) -> None:
    """Lets fused SGD begin with a momentum of zeros, from which, without dampening, its first step is the same.

    On a GPU the kernel passes over a step that is not finite, as fp16's first often is, and PyTorch would take it for
    the one that has filled the momentum.
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
