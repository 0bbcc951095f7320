"""FSDP2: shards parameters, gradients and optimizer state over the processes, and unshards them for weights files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def shard_parameters(module: nn.Module, device: torch.device, smallest: int, reshard: bool) -> None:
    """Shards every parameter over all processes; the gradients are averaged over them, as in data parallel.

    Collective: call on every rank.

    Args:
        smallest: a child with at least this many parameters is gathered and released separately; all smaller children
            are gathered and released together.
        reshard: release the parameters of a child between its forward and its backward pass.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for child in _callable_children(module):
        if sum(parameter.numel() for parameter in child.parameters()) >= smallest:
            fully_shard(child, mesh=mesh, reshard_after_forward=reshard)
            child.reshards = reshard  # type: ignore[assignment]  # FSDP2 has no getter for this setting
    fully_shard(module, mesh=mesh)


def _callable_children(module: nn.Module) -> Iterator[nn.Module]:
    """Yields the children, and the entries of a child that is a ModuleList or ModuleDict.

    FSDP2 unshards a module when it is called, and a list or dictionary of modules is never called.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _callable_children(child)
        else:
            yield child


@contextmanager
def unsharded_parameters(module: nn.Module) -> Iterator[None]:
    """Keeps all parameters on every rank inside the context, so that the number of calls may differ between ranks.

    Collective: call on every rank. Does nothing for a module without shards.
    """
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


def map_tensors(function: Callable[[tuple[Any, ...], Any], Any], value: Any, path: tuple[Any, ...] = ()) -> Any:
    """Returns the same dictionaries, lists and tuples with `function(path, tensor)` in the place of each tensor.

    Args:
        path: the keys and indices that lead to the value.
    """
    if isinstance(value, dict):
        return {key: map_tensors(function, each, (*path, key)) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(map_tensors(function, each, (*path, index)) for index, each in enumerate(value))
    return function(path, value) if isinstance(value, Tensor) else value


def is_sharded(tensor: Tensor) -> bool:
    """Returns whether each rank holds a part of the tensor."""
    return hasattr(tensor, "full_tensor")


def local_part(tensor: Any) -> Tensor:
    """Returns this rank's part of a sharded tensor, which shares its memory; any other tensor unchanged."""
    return tensor.to_local() if is_sharded(tensor) else tensor


def unshard(value: Any) -> Any:
    """Returns the same dictionary, list or tensor with every sharded tensor replaced by the full tensor.

    Collective: call on every rank, with the same structure in the same order.
    """
    return map_tensors(lambda _, tensor: tensor.full_tensor() if is_sharded(tensor) else tensor, value)


def shard_like(value: Tensor, pattern: Any) -> Tensor:
    """Shards the full tensor `value` like `pattern`; if `pattern` is not sharded, copies into its memory layout.

    A fused optimizer reads a parameter and its state as contiguous memory, so both must have the same layout. A tensor
    whose shape differs from that of `pattern` is returned unchanged.
    """
    if value.shape != pattern.shape:
        return value
    if not hasattr(pattern, "device_mesh"):
        return torch.empty_like(pattern, dtype=value.dtype, device=value.device).copy_(value)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(pattern.device), pattern.device_mesh, pattern.placements)


@torch.no_grad()
def shard_model_state(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Returns an unsharded `state_dict` in the form that `module` can load."""
    patterns = module.state_dict()
    return {name: shard_like(value, patterns.get(name, value)) for name, value in state.items()}


@torch.no_grad()
def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Returns an unsharded `state_dict` in the form that `optimizer` can load.

    A tensor with the shape of its parameter is sharded like the parameter. Only the parameter indices of the saved
    parameter groups are used: the other settings follow from the recipe, which a resume may change, or from the step.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    sharded = {
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
    return {"state": sharded, "param_groups": groups}
