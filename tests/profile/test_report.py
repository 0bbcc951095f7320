"""The tables of a profile, the slowest rank, and the advice."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest

from mnist_dist import load_recipe
from mnist_dist.profile.measurement import Profile, RankProfile
from mnist_dist.profile.phases import DATA, FORWARD, OPTIMIZER, PHASES, WAITING
from mnist_dist.profile.report import advise, overhead, print_report, slowest, unevenness
from mnist_dist.profile.trace import Usage
from mnist_dist.run.text_output import table_console


def rank(number: int = 0, on_device: bool = False, idle_seconds: dict[str, float] | None = None, **changes: float):
    """A rank with a step of 100 ms and no share that stands out, except for the changes, in milliseconds."""
    milliseconds = dict(zip(PHASES, (10, 30, 45, 5, 8, 2, 0), strict=True)) | {
        {"waiting": WAITING, "optimizer": OPTIMIZER}.get(name, name): value for name, value in changes.items()
    }
    return RankProfile(
        rank=number,
        host="node-7",
        cores=4,
        on_device=on_device,
        seconds={name: value / 1000 for name, value in milliseconds.items()},
        idle_seconds=idle_seconds or {},
        segments=[],
        step_starts=[],
        operations={"conv": Usage(40, 3_000_000), "mm": Usage(20, 1_000_000)},
        bytes={"parameters": 2**20, "gradients": 3 * 2**20},
        peak_mb=100 + number,
    )


def profile_of(*ranks: RankProfile) -> Profile:
    return Profile(20, plain_seconds=0.100, profiled_seconds=0.110, ranks=list(ranks))


@pytest.fixture
def recipe():
    return load_recipe("debug")


def test_a_step_without_a_large_share_gets_no_advice(recipe):
    assert advise(profile_of(rank()), recipe) == []


@pytest.mark.parametrize(
    ("measured", "words"),
    [
        (rank(data=40), ["data ", "data.augment"]),
        (rank(optimizer=40), ["clip and optimizer", "batch_size"]),
        (rank(logging=30), ["logging", "log_every"]),
        (rank(on_device=True, idle=50), ["idle", "engine.capture"]),
        (rank(on_device=True, idle=50, idle_seconds={DATA: 0.04, FORWARD: 0.01}), ["idle", "phase data"]),
    ],
)
def test_a_large_share_gets_one_line_of_advice(measured, words, recipe):
    [line] = advise(profile_of(measured), recipe)
    assert "\n" not in line and all(word in line for word in words)


def test_the_wait_for_a_slow_rank_names_the_rank(recipe):
    measured = profile_of(rank(0, forward=10, waiting=65), rank(1, forward=70, waiting=5), rank(2, waiting=45))
    assert slowest(measured).rank == 1
    assert unevenness(measured) == pytest.approx(135 / 75 - 1)
    [line] = advise(measured, recipe)
    assert "rank 1 on node-7" in line and "doctor" in line


def test_the_wait_of_equally_fast_ranks_is_for_the_network(recipe):
    measured = profile_of(rank(0, waiting=50), replace(rank(1, waiting=51), host="node-8"))
    [line] = advise(measured, recipe)
    assert "network" in line and "batch_size" in line and "lesson 6" in line
    [lesson] = (Path(__file__).parents[2] / "launch" / "lessons").glob("06_*.md")
    assert "reduction and waiting" in lesson.read_text(encoding="utf-8")


def test_on_one_machine_there_is_no_network(recipe):
    [line] = advise(profile_of(rank(0, waiting=50), rank(1, waiting=51)), recipe)
    assert "network" not in line and "comm_hook" not in line and "batch_size" in line and "lesson 6" in line


def test_processes_that_share_cores_are_advised_to_be_fewer(recipe):
    crowd = [rank(number, waiting=50 + 20 * number) for number in range(5)]
    [line] = advise(profile_of(*crowd), recipe)
    assert "5 processes" in line and "node-7" in line and "4 cores" in line
    [line] = advise(profile_of(*(replace(each, on_device=True) for each in crowd)), recipe)
    assert "cores" not in line, "a GPU computes"


def test_a_large_overhead_is_named(recipe):
    measured = replace(profile_of(rank()), profiled_seconds=0.2)
    assert overhead(measured) == pytest.approx(1.0)
    [line] = advise(measured, recipe)
    assert "100%" in line


def test_the_tables_show_every_rank_phase_operation_and_kind_of_memory(recipe):
    text = io.StringIO()
    print_report(profile_of(rank(0), rank(1, forward=80, on_device=False)), recipe, table_console(file=text))
    lines = text.getvalue().splitlines()
    cells = {line.split()[0]: line.split() for line in lines if line.split()}
    assert all(phase in text.getvalue() for phase in PHASES)
    assert cells["0"][1:4] == ["100.00", "10.0", "%"] and cells["0"][-1] == "-"
    assert cells["1"][1:3] == ["(slowest)", "150.00"]
    assert cells["conv"][1:] == ["75.0", "%", "150.000", "2.0"]
    assert cells["gradients"][1] == "3.00" and "101" in cells["the"]
    assert "+10%" in text.getvalue()
