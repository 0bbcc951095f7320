"""How the gradients of all processes meet: a hook of DistributedDataParallel."""

# No `from __future__ import annotations`: DistributedDataParallel compares a hook's annotations with classes.
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import (
    allreduce_hook,
    bf16_compress_hook,
    fp16_compress_hook,
)


class GradientClock:
    """How long this process waits for the others: from the last of its own gradients to the end of the backward pass.

    Data parallel sends gradients while later ones are computed; what is left when the last is there is pure waiting.
    By the host's clock, so on a GPU, whose work the host does not wait for, it stays 0.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._arrival: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether all of this process's gradients are there and those of others are not; for another thread to ask."""
        return self._arrival is not None

    def arrived(self) -> None:
        """The last of this process's gradients is there."""
        self._arrival = time.perf_counter()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Around whatever ends when the others' gradients are there."""
        yield
        if self._arrival is not None:
            self.seconds += time.perf_counter() - self._arrival
            self._arrival = None


HOOKS = {"none": allreduce_hook, "bf16": bf16_compress_hook, "fp16": fp16_compress_hook}


AWAKE_SECONDS = 0.01
"""So long a process waits for the others without falling asleep; who is later than that is not late by chance."""


YIELD = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has no such call


def reduce_gradients(
    model: nn.Module, device: torch.device, precision: Literal["none", "bf16", "fp16"], clock: GradientClock
) -> None:
    """Has `model`, if it is a DistributedDataParallel, send its gradients in `precision` (none: their own).

    On a CPU a process that has sent its last gradient asks again and again whether the others' are there, and lends its
    core to whoever wants it, for 10 ms; only then it sleeps. A core that sleeps wakes too slowly for a step of 10 ms.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return
    hook = HOOKS[precision]

    def awake(group: torch.distributed.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        future = hook(group, bucket)
        if bucket.is_last():
            clock.arrived()
            until = time.perf_counter() + AWAKE_SECONDS
            while not future.done() and time.perf_counter() < until:
                YIELD()
        return future

    if device.type == "cpu":
        model.register_comm_hook(None, awake)
    elif precision != "none":
        model.register_comm_hook(None, hook)
