"""Starts the processes of one machine as torchrun does, in the shell of a lesson.

torchrun itself would take a second of CPU time per launch. Imports only the standard library.
"""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests import processes

OPTIONS = {"nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port"}
"""The options of torchrun that lessons use."""


def main(words: list[str]) -> int:
    """Starts one process per rank in this process's streams and folder; returns 1 if one failed, otherwise 0."""
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
    sys.exit(main(sys.argv[1:]))
