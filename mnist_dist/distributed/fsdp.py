"""FSDP2: parameters, gradients and optimizer state in shards over the processes; whole in every checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def shard_parameters(module: nn.Module, device: torch.device, smallest: int, reshard: bool) -> None:
    """Cuts every parameter over all processes; the gradient is then averaged over them, as by data parallel.

    Args:
        smallest: children with at least so many parameters are gathered and released on their own, the rest together.
        reshard: release a child's parameters between its forward and its backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for child in _callable_children(module):
        if sum(parameter.numel() for parameter in child.parameters()) >= smallest:
            fully_shard(child, mesh=mesh, reshard_after_forward=reshard)
            child.reshards = reshard  # type: ignore[assignment]  # FSDP2 does not tell
    fully_shard(module, mesh=mesh)


def _callable_children(module: nn.Module) -> Iterator[nn.Module]:
    """The children that are called; of a list or dictionary of modules, which never is, what it holds."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _callable_children(child)
        else:
            yield child


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """While entered, each process holds all parameters, so that it may call the module as often as it likes."""
    sharded: list[Any] = [part for part in module.modules() if hasattr(part, "unshard")]
    for part in sharded:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in sharded:
            part.set_reshard_after_forward(getattr(part, "reshards", False), recurse=False)
            part.reshard()


def unshard(value: Any) -> Any:
    """The same dictionary, list or tensor with all shards put together; all processes ask, in the same order."""
    if isinstance(value, dict):
        return {key: unshard(each) for key, each in value.items()}
    if isinstance(value, list):
        return [unshard(each) for each in value]
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def shard_like(value: Tensor, pattern: Any) -> Tensor:
    """A whole tensor in the shards of `pattern`, or in its memory layout, if that has the same shape.

    A fused optimizer walks through a parameter and its state as through plain memory: their layouts must be the same.
    """
    if value.shape != pattern.shape:
        return value
    if not hasattr(pattern, "device_mesh"):
        return torch.empty_like(pattern, dtype=value.dtype, device=value.device).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements)


@torch.no_grad()
def shard_model_state(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """A whole `state_dict` as `module` can load it."""
    patterns = module.state_dict()
    return {name: shard_like(value, patterns.get(name, value)) for name, value in state.items()}


@torch.no_grad()
def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole `state_dict` as `optimizer` can load it: what has a parameter's shape is cut as the parameter is.

    Of its groups the parameters' numbers count alone: all else follows from the recipe, which a resume may change, or
    from the step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    cut = {
        index: {
            key: shard_like(value, parameters[index]) if isinstance(value, Tensor) else value
            for key, value in each.items()
        }
        for index, each in state["state"].items()
    }
    groups = [
        own | {"params": saved["params"]}
        for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {"state": cut, "param_groups": groups}
