"""What the live page shows of a run, from run folders in every state, also from strangers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from mnist_dist.compare.page import Page, PageRun, to_json
from mnist_dist.compare.watch import CHECKPOINTS, MESSAGES, MOST_RUNS, watch, watched
from mnist_dist.run.reader import SILENCE, RunReader
from tests.compare.test_compare import write_run


def process_lines(*steps: int) -> str:
    """Lines of metrics.jsonl of two processes, ten steps an epoch."""
    figures = {"train/loss": 0.5, "train/images_per_second": 30.0, "train/waiting_percent": 25.0}
    for rank, (speed, wait) in enumerate(((10.0, 40.0), (20.0, 10.0))):
        figures |= {f"process/{rank}/images_per_second": speed, f"process/{rank}/waiting_percent": wait}
    return "".join(json.dumps({"step": step, "epoch": step / 10} | figures) + "\n" for step in steps)


def start(step: int, cause: str = "start") -> str:
    time = "2026-11-01T10:00:00+00:00"
    return json.dumps({"time": time, "step": step, "processes": 2, "nodes": 1, "cause": cause}) + "\n"


@pytest.fixture
def running(tmp_path) -> Path:
    """A run of two processes after 6 of 30 steps of 60 images."""
    path = write_run(tmp_path / "run", status="running", recipe={"batch_size": 60})
    (path / "metrics.jsonl").write_text(process_lines(2, 4, 6))
    (path / "world.jsonl").write_text(start(0))
    (path / "console.log").write_text("".join(f"message {number}\n" for number in range(20)))
    for step in (1, 2, 3, 4, 5, 10):
        (path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    return path


def test_a_running_run_shows_processes_checkpoints_messages_and_the_time_left(running):
    found = watch(RunReader(running))
    assert found["state"] == "running"
    assert (found["step"], found["steps"], found["epoch"], found["epochs"]) == (6, 30, 0.6, 3)
    assert found["left"] == (30 - 6) * 60 / 30.0
    assert (found["speed"], found["waiting"]) == (30.0, 25.0)
    assert found["processes"] == [[0, 10.0, 40.0], [1, 20.0, 10.0]]
    assert [step for step, _ in found["checkpoints"]] == [10, 5, 4, 3][:CHECKPOINTS]
    assert all(abs(written - time.time()) < 3600 for _, written in found["checkpoints"])
    assert found["messages"] == [f"message {number}" for number in range(20)][-MESSAGES:]
    assert [each["cause"] for each in found["starts"]] == ["start"]


def test_figures_from_before_the_last_start_are_not_shown_as_current(running):
    with (running / "world.jsonl").open("a") as file:
        file.write(start(6, "resumed after a failure"))
    found = watch(RunReader(running))
    assert (found["step"], found["speed"], found["processes"], found["logged"]) == (6, None, [], None)
    with (running / "metrics.jsonl").open("a") as file:
        file.write(process_lines(8))
    found = watch(RunReader(running))
    assert (found["step"], found["speed"], len(found["processes"])) == (8, 30.0, 2)


def test_a_run_without_steps_has_no_figures(tmp_path):
    path = write_run(tmp_path / "run", status="running", steps=0)
    found = watch(RunReader(path))
    assert [found[key] for key in ("step", "left", "speed", "accuracy", "logged")] == [None] * 5
    assert found["processes"] == found["checkpoints"] == found["starts"] == found["messages"] == []


@pytest.mark.parametrize("status", ["done", "failed", "preempted"])
def test_the_state_and_its_time_come_from_status(tmp_path, status):
    path = write_run(tmp_path / "run", status=status)
    os.utime(path / "STATUS", (0, 1e9))
    found = watch(RunReader(path))
    assert (found["state"], found["since"]) == (status, 1e9)


def test_a_lock_that_is_not_renewed_is_no_sign_of_life(running):
    lock = running / "run.lock"
    lock.write_text(json.dumps({"machine": "another", "silent_seconds": 60}))
    assert watch(RunReader(running))["state"] == "running"
    for path in [*running.iterdir(), lock]:
        os.utime(path, (0, 1e9))
    os.utime(lock, (0, 1e9 + 5))
    reader = RunReader(running)
    assert (watch(reader)["state"], watch(reader)["since"]) == ("silent", 1e9 + 5)
    os.utime(lock)
    assert watch(reader)["state"] == "running", "a run that waits writes no other file"
    lock.unlink()
    assert watch(reader)["state"] == "silent", "without a lock, the files show it"
    (running / "STATUS").touch()
    reader.refresh()
    assert watch(reader)["state"] == "running" and SILENCE > 60


def test_unfinished_runs_and_the_newest_run_are_shown_in_detail(tmp_path):
    for number in range(3):
        os.utime(write_run(tmp_path / f"done-{number}") / "metrics.jsonl", (0, 2e9 + number))
    write_run(tmp_path / "failed", status="failed")
    names = [run.folder.path.name for run in watched([RunReader(path) for path in sorted(tmp_path.iterdir())])]
    assert names == ["done-2", "failed"]
    for number in range(MOST_RUNS + 2):
        write_run(tmp_path / f"more-{number}", status="preempted")
    assert len(watched([RunReader(path) for path in sorted(tmp_path.iterdir())])) == MOST_RUNS
    assert watched([]) == []


# --- untrusted folders --------------------------------------------------------------------------------------------

NO_NUMBERS = ["x", None, True, [1], {}, 10**400, float("nan"), float("inf")]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=lambda value: str(value)[:8])
def test_values_that_are_no_numbers_are_left_out_and_the_page_is_json(running, value):
    keys = ("step", "epoch", "train/loss", "eval/accuracy", "train/images_per_second", "process/0/images_per_second")
    lines = [{"step": 8, "epoch": 0.8, "train/loss": 1.0} | {key: value} for key in keys]
    with (running / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
        file.write(json.dumps(dict.fromkeys((*keys, "process/1e9/images_per_second"), value)) + "\n")
    (running / "recipe.yaml").write_text(f"name: x\nbatch_size: {str(value)[:30]}\nepochs: {{}}\n")
    reader = RunReader(running)
    run = PageRun("x", "x", "x", {}, 0, reader.status, None, reader.lines, 1, running, watch=watch(reader))
    to_json(Page(str).data([run], {}))


def test_extreme_numbers_give_json(running):
    with (running / "metrics.jsonl").open("a") as file:
        for values in ((1e99, 1e-99), (-1e99, -1e99), (1, 1e-320), (10**99, 1), (5, 0)):
            line = dict(zip(("step", "epoch"), values, strict=True))
            file.write(json.dumps({**line, "train/loss": 1, "train/images_per_second": 1e-320}) + "\n")
            file.flush()
            to_json(watch(RunReader(running)))


def test_links_pipes_and_binary_files_are_not_shown(running, tmp_path):
    (tmp_path / "secret").write_text("secret\n")
    (tmp_path / "elsewhere" / "step-99").mkdir(parents=True)
    (running / "console.log").unlink()
    (running / "console.log").symlink_to(tmp_path / "secret")
    (running / "checkpoints").rename(tmp_path / "moved")
    (running / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (running / "best.safetensors").symlink_to(tmp_path / "secret")
    found = watch(RunReader(running))
    assert (found["messages"], found["checkpoints"], found["best"][2]) == ([], [], None)
    (running / "console.log").unlink()
    os.mkfifo(running / "console.log")
    (running / "run.lock").symlink_to(tmp_path / "secret")
    assert watch(RunReader(running))["messages"] == []
    (running / "console.log").unlink()
    (running / "console.log").write_bytes(b"\x1b[2J\xff \x00end\n")
    assert watch(RunReader(running))["messages"] == ["�[2J� �end"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "7", '{"machine": 1}', "{}", '{"silent_seconds": "x"}', "[" * 10_000]
)
def test_a_lock_of_any_content_is_read(running, content):
    (running / "run.lock").write_text(content)
    assert RunReader(running).silent_since is None


@pytest.mark.parametrize("process", [{}, {"pid": "x"}, {"pid": -1}, {"pid": 10**30}, {"pid": 1, "started": "x"}])
def test_a_lock_that_claims_this_machine_is_read(running, monkeypatch, process):
    monkeypatch.setattr("mnist_dist.run.lock._is_of_this_machine", lambda content: True)
    (running / "run.lock").write_text(json.dumps(process))
    assert RunReader(running).silent_since is None or "pid" in process
