"""The run that nobody disturbs, with which the cluster tests compare theirs."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path

from tests import processes


def train_undisturbed(folder: Path, words: Iterable[str]) -> Path:
    """Trains in one process of this machine, without a launcher; returns the run folder.

    Args:
        words: the recipe and its overrides, as on the command line of `train`.
    """
    command = [sys.executable, "-m", "mnist_dist.train", *words, "--run-dir", folder]
    processes.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True)
    return folder
