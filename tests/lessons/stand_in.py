"""Starts `mnist-dist`, `python` and `torchrun` in the shell of a lesson, forked from the server of tests/processes.py.

Called as `stand_in.py PROGRAM WORD …`. Imports only the standard library, so that a start takes milliseconds.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import processes


def main(program: str, words: list[str]) -> int:
    """Runs a program in this process's streams and folder; returns its exit code, or 1 if a rank of torchrun failed."""
    if program == "mnist-dist":
        words = ["-m", "mnist_dist", *words]
    if program != "torchrun":
        return processes.popen([sys.executable, *words], stdin=sys.stdin).wait()
    option, count, *words = words
    assert option in ("--nproc_per_node", "--nproc-per-node"), option
    port, base = processes.free_port(), os.environ | {"TORCHELASTIC_RUN_ID": "none"}
    environments = [base | processes.rank_variables(rank, int(count), port) for rank in range(int(count))]
    ranks = [processes.popen([sys.executable, *words], env=each) for each in environments]
    codes = [rank.wait() for rank in ranks]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
