"""The order in which the processes of xdist start the tests."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.conftest import waiting_first

ROOT = Path(__file__).parent


def collected(**files: int) -> list[Any]:
    """Returns stand-ins for the collected tests: so many of one file in each folder."""
    return [SimpleNamespace(path=ROOT / name / "test_it.py") for name, count in files.items() for _ in range(count)]


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 16])
def test_each_process_starts_with_its_share_of_the_waiting_tests(workers):
    items = collected(data=50, distributed=5, doctor=4, engine=60, faults=3, launch=8, lessons=6, run=40)
    ordered = waiting_first(items, workers)
    assert sorted(map(id, ordered)) == sorted(map(id, items))
    folders = [item.path.parent.name for item in ordered]
    waiting = ["lessons", "faults", "launch", "doctor", "distributed"]
    for worker in range(workers):
        part = folders[len(items) * worker // workers : len(items) * (worker + 1) // workers]
        assert list(dict.fromkeys(part))[: len(waiting[worker::workers])] == waiting[worker::workers]
        assert sum(folder in waiting for folder in part) == sum(
            folders.count(name) for name in waiting[worker::workers]
        )


def test_no_test_is_lost_if_only_waiting_tests_run():
    items = collected(distributed=5, launch=2)
    for workers in (1, 4):
        assert sorted(map(id, waiting_first(items, workers))) == sorted(map(id, items))


def test_a_test_that_waits_for_the_compiler_is_among_the_first():
    items = collected(engine=40, launch=2)
    items[7].fixturenames = ["compiler"]
    for workers in (1, 2):
        ordered = waiting_first(items, workers)
        assert ordered.index(items[7]) in (0, len(items) // 2)
