"""An action on all ranks: an error of one rank reaches all of them."""

from __future__ import annotations

import sys

from tests.processes import run_ranks

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
