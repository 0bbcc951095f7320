"""The command `profile` in one and in two processes: its files, its figures, and what it refuses."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState

from mnist_dist.errors import RunError
from mnist_dist.profile import __main__ as command
from mnist_dist.profile.phases import IDLE, PHASES, PREFIX, WAITING
from mnist_dist.run.reader import find_runs
from tests import processes

STEPS = 4
WORDS = ["--recipe", "debug", "--steps", str(STEPS), "batch_size=32"]


@pytest.fixture(autouse=True)
def _new_accelerator_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def read_trace(folder: Path, rank: int) -> list[dict[str, Any]]:
    return json.loads(gzip.decompress((folder / f"trace_rank{rank}.json.gz").read_bytes()))["traceEvents"]


def check_files(folder: Path, world_size: int) -> list[dict[str, Any]]:
    """Checks what every profile holds; returns the figures of the ranks."""
    traces = {f"trace_rank{rank}.json.gz" for rank in range(world_size)}
    assert {path.name for path in folder.iterdir()} == {
        "profile.json", "profile.txt", "timelines.png", "profiled_recipe.yaml", *traces
    }  # fmt: skip
    content = json.loads((folder / "profile.json").read_text())
    assert (content["steps"], content["phases"]) == (STEPS, list(PHASES))
    assert content["plain_seconds"] > 0 and content["profiled_seconds"] > 0
    assert (folder / "timelines.png").read_bytes().startswith(b"\x89PNG")
    assert [rank["rank"] for rank in content["ranks"]] == list(range(world_size))
    for rank in content["ranks"]:
        spans = dict.fromkeys(PHASES, 0.0)
        for name, start, end in rank["segments"]:
            spans[name] += end - start
        assert sum(spans.values()) == pytest.approx(rank["step_starts"][-1] - rank["step_starts"][0])
        for name in PHASES:
            always = name not in (IDLE, WAITING) or (name == WAITING and world_size > 1)
            assert (rank["seconds"].get(name, 0) > 0) == (spans[name] > 0) == always, name
        assert len(rank["step_starts"]) == 4
        assert rank["operations"]["aten::convolution_backward"][0] == 2 * STEPS
        assert rank["bytes"]["parameters"] == rank["bytes"]["gradients"] == 4 * 61_706
        assert rank["bytes"]["optimizer"] >= 2 * 4 * 61_706
        # The first convolution's output, 6×28×28 float32 of each image, is kept for the backward pass.
        assert max(each for kind, each in rank["bytes"].items() if "activations" in kind) > 32 // world_size * 18_816
        names = {event["name"] for event in read_trace(folder, rank["rank"])}
        assert {PREFIX + name for name in PHASES if name not in (IDLE, WAITING)} <= names
    return content["ranks"]


def test_one_process(tmp_path, capsys):
    assert command.main([*WORDS, "--run-dir", str(tmp_path)]) == 0
    check_files(tmp_path / "profile", 1)
    printed = capsys.readouterr().out
    assert all(name in printed for name in PHASES) and "overhead" in printed
    assert "aten::convolution_backward" in (tmp_path / "profile" / "profile.txt").read_text()
    assert list(find_runs(tmp_path)) == [], "a profile is not a run"


def test_two_processes(tmp_path):
    argv = [sys.executable, "-m", "mnist_dist.profile", *WORDS, "--run-dir", tmp_path, "--world-size", 2]
    first, second = processes.run_ranks(2, argv)
    ranks = check_files(tmp_path / "profile", 2)
    assert "slowest: rank" in first.stdout and second.stdout == ""
    # Both ranks use the clock of the machine, so their steps overlap.
    starts, ends = zip(*((rank["step_starts"][0], rank["step_starts"][-1]) for rank in ranks), strict=True)
    assert max(starts) < min(ends)


def test_a_profile_of_a_run_leaves_the_run_unchanged(debug_run):
    before = {path: path.read_bytes() for path in debug_run.rglob("*") if path.is_file()}
    words = ["tracking.wandb.mode=offline", "micro_batch_size=16", "logical_shards=2", "ema_decay=0.9"]
    assert command.main([*WORDS, *words, "--run-dir", str(debug_run)]) == 0
    assert {path: path.read_bytes() for path in before} == before
    assert list(find_runs(debug_run)) == [debug_run]
    content = json.loads((debug_run / "profile" / "profile.json").read_text())
    assert content["ranks"][0]["bytes"]["averaged weights"] == 4 * 61_706
    # Offline, W&B keeps what it would upload: the artifact names the files.
    [logged] = (debug_run / "profile" / "wandb").glob("offline-run-*/run-*.wandb")
    assert all(name in logged.read_bytes() for name in (b"timelines.png", b"trace_rank0.json.gz", b"profile.json"))


@pytest.mark.parametrize(
    ("words", "key", "kind"),
    [
        (["--recipe", "debug", "--steps", "0"], "--steps", "range"),
        (["--recipe", "debug", "--world-size", "2"], "--world-size", "world"),
        (["--recipe", "debug", "optimizer.lrr=1"], "optimizer.lrr", "unknown"),
        (["--steps", "3"], "--recipe", "usage"),
    ],
)
def test_what_is_impossible_is_refused(words, key, kind, refused, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: command.main(words)) == [(key, kind)]
    assert list(tmp_path.iterdir()) == []


def test_a_profile_is_not_written_through_a_link(tmp_path, refused):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "profile").symlink_to(tmp_path / "elsewhere")
    assert refused(lambda: command.main([*WORDS, "--run-dir", str(tmp_path / "run")])) == [("--run-dir", "unsupported")]
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_profile_is_not_overwritten(tmp_path, refused):
    (tmp_path / "profile").mkdir()
    (tmp_path / "profile" / "profile.json").touch()
    assert refused(lambda: command.main([*WORDS, "--run-dir", str(tmp_path)])) == [("--run-dir", "exists")]


def test_a_training_that_fails_gives_one_message_and_can_be_repeated(tmp_path):
    for _ in range(2):
        with pytest.raises(RunError, match="not finite"):
            command.main([*WORDS, "optimizer.name=sgd", "schedule.max_lr=1e30", "--run-dir", str(tmp_path)])
