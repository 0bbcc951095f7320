"""Sums the gradients over the processes, and measures how long a process waits for the sum."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain, compress, groupby
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mnist_dist.distributed.devices import has_core_per_thread

BUCKET_BYTES = 25 * 2**20
"""Largest size of a flat buffer that holds more than one gradient: the default of DistributedDataParallel."""

ALIGNMENT = 16
"""Every gradient starts at a multiple of this number of elements, because a GPU's vector instructions need it."""

DTYPES = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}

POLL_SECONDS = 0.01
"""How long a process polls for the reduction before it sleeps. A wait longer than this is not jitter."""

YIELD = getattr(os, "sched_yield", lambda: time.sleep(0))  # Windows has no sched_yield


class GradientClock:
    """Measures how long this process waits for the gradients of the other processes.

    The wait starts when the process has computed its own gradients, so it is the communication that does not overlap
    with computation. Times are taken on the host: on a GPU, which computes asynchronously, `seconds` stays close to 0.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.reductions = 0
        """Reductions that this process has started, eagerly or by the replay of a CUDA graph."""
        self.is_waiting = False
        """Whether this process has computed its gradients and waits for the other ranks. Any thread may read it."""

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Encloses a wait for the gradients of the other processes."""
        started, self.is_waiting = time.perf_counter(), True
        self.reductions += 1
        try:
            yield
        finally:
            self.is_waiting = False
            self.seconds += time.perf_counter() - started


class FlatGradients:
    """Sums the gradients over all processes, with one all-reduce for a whole buffer of them.

    After a step's last backward pass, `grad` of every parameter is a view of a flat buffer, and the buffer has been
    summed. There is one buffer per dtype. A large network has several, in the order of the backward pass: a full buffer
    is sent while the backward pass computes the gradients of the next one. All ranks send the buffers in the same
    order, and the order of additions depends on the positions in a buffer only, so a run can be repeated bit for bit
    and all ranks have the same sums.

    On a CPU, a process that has computed its gradients polls for up to `POLL_SECONDS`. It sleeps only after that,
    because waking up takes too long for a training step of 10 ms. Where there are more threads than cores, it sleeps at
    once: polling would take the core of a process that computes.

    The constructor copies parameters and buffers of rank 0 to all ranks. Collective: call on every rank.

    Args:
        precision: dtype in which gradients are sent; "none" sends them in their own dtype.
        allows_unused: whether a step need not use all parameters. Every rank then learns which parameters were used;
            a parameter that no rank has used keeps no gradient. On a GPU, the host waits for the device.
        clock: measures the wait.
    """

    def __init__(
        self, module: nn.Module, precision: Literal["none", "bf16", "fp16"], allows_unused: bool, clock: GradientClock
    ):
        for tensor in chain(module.parameters(), module.buffers()):
            sent = tensor.detach().contiguous()
            dist.broadcast(sent, 0)
            tensor.detach().copy_(sent)
        self.allows_unused, self._clock = allows_unused, clock
        on_cpu = next(module.parameters()).device.type == "cpu"
        self._polls = on_cpu and has_core_per_thread(dist.get_world_size())
        # The backward pass starts at the last layer.
        trained = [(name, each) for name, each in module.named_parameters() if each.requires_grad][::-1]
        self.buckets = [_Bucket(part, DTYPES[precision], allows_unused) for part in _split(trained)]
        self._sent: list[dist.Work] = []
        self._sends_early = False
        # A parameter without a gradient would leave its buffer unfinished on one rank only, in the middle of the pass.
        if len(self.buckets) > 1 and not allows_unused:
            for bucket in self.buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(partial(self._on_gradient, bucket))

    def start(self) -> None:
        """Makes every buffer be sent as soon as it is full. Call it before the last backward pass of a step."""
        self._sends_early = True
        for bucket in self.buckets:
            bucket.missing = len(bucket.parameters)

    def finish(self) -> None:
        """Sends the remaining buffers, waits, and sets `grad` to the sums.

        Collective: call on every rank after the last backward pass of a step.

        Raises:
            RuntimeError: a parameter received no gradient on this rank, although all are expected to.
        """
        self._sends_early = False
        while len(self._sent) < len(self.buckets):
            self._send()
        with self._clock.waiting():
            for work in self._sent:
                if self._polls:
                    _poll(work)
                work.wait()  # on a GPU, the stream waits and the host does not
        self._sent.clear()
        for bucket in self.buckets:
            bucket.receive()
        if not self.allows_unused and (unused := [name for bucket in self.buckets for name in bucket.unused]):
            message = f"no gradient for {', '.join(unused)} in this step; set ddp.find_unused_parameters=true"
            raise RuntimeError(message)

    def _on_gradient(self, bucket: _Bucket, parameter: Tensor) -> None:
        """Counts a gradient of the last backward pass. Buffers are sent in the order of their numbers."""
        if not self._sends_early:
            return
        if not bucket.missing:
            raise RuntimeError("a parameter received a second gradient in one backward pass, after the first was sent")
        bucket.missing -= 1
        while len(self._sent) < len(self.buckets) and not self.buckets[len(self._sent)].missing:
            self._send()

    def _send(self) -> None:
        bucket = self.buckets[len(self._sent)]
        bucket.fill()
        self._sent.append(dist.all_reduce(bucket.sent, async_op=True))


class _Bucket:
    """Parameters of one dtype, and the flat buffer that holds their gradients.

    Args:
        named: names and parameters.
        sent_dtype: dtype of the buffer that is sent; None for that of the parameters.
        has_flags: whether a flag per parameter is sent with the gradients: 1 if the parameter has one.
    """

    def __init__(self, named: list[tuple[str, nn.Parameter]], sent_dtype: torch.dtype | None, has_flags: bool):
        self.names, self.parameters = [name for name, _ in named], [each for _, each in named]
        self.missing = 0
        """Number of parameters whose gradient the current backward pass has not computed yet."""
        self.unused: list[str] = []
        """Parameters that had no gradient on this rank."""
        dtype = self.parameters[0].dtype
        flags = len(named) if has_flags else 0
        self.sent, self._sent_views = _flat_views(self.parameters, sent_dtype or dtype, flags)
        self._flags = self.sent[len(self.sent) - flags :]
        self.flat, self._views = self.sent, self._sent_views
        if self.sent.dtype != dtype:
            self.flat, self._views = _flat_views(self.parameters, dtype)

    @torch.no_grad()
    def fill(self) -> None:
        """Copies the gradients into the buffer that is sent, with 0 for a missing one, and frees them."""
        used = [each.grad is not None for each in self.parameters]
        gradients = [each.grad for each in self.parameters if each.grad is not None]
        if gradients:
            torch._foreach_copy_(list(compress(self._sent_views, used)), gradients)
        self.unused = [name for name, is_used in zip(self.names, used, strict=True) if not is_used]
        if self.unused:
            torch._foreach_zero_([view for view, is_used in zip(self._sent_views, used, strict=True) if not is_used])
        if len(self._flags):
            self._flags.copy_(torch.tensor(used))
        for parameter, view in zip(self.parameters, self._views, strict=True):
            parameter.grad = view

    def receive(self) -> None:
        """Writes the sums into the gradients, and removes those of parameters that no rank has used."""
        if self.flat is not self.sent:
            self.flat.copy_(self.sent[: len(self.flat)])
        if len(self._flags):
            for parameter, uses in zip(self.parameters, self._flags.tolist(), strict=True):
                if not uses:
                    parameter.grad = None


def _flat_views(parameters: list[nn.Parameter], dtype: torch.dtype, extra: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Returns zeros in one piece of memory, and for every parameter a view with its shape and memory layout.

    Args:
        extra: number of further elements at the end.
    """
    sizes = [-(-each.numel() // ALIGNMENT) * ALIGNMENT for each in parameters]
    flat = torch.zeros(sum(sizes) + extra, dtype=dtype, device=parameters[0].device)
    strides = [torch.empty_like(each, device="meta").stride() for each in parameters]  # those of dense memory
    pieces = zip(flat.split([*sizes, extra]), parameters, strides, strict=False)
    return flat, [piece.as_strided(each.shape, stride) for piece, each, stride in pieces]


def _split(named: list[tuple[str, nn.Parameter]]) -> Iterator[list[tuple[str, nn.Parameter]]]:
    """Yields the parameters of each bucket, in the given order within each dtype."""
    ordered = sorted(named, key=lambda pair: str(pair[1].dtype))
    for _, group in groupby(ordered, key=lambda pair: pair[1].dtype):
        bucket: list[tuple[str, nn.Parameter]] = []
        size = 0
        for name, parameter in group:
            size += parameter.nbytes
            if bucket and size > BUCKET_BYTES:
                yield bucket
                bucket, size = [], parameter.nbytes
            bucket.append((name, parameter))
        yield bucket


def _poll(work: dist.Work) -> None:
    """Waits for an all-reduce up to `POLL_SECONDS`, without sleeping."""
    deadline = time.perf_counter() + POLL_SECONDS
    while not work.is_completed() and time.perf_counter() < deadline:
        YIELD()
