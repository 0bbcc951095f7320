"""Waits until every process of a world has started, before the processes form a process group.

Without this module, torch would wait half an hour for a process that never starts, and handle no signal meanwhile.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from mnist_dist.distributed.world_size_option import is_elastic

JOIN_SECONDS = 600.0
"""A process waits this long for the others. torchrun, too, waits ten minutes for its machines."""

ELASTIC_SECONDS = 60.0
"""The wait in an elastic world. A machine that was lost while the processes started never joins this world."""

NOTE_SECONDS = 30.0
"""After this time a process prints once what it is waiting for."""


def join(world: dict[str, str]) -> dict[str, Any]:
    """Waits until every process of the world has called this function. Collective: call on every rank.

    The processes find each other through a store. Rank 0 hosts it, unless torchrun does.

    Args:
        world: the variables that `read_world` returns for a world of several processes.

    Returns:
        Keywords of `torch.distributed.init_process_group`: store, rank and world_size.

    Raises:
        TimeoutError: a process has not joined in time; the message names its rank.
        OSError, RuntimeError: the port is taken, or the store cannot be reached.
    """
    rank, size = int(world["RANK"]), int(world["WORLD_SIZE"])
    host, port = world["MASTER_ADDR"], int(world["MASTER_PORT"])
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    deadline = time.monotonic() + _seconds()
    if not hosts:
        _wait(lambda: _accepts(host, port), lambda: f"for rank 0 at {host}:{port}", rank, deadline)
    left = timedelta(seconds=max(deadline - time.monotonic(), 1))
    store: dist.Store = dist.TCPStore(
        host, port, is_master=hosts, wait_for_workers=False, multi_tenant=hosts, timeout=left
    )
    store.set_timeout(default_pg_timeout)
    store = dist.PrefixStore(_attempt(), store)
    keys = [f"joined/{each}" for each in range(size)]
    store.set(keys[rank], "")

    def describe_missing() -> str:
        missing = [str(each) for each, key in enumerate(keys) if not store.check([key])]
        return f"for rank {', '.join(missing)} of {size}"

    _wait(lambda: store.check(keys), describe_missing, rank, deadline)
    return {"store": dist.PrefixStore("default_pg", store), "rank": rank, "world_size": size}


def _attempt() -> str:
    """Returns a name that torchrun's processes share until torchrun restarts them.

    On one machine torchrun keeps its store, which holds the addresses of dead processes after a restart
    (https://github.com/pytorch/pytorch/issues/135712). Several machines count their restarts differently.
    """
    single = os.environ.get("GROUP_WORLD_SIZE") == "1"
    return f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0') if single else '0'}"


def _seconds() -> float:
    """Returns how long a process waits for the others."""
    return ELASTIC_SECONDS if is_elastic() else JOIN_SECONDS


def _accepts(host: str, port: int) -> bool:
    """Returns whether a process listens at this address."""
    try:
        with closing(socket.create_connection((host, port), timeout=5)):
            return True
    except OSError:
        return False


def _wait(condition: Callable[[], bool], describe: Callable[[], str], rank: int, deadline: float) -> None:
    """Waits until a condition holds. Between two checks Python handles signals.

    Args:
        condition: checked ten times a second.
        describe: returns the object of the wait, for a message such as "waits for rank 1 of 2".
        rank: the rank of this process, for the message.
        deadline: the time of `time.monotonic` at which the wait ends.

    Raises:
        TimeoutError: the condition does not hold at the deadline.
    """
    note_at = time.monotonic() + NOTE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {_seconds():.0f} s {describe()}")
        if time.monotonic() > note_at:
            note_at = deadline + 1
            print(f"mnist_dist: rank {rank} waits {describe()}", file=sys.stderr, flush=True)
        time.sleep(0.1)
