"""Prints what a launcher has told this process: `torchrun --nproc-per-node 2 launch/lessons/who.py`."""

import os

print("rank {RANK} of {WORLD_SIZE}: process {LOCAL_RANK} of machine {GROUP_RANK}".format(**os.environ))
