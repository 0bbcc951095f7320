"""An action that runs on all ranks: an error on one rank is raised on all of them."""

from __future__ import annotations

import os
import re
import sys

import pytest

from tests.processes import free_port, rank_variables, run_in_each, run_ranks

PROGRAM = """
from mnist_dist.distributed.collectives import count_nodes, run_on_all_ranks
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.errors import Problem, RecipeError

state = launched_world()

def fail_on_rank_1():
    if state.process_index == 1:
        raise RecipeError([Problem("rank 1", "a.key", "message", "range")])

try:
    run_on_all_ranks(state, fail_on_rank_1)
except RecipeError as error:
    print([(problem.where, problem.key, problem.kind) for problem in error.problems])
print(run_on_all_ranks(state, lambda: state.process_index), count_nodes(state))
"""


def test_an_error_on_one_rank_is_raised_on_all():
    done = run_ranks(2, [sys.executable, "-c", PROGRAM])
    expected = "[('rank 1', 'a.key', 'range')]"
    assert [each.stdout.splitlines() for each in done] == [[expected, "0 1"], [expected, "1 1"]]


ANY_ERROR = """
import sys
from mnist_dist.cli import run_command
from mnist_dist.distributed.collectives import run_on_all_ranks
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.train import torch

state = launched_world()

def fail_on_one_rank():
    if state.process_index == int(sys.argv[2]):
        raise eval(sys.argv[1])

sys.exit(run_command(lambda: run_on_all_ranks(state, fail_on_one_rank) or 0))
"""


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize(
    ("error", "name"),
    [
        ("OSError(28, 'No space left', 'file')", "OSError"),
        ("torch.OutOfMemoryError('too large')", "OutOfMemoryError"),
        ("KeyError('a bug')", "KeyError"),
        ("SystemExit(3)", "SystemExit"),
    ],
)
def test_any_error_on_one_rank_ends_all_and_is_named(error, name, failing):
    port = free_port()
    environments = [os.environ | {"ACCELERATE_USE_CPU": "true"} | rank_variables(rank, 2, port) for rank in range(2)]
    program = ANY_ERROR.replace("import sys", "import sys, mnist_dist.errors as errors; errors.RANK_0_SECONDS = 0.1", 1)
    done = run_in_each(environments, [sys.executable, "-c", program, error, failing], timeout=120)
    assert all(each.returncode for each in done)
    other = done[1 - failing]
    assert other.returncode == 1 and "Traceback" not in other.stderr
    assert f"rank {failing} " in other.stderr and name in other.stderr
    line = re.compile(rf"^(\[rank\d\]: )?[\w.]*{name}: ", re.MULTILINE)  # the last line of a traceback
    assert name == "SystemExit" or line.search(done[failing].stderr), "the failed rank prints its traceback"
