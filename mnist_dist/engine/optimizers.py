"""Builds optimizers by name: those of `torch.optim`, Muon and Lion."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer

from mnist_dist.distributed.fsdp import is_sharded
from mnist_dist.engine.lion import Lion
from mnist_dist.engine.muon import Muon, split_hidden

# LBFGS computes the loss several times per update, and SparseAdam needs sparse gradients.
OPTIMIZERS: dict[str, type[Optimizer]] = {
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, Optimizer) and name not in ("Optimizer", "LBFGS", "SparseAdam")
} | {"lion": Lion, "muon": Muon}  # PyTorch's Muon refuses convolutions and biases
"""Name in a recipe -> class: those of `torch.optim` in lower case, and this package's own."""


def default_lr(name: str) -> float:
    """Returns the default learning rate of an optimizer."""
    return float(inspect.signature(OPTIMIZERS[name]).parameters["lr"].default)


def build_optimizer(module: torch.nn.Module, name: str, *, lr: float, **keywords: Any) -> Optimizer:
    """Builds an optimizer for the parameters of a network that are not frozen, with its fused kernel if possible.

    Args:
        module: the network. Muon also uses the kinds and the order of its layers.
        name: a key of `OPTIMIZERS`.
        keywords: arguments of the class; `fused` or `foreach` overrides the choice of kernel.

    Raises:
        ValueError: the name is unknown, or the optimizer refuses a value.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; known: {', '.join(sorted(OPTIMIZERS))}")
    if name == "muon":
        hidden, others = split_hidden(module)
        groups = [{"params": hidden, "use_muon": True}, {"params": others, "use_muon": False}]
        return Muon(groups, lr=lr, **keywords)
    optimizer_class = OPTIMIZERS[name]
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    # A fused optimizer updates all tensors in one kernel. For small networks, the number of kernels limits the speed.
    if "fused" in inspect.signature(optimizer_class).parameters and not {"foreach", "fused"} & keywords.keys():
        # On a GPU, Adagrad has no fused kernel before about torch 2.10, and SGD with dampening cannot use
        # `fill_momentum`. SGD's fused kernel does not support sharded parameters.
        devices = ("cpu",) if optimizer_class is torch.optim.Adagrad or keywords.get("dampening") else ("cpu", "cuda")
        supported = (p.device.type in devices and not is_sharded(p) for p in parameters)
        keywords["fused"] = all(supported) and all(p.is_floating_point() for p in parameters)
    return optimizer_class(parameters, lr=lr, **keywords)  # type: ignore[call-arg]  # torch types the base class only


def keeps_state_on_device(optimizer: Optimizer) -> bool:
    """Returns whether no part of the optimizer's state is on the host, where most optimizers count their steps."""
    if isinstance(optimizer, Muon):
        return all(group.get("fused", True) for group in optimizer.param_groups)
    return isinstance(optimizer, Lion | torch.optim.SGD) or bool(optimizer.defaults.get("fused"))


def fill_momentum(optimizer: Optimizer) -> None:
    """Initialises the momentum of fused SGD with zeros, which without dampening leaves the first step unchanged.

    PyTorch allocates the momentum at the first step and expects the kernel to fill it. On a GPU the kernel skips a step
    whose gradient is not finite, as the first step in fp16 often is, and the momentum would stay uninitialised.
    """
    for group in optimizer.param_groups:
        if isinstance(optimizer, torch.optim.SGD) and group["fused"] and group["momentum"] and not group["dampening"]:
            for parameter in group["params"]:
                if optimizer.state[parameter].get("momentum_buffer") is None:
                    optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def add_missing_state(optimizer: Optimizer) -> None:
    """Adds zeros for the state that the settings need and a loaded checkpoint lacks, e.g. RMSprop's new momentum.

    A stand-in with the same settings makes one step with a gradient of zeros; its state has every key.
    """
    for group in optimizer.param_groups:
        settings = {key: value for key, value in group.items() if key != "params"}
        settings |= {key: False for key in ("foreach", "fused", "capturable") if key in settings}
        settings["lr"] = 0.0
        for parameter in group["params"]:
            loaded = optimizer.state.get(parameter)
            if not loaded:  # the first step creates all of it
                continue
            stand_in = torch.zeros_like(parameter).requires_grad_()
            stand_in.grad = torch.zeros_like(stand_in)
            other = type(optimizer)([stand_in])  # type: ignore[call-arg]  # not the base class
            other.param_groups[0].update(settings)
            other.step()
            for key, value in other.state[stand_in].items():
                if loaded.get(key) is None and isinstance(value, torch.Tensor):
                    loaded[key] = torch.zeros_like(value)
    fill_momentum(optimizer)
