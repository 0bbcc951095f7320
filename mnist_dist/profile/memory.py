"""Memory of a training step by kind."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from mnist_dist.profile.phases import STEP
from mnist_dist.run.components import TrainingComponents

ACTIVATIONS = "activations and other tensors of one step"
DEVICE_TYPES = {"cpu": 0, "cuda": 1}
"""Number of a device's type in the profiler's memory events."""


def lasting_bytes(components: TrainingComponents) -> dict[str, int]:
    """Returns the bytes of the tensors that outlive a step, by kind, on this process. Call it after a step."""
    step = components.update
    parameters = list(components.module.parameters())
    state = [tensor for values in step.optimizer.state.values() for tensor in values.values()]
    averaged = step.average.module.state_dict().values() if step.average else ()
    images = step.data.images
    kinds = {
        "parameters": _bytes(parameters),
        "buffers": _bytes(components.module.buffers()),
        "gradients": _bytes(each.grad for each in parameters if each.grad is not None),
        "optimizer": _bytes(each for each in state if isinstance(each, Tensor)),
        "averaged weights": _bytes(averaged),
    }
    if images.device.type == components.accelerator.device.type:
        kinds["training images"] = _bytes([images])
    return {kind: size for kind, size in kinds.items() if size}


def _bytes(tensors: Iterable[Tensor]) -> int:
    local = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]  # FSDP: the part of this process
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def step_bytes(path: Path, device: torch.device) -> int:
    """Returns the largest number of bytes that the tensors of one step take at once.

    Counts the tensors that are made and freed within the step: activations, images, intermediate results.

    Args:
        path: a trace of two steps or more with memory events; the first complete step is read.
    """
    events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    first, end, *_ = sorted(event["ts"] for event in events if event.get("name") == STEP)
    on_device = [event for event in events if event.get("name") == "[memory]" and first <= event["ts"] < end]
    changes = sorted(
        (event["ts"], event["args"]["Addr"], event["args"]["Bytes"])
        for event in on_device
        if event["args"]["Device Type"] == DEVICE_TYPES.get(device.type, -1)
    )
    made: dict[int, tuple[int, int]] = {}  # address -> index of the change, bytes
    growth = [0] * len(changes)
    for index, (_, address, size) in enumerate(changes):
        if size > 0:
            made[address] = index, size
        elif address in made:
            start, taken = made.pop(address)
            growth[start], growth[index] = taken, -taken
    largest = now = 0
    for change in growth:
        now += change
        largest = max(largest, now)
    return largest
