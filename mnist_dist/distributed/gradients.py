"""Gradient reduction of DistributedDataParallel, and the time that a process waits for it."""

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
    """Measures how long this process waits for the gradients of the other processes.

    The wait lasts from the last local gradient to the end of the backward pass. Data parallel sends gradients while
    it computes the next ones, so this is the communication that does not overlap with computation. Times are taken on
    the host: on a GPU, which computes asynchronously, `seconds` stays 0.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.reductions = 0
        """Reductions that this process has started, eagerly or by the replay of a CUDA graph."""
        self._local_end: float | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether this process has computed its gradients and waits for the other ranks. Any thread may read it."""
        return self._local_end is not None

    def mark_local_end(self) -> None:
        """Records the time at which the last gradient of this process has been computed."""
        self._local_end = time.perf_counter()

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Encloses a backward pass, or any other code that ends when the gradients are reduced."""
        yield
        self.reductions += 1
        if self._local_end is not None:
            self.seconds += time.perf_counter() - self._local_end
            self._local_end = None


HOOKS = {"none": allreduce_hook, "bf16": bf16_compress_hook, "fp16": fp16_compress_hook}

POLL_SECONDS = 0.01
"""How long a process polls for the reduction before it sleeps. A wait longer than this is not jitter."""

YIELD = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has no sched_yield


def reduce_gradients(
    model: nn.Module, device: torch.device, precision: Literal["none", "bf16", "fp16"], clock: GradientClock
) -> None:
    """Registers the gradient reduction of `model`. Does nothing if `model` is not a DistributedDataParallel.

    On a CPU, a process that has sent its last gradient polls for up to `POLL_SECONDS` and yields its core to other
    processes. It sleeps only after that, because waking up takes too long for a training step of 10 ms.

    Args:
        precision: dtype in which gradients are sent; "none" sends them in their own dtype.
        clock: measures the wait.
    """
    if not isinstance(model, nn.parallel.DistributedDataParallel):
        return
    hook = HOOKS[precision]

    def polling_hook(group: torch.distributed.ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        future = hook(group, bucket)
        if bucket.is_last():
            clock.mark_local_end()
            deadline = time.perf_counter() + POLL_SECONDS
            while not future.done() and time.perf_counter() < deadline:
                YIELD()
        return future

    if device.type == "cpu":
        model.register_comm_hook(None, polling_hook)
    elif precision != "none":
        model.register_comm_hook(None, hook)
