"""Copies values to the host between two steps, and writes them to files in a thread while training continues."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from mnist_dist.distributed.devices import Moment
from mnist_dist.distributed.fsdp import is_sharded, map_tensors, unshard


class Writer:
    """Writes files in one thread, one after another in the order of the calls.

    After the first failure nothing more is written. The failure is raised by every later call of `write` and
    `wait_until_written`.

    Args:
        device: the device of the values. The thread waits until it has finished its copies to the host.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="writer")
        self._copies: dict[str, HostCopy] = {}
        self._jobs: dict[str, Future[None]] = {}
        self._error: BaseException | None = None
        self.seconds = 0.0
        """Seconds that the thread has worked."""

    def write(self, name: str, value: Any, job: Callable[[Any], object] | None) -> None:
        """Copies a value to the host and lets the thread call `job` with the copy.

        First waits for the earlier job of this name, because that job reads the memory that the new copy overwrites.
        Collective if there are sharded tensors: call on every rank.

        Args:
            name: of the memory that holds the copy.
            value: tensors, numbers, strings, and containers of them.
            job: writes the copy to a file. None on a rank that only takes part in gathering sharded tensors.

        Raises:
            BaseException: what an earlier job raised.
        """
        self.wait_until_written(name)
        copy = self._copies.setdefault(name, HostCopy(job is not None)).take(value)
        if job is not None:
            self._jobs[name] = self._thread.submit(self._run, Moment(self._device), copy, job)

    def reserve(self, name: str, value: Any) -> None:
        """Lets the thread get the memory for the first copy, so that `write` does not wait for it.

        Args:
            name: of the memory that holds the copy.
            value: has tensors of the shapes and dtypes of the later values. Only its tensors on the CPU get memory.
        """
        if name not in self._copies:
            copy = self._copies[name] = HostCopy()
            copy.reserve(value)
            self._jobs[name] = self._thread.submit(self._run, Moment(self._device), None, lambda _: copy.touch())

    def wait_until_written(self, *names: str) -> None:
        """Waits for the jobs of these names; without names, for all jobs.

        Raises:
            BaseException: what a job of any name raised.
        """
        for name in names or tuple(self._jobs):
            if name in self._jobs:
                self._jobs[name].result()
        if self._error is not None:
            raise self._error

    @property
    def has_failed(self) -> bool:
        """Whether a job has failed so far. Does not wait."""
        return self._error is not None

    def close(self) -> None:
        """Waits for all jobs and ends the thread. Raises nothing."""
        self._thread.shutdown()

    def _run(self, copied: Moment, copy: Any, job: Callable[[Any], object]) -> None:
        if self._error is not None:
            return
        began = time.perf_counter()
        try:
            copied.wait()
            job(copy)
        except BaseException as error:  # the thread that waits for the job raises it
            self._error = error
        self.seconds += time.perf_counter() - began


class HostCopy:
    """Memory of the host that holds the copy of a value. The next copy overwrites it.

    The memory for the tensors of a CUDA device is pinned, so the host does not wait for the copy: the device makes it
    before the next step. Sharded tensors are gathered one at a time, so a rank never holds more than one of them.

    Args:
        keeps: whether this rank gets the copy. The other ranks only take part in gathering.
    """

    def __init__(self, keeps: bool = True) -> None:
        self._keeps = keeps
        self._tensors: dict[tuple[Any, ...], Tensor] = {}

    @torch.no_grad()
    def take(self, value: Any) -> Any:
        """Returns a copy of the value; valid until the next call. Without `keeps`, all tensors are None.

        Args:
            value: tensors, numbers, strings, and dictionaries, lists and tuples of them. A tensor of the device "meta"
                has no memory and is returned as it is.
        """
        return map_tensors(self._take, value)

    def _take(self, path: tuple[Any, ...], value: Tensor) -> Tensor | None:
        value = unshard(value)
        if not self._keeps:
            return None
        if value.is_meta:
            return value
        return self._memory(value, path).copy_(value, non_blocking=value.is_cuda)

    def reserve(self, value: Any) -> None:
        """Gets memory for a later copy of the tensors of the CPU in the value. The system has not provided it yet."""

        def get(path: tuple[Any, ...], value: Tensor) -> None:
            if value.device.type == "cpu" and not is_sharded(value):
                self._memory(value, path)

        map_tensors(get, value)

    def touch(self) -> None:
        """Writes to all memory. The system provides a page at the first write to it, which takes longer than a copy."""
        for each in self._tensors.values():
            each.zero_()

    def _memory(self, value: Tensor, path: tuple[Any, ...]) -> Tensor:
        old = self._tensors.get(path)
        if old is None or (old.shape, old.dtype) != (value.shape, value.dtype):
            old = torch.empty_like(value, device="cpu", requires_grad=False, pin_memory=value.is_cuda)
            self._tensors[path] = old
        return old
