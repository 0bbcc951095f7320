"""Actions on all ranks: every rank learns the results and errors of all, even if a rank raises or is killed."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import torch

from mnist_dist.doctor.ranks import Ranks
from tests.processes import free_port, popen, rank_variables


def test_an_action_runs_on_a_device_without_an_index():
    """Accelerate names the GPU of a single process without an index."""
    state: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cuda"))
    assert Ranks(state).run(lambda: 1) == [1]


PROGRAM = """
import os, time, torch, torch.distributed as dist
from mnist_dist.doctor import ranks
from mnist_dist.distributed.launcher import launched_world
ranks.TIMEOUT, ranks.GRACE_SECONDS = 120.0, 1.0
world = ranks.Ranks(launched_world())

def fail():
    if world.rank == 1:
        raise KeyError("no such thing")
    return "fine"

def reduce():
    fail()
    dist.all_reduce(torch.ones(1))

def run(action, **options):
    started = time.monotonic()
    try:
        found = world.run(action, **options)
    except ranks.ActionFailed as failure:
        found = failure.errors, failure.results
    print(found, time.monotonic() - started < 60, flush=True)

run(lambda: world.rank)
run(fail)
run(reduce, collective=True)
run(reduce, collective=True)
run(lambda: os._exit(9) if world.rank == 1 else None, timeout=3)
run(lambda: "one rank")
world.finish(7)
"""


def test_a_rank_that_raises_or_dies_is_named_on_all_ranks_without_a_long_wait():
    port, processes = free_port(), []
    for rank in (0, 1):
        variables = os.environ | rank_variables(rank, 2, port)
        processes.append(popen([sys.executable, "-c", PROGRAM], env=variables, stdout=subprocess.PIPE))
    printed = [(process.communicate(timeout=300)[0] or "").splitlines() for process in processes]
    assert [process.returncode for process in processes] == [7, 9]
    error = "{1: \"KeyError: 'no such thing'\"}"
    skipped = "not run: an earlier collective failed"
    assert printed[0] == [
        "[0, 1] True",
        f"({error}, {{0: 'fine'}}) True",
        f"({error}, {{}}) True",
        f"({ {0: skipped, 1: skipped} }, {{}}) True",
        "({1: 'does not report any more'}, {0: None}) True",
        "({1: 'does not report any more'}, {0: 'one rank'}) True",
    ]
    assert printed[1] == printed[0][:4]
