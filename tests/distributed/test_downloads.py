"""In a shared folder, one process of the world downloads the data. With a disk on each node, one process per node."""

from __future__ import annotations

import os
import sys

import pytest

from tests.processes import free_port, rank_variables, run_in_each

PROGRAM = """
import os, time
from pathlib import Path
import torchvision
from mnist_dist import load_recipe
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.run.data import load_data
from tests.data.test_sources import family_files, write_family

def download(root, download):
    print("download", flush=True)
    time.sleep(0.5)
    write_family(Path(root), family_files("mnist"))

torchvision.datasets.MNIST = download
print(len(load_data(load_recipe("debug", "data.dataset=mnist", "data.limit_train=null", "data.limit_test=null"),
    launched_world()).train))
"""


@pytest.mark.parametrize(("shared", "downloads"), [(True, [1, 0]), (False, [1, 1])])
def test_each_folder_is_filled_once(shared, downloads, tmp_path):
    port = free_port()
    environments = [
        os.environ
        | {"ACCELERATE_USE_CPU": "true", "MNIST_DIST_DATA": str(tmp_path / ("data" if shared else str(rank)))}
        | rank_variables(rank, 2, port)
        | {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # two nodes with one process each
        for rank in range(2)
    ]
    done = run_in_each(environments, [sys.executable, "-c", PROGRAM], timeout=120)
    assert [each.returncode for each in done] == [0, 0], done
    assert [each.stdout.count("download") for each in done] == downloads
