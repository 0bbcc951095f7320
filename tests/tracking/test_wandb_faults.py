"""Faults of the W&B server: one line each, the training continues, and `wandb sync` uploads the run afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mnist_dist import load_recipe, load_run, train
from mnist_dist.tracking import WandbTracker
from mnist_dist.tracking import wandb as weights_and_biases
from tests.tracking.wandb_server import Answer, WandbServer

PATIENCE = 60
"""Seconds in which a slow machine finishes an upload that nothing disturbs."""
RETRIES = {"retry_max": 1, "retry_wait_min_seconds": 0.05, "retry_wait_max_seconds": 0.1}


def error(status: int, message: str) -> Answer:
    return status, {"errors": [{"message": message}], "data": None}


@pytest.fixture
def server(monkeypatch, accelerator) -> Iterator[WandbServer]:
    """A server that runs of this process log to, with few and short retries."""
    with WandbServer() as server:
        settings: dict[str, Any] = {"base_url": server.url, "api_key": "0" * 40, "finish_timeout": PATIENCE}
        for kind in ("graphql", "file_stream", "file_transfer"):
            settings |= {f"x_{kind}_{name}": value for name, value in RETRIES.items()}
        for name, value in settings.items():
            monkeypatch.setitem(weights_and_biases.SETTINGS, name, value)
        yield server


class Tracked:
    """A W&B run of three lines, and the notes for the user."""

    def __init__(self, folder: Path, **init: Any):
        folder.mkdir()
        (folder / "recipe.yaml").write_text("name: x\n")
        self.folder, self.notes = folder, list[str]()
        files = {"directory": folder, "recipe": folder / "recipe.yaml"}
        self.tracker = WandbTracker("digits", **files, notify=self.notes.append, mode="online", **init)
        self.tracker.start()
        self.run_id = self.tracker.run_id
        for step in (1, 2, 3):
            self.tracker.log({"step": step, "eval/loss": 1.0})
        self.tracker.finish()


def sync(server: WandbServer, run_dir: Path, *options: str) -> None:
    """Runs `wandb sync` on the offline W&B run in a run folder, else on the online one."""
    command = shutil.which("wandb")
    assert command, "the command comes with the package"
    folder = min((run_dir / "wandb").glob("*run-*"))  # offline-run-… or run-…
    assert any(folder.glob("*.wandb"))
    done = subprocess.run(
        [command, "sync", "--include-online", *options, folder],
        cwd=run_dir,  # the command writes its logs to ./wandb
        env=os.environ | server.environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def steps(server: WandbServer, run_id: str | None) -> list[int]:
    return [line["step"] for line in server.history.get(str(run_id), []) if "step" in line]


def test_a_run_without_faults_is_uploaded_without_a_note(server, tmp_path):
    run = Tracked(tmp_path / "run")
    assert (run.notes, steps(server, run.run_id), server.finished) == ([], [1, 2, 3], [run.run_id])
    assert "recipe.yaml" in server.uploaded


def test_a_mistyped_entity_is_one_line_and_the_run_is_offline(server, tmp_path):
    def fault(name: str, variables: dict[str, Any]) -> Answer | None:
        mistyped = name == "UpsertBucket" and variables["entity"] == "nobody"
        return error(404, "entity nobody not found") if mistyped else None

    server.fault = fault
    run = Tracked(tmp_path / "run", entity="nobody")
    assert len(run.notes) == 1 and "nobody" in run.notes[0] and "offline" in run.notes[0]
    sync(server, run.folder, "--entity", "me")
    assert steps(server, run.run_id) == [1, 2, 3] and server.finished == [run.run_id]


def test_a_run_that_was_deleted_before_a_resume_continues_as_a_new_one(server, tmp_path, monkeypatch):
    # wandb retries this error for the time of init_timeout, and only then names it.
    monkeypatch.delitem(weights_and_biases.SETTINGS, "x_graphql_retry_max")
    monkeypatch.setitem(weights_and_biases.SETTINGS, "init_timeout", 8)

    def fault(name: str, variables: dict[str, Any]) -> Answer | None:
        deleted = name == "UpsertBucket" and variables["name"] == "deleted"
        return error(409, "run deleted was previously created and deleted; try a new run name") if deleted else None

    server.fault = fault
    run = Tracked(tmp_path / "run", id="deleted", resume="allow")
    assert len(run.notes) == 1 and "deleted" in run.notes[0]
    assert run.run_id not in (None, "deleted") and steps(server, run.run_id) == [1, 2, 3]


def test_a_resume_without_a_server_keeps_the_w_and_b_run(server, tmp_path):
    server.fault = lambda name, variables: error(500, "down")
    run = Tracked(tmp_path / "run", id="before", resume="allow")
    assert len(run.notes) == 1 and run.run_id == "before"
    server.fault = lambda name, variables: None
    sync(server, run.folder)
    assert steps(server, "before") == [1, 2, 3]


FAULTS = {
    "refuses": lambda server: error(404, "no such run"),
    "fails": lambda server: error(500, "down"),
    "waits": lambda server: server.released.wait(60) and None,
}


@pytest.mark.parametrize("kind", FAULTS)
def test_a_server_that_fails_in_the_middle_is_one_line_and_sync_completes(kind, server, tmp_path, monkeypatch):
    monkeypatch.setitem(weights_and_biases.SETTINGS, "finish_timeout", 2)
    # Files and artifacts are uploaded at other times; the history is what the training logs.
    server.fault = lambda name, variables: FAULTS[kind](server) if name == "file_stream" else None
    monkeypatch.delenv("WANDB_MODE")
    words = ["data.limit_train=100", "data.limit_test=50", "epochs=1", "tracking.wandb.mode=online", "log_every=1"]
    recipe = load_recipe("debug", *words, "tracking.plots=false")
    train(recipe, tmp_path / "run")
    lines = (tmp_path / "run" / "console.log").read_text().splitlines()
    [line] = [line for line in lines if "wandb could not" in line]
    assert str(tmp_path / "run" / "wandb") in line
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"
    server.fault = lambda name, variables: None
    server.released.set()
    sync(server, tmp_path / "run")
    [history] = server.history.values()
    logged = [each["step"] for each in history if "train/loss" in each]
    assert logged == [each["step"] for each in load_run(tmp_path / "run").metrics if "train/loss" in each] != []


def test_a_server_that_fails_for_a_moment_is_not_reported(server, tmp_path):
    failures = iter(range(1))

    def fault(name: str, variables: dict[str, Any]) -> Answer | None:
        return error(500, "moment") if name == "file_stream" and next(failures, None) is not None else None

    server.fault = fault
    run = Tracked(tmp_path / "run")
    assert (run.notes, steps(server, run.run_id)) == ([], [1, 2, 3])
