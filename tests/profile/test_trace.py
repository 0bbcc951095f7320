"""Timelines, shares and operations that are read from traces of a CPU and of a GPU, and the memory of a step."""

from __future__ import annotations

import pytest
import torch

from mnist_dist.profile.measurement import without_overhead
from mnist_dist.profile.memory import step_bytes
from mnist_dist.profile.phases import BACKWARD, DATA, FORWARD, IDLE, LOGGING, OPTIMIZER, STEP, WAITING
from mnist_dist.profile.trace import Segment, Trace, durations, flatten
from tests.profile.traces import BASE, allocation, kernel, mark, operation, step_on_cpu, write

START = BASE / 1000


def test_the_interval_that_started_last_counts():
    intervals = [Segment("a", 0, 10), Segment("b", 2, 6), Segment("c", 4, 5), Segment("d", 12, 13)]
    found = [("a", 0, 2), ("b", 2, 4), ("c", 4, 5), ("b", 5, 6), ("a", 6, 10), ("d", 12, 13)]
    assert flatten(intervals) == found
    assert flatten([*intervals, Segment("a", 10, 11)])[-2] == ("a", 6, 11)


def test_a_hidden_phase_counts_only_alone():
    intervals = [Segment("a", 0, 4), Segment("hidden", 2, 8), Segment("a", 5, 6)]
    assert flatten(intervals, hidden="hidden") == [("a", 0, 4), ("hidden", 4, 5), ("a", 5, 6), ("hidden", 6, 8)]


def test_durations_count_the_parts_within_the_limits():
    segments = [Segment("a", 0, 4), Segment("b", 4, 6), Segment("a", 8, 12)]
    assert durations(segments, 3, 9) == {"a": 2, "b": 2}
    assert durations([], 0, 1) == {}


def test_the_shares_of_a_step_on_a_cpu(tmp_path):
    events = [event for number in range(4) for event in step_on_cpu(100 * number)]
    trace = Trace(write(tmp_path / "trace.json", *events), steps=2)
    assert trace.starts == [START + 100, START + 200, START + 300]  # the last complete steps
    expected = {DATA: 10, FORWARD: 20, BACKWARD: 30, WAITING: 15, OPTIMIZER: 15, LOGGING: 10, IDLE: 0}
    assert trace.seconds() == pytest.approx({name: time / 1e6 for name, time in expected.items()})
    order = [DATA, FORWARD, BACKWARD, WAITING, OPTIMIZER, LOGGING]
    assert [each.phase for each in trace.timeline if each.end <= trace.starts[-1]] == order * 2
    assert trace.idle_seconds() == {}


def test_the_time_of_an_operation_is_without_those_that_it_calls(tmp_path):
    operations = [
        operation("too early", -10, 5),
        operation("linear", 10, 30),
        operation("mm", 15, 10),
        operation("copy", 16, 4),
        operation("mm", 30, 5),
        operation("mm", 12, 8, thread=2),
    ]
    trace = Trace(write(tmp_path / "trace.json", *step_on_cpu(0), *step_on_cpu(100), *operations), steps=1)
    assert trace.operations() == {"linear": (1, 15.0), "mm": (3, 6.0 + 5 + 8), "copy": (1, 4.0)}


def test_kernels_belong_to_the_phase_that_launched_them(tmp_path):
    """The GPU is 50 µs behind the host. The reduction overlaps with the backward pass for 10 of its 25 µs."""
    events = [event for number in range(3) for event in step_on_cpu(100 * number)]
    for number in range(3):
        start = 100 * number
        events += kernel("warp", start + 7, start + 57, 10, 10 * number)
        events += kernel("conv", start + 20, start + 70, 20, 10 * number + 1)
        events += kernel("conv_backward", start + 40, start + 90, 20, 10 * number + 2)
        events += kernel("ncclDevKernel_AllReduce", start + 50, start + 100, 25, 10 * number + 3)
        events += kernel("adam", start + 80, start + 130, 5, 10 * number + 4)
    trace = Trace(write(tmp_path / "trace.json", *events), steps=2)
    assert trace.step_starts == [START + 57, START + 157, START + 257]
    expected = {DATA: 10, FORWARD: 20, BACKWARD: 20, WAITING: 15, OPTIMIZER: 5, IDLE: 30}
    assert trace.seconds() == pytest.approx({name: time / 1e6 for name, time in expected.items()})
    assert trace.operations() == {
        "warp": (2, 20), "conv": (2, 40), "conv_backward": (2, 40), "ncclDevKernel_AllReduce": (2, 50), "adam": (2, 10)
    }  # fmt: skip
    # While the GPU is idle, from 67 to 70, 125 to 130 and 135 to 157, the host is in these phases.
    idle = {WAITING: 3, FORWARD: 5, BACKWARD: 22}
    assert trace.idle_seconds() == pytest.approx({name: time / 1e6 for name, time in idle.items()})


def test_a_gpu_that_is_not_profiled_is_idle_for_less(tmp_path):
    seconds = {FORWARD: 0.002, BACKWARD: 0.003, IDLE: 0.005}
    assert without_overhead(seconds, plain=0.006) == pytest.approx({FORWARD: 0.002, BACKWARD: 0.003, IDLE: 0.001})
    assert without_overhead(seconds, plain=0.004)[IDLE] == 0


def test_too_few_steps_are_an_error(tmp_path):
    with pytest.raises(AssertionError, match="2 of 3"):
        Trace(write(tmp_path / "trace.json", *step_on_cpu(0), *step_on_cpu(100)), steps=2)


def test_the_memory_of_a_step_counts_tensors_that_the_step_makes_and_frees(tmp_path):
    events = [mark(STEP, 0), mark(STEP, 100), mark(STEP, 200)]
    events += [allocation(10, 1000, 1), allocation(20, 500, 2), allocation(30, -1000, 1), allocation(40, 800, 1)]
    events += [allocation(50, -500, 2), allocation(60, -800, 1)]
    events += [allocation(15, 9999, 3)]  # outlives the step: a gradient
    events += [allocation(16, -7777, 4)]  # is older than the step
    events += [allocation(17, 5555, 5, device_type=1), allocation(18, -5555, 5, device_type=1)]
    events += [allocation(150, 6666, 6), allocation(160, -6666, 6)]  # another step
    path = write(tmp_path / "trace.json", *events)
    assert step_bytes(path, torch.device("cpu")) == 1500
    assert step_bytes(path, torch.device("cuda")) == 5555
