"""Starts `mnist-dist`, `python` and `torchrun` in the shell of a lesson, forked from the server of tests/processes.py.

Called as `stand_in.py PROGRAM WORD …`. Imports only the standard library, so that a start takes milliseconds.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import processes

OPTIONS = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
"""The options of torchrun that lessons use."""


def main(program: str, words: list[str]) -> int:
    """Runs a program in this process's streams and folder; returns its exit code, or 1 if a rank of torchrun failed."""
    if program == "mnist-dist":
        words = ["-m", "mnist_dist", *words]
    if program != "torchrun":
        return processes.popen([sys.executable, *words], stdin=sys.stdin).wait()
    options = {"nnodes": "1", "node_rank": "0", "master_port": str(processes.free_port())}
    while words[0].startswith("--"):
        option, value, *words = words
        options[option.removeprefix("--").replace("-", "_")] = value
    assert options.keys() <= OPTIONS, options
    each, machine = int(options["nproc_per_node"]), int(options["node_rank"])
    ranks = []
    for local in range(each):
        rank, size = machine * each + local, int(options["nnodes"]) * each
        variables = processes.rank_variables(rank, size, int(options["master_port"]))
        variables |= {"LOCAL_RANK": str(local), "LOCAL_WORLD_SIZE": str(each), "GROUP_RANK": str(machine)}
        variables |= {"TORCHELASTIC_RUN_ID": "none"}
        ranks.append(processes.popen([sys.executable, *words], env=os.environ | variables))
    codes = [rank.wait() for rank in ranks]
    return int(any(codes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))
