"""The lock of a run folder: one writer at a time."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from pathlib import Path

import pytest

from mnist_dist import load_recipe, train
from mnist_dist.run import lock
from mnist_dist.run.lock import FILE, RunLock
from tests.processes import popen, run

HOLDS = """
import sys, time
from pathlib import Path
from mnist_dist.run.lock import RunLock
with RunLock(Path(sys.argv[1])):
    Path(sys.argv[1], "held").touch()
    time.sleep(600)
"""


@pytest.fixture
def holder(tmp_path):
    process = popen([sys.executable, "-c", HOLDS, tmp_path])
    while not (tmp_path / "held").exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield process
    process.kill()
    process.wait()


def test_a_folder_that_another_process_writes_is_refused_and_the_process_is_named(tmp_path, holder, refused):
    content = json.loads((tmp_path / FILE).read_text())
    with pytest.raises(ValueError) as caught:
        RunLock(tmp_path).__enter__()
    assert all(str(content[key]) in str(caught.value) for key in ("host", "pid", "since"))
    assert refused(lambda: RunLock(tmp_path).__enter__()) == [("--run-dir", "exists")]
    assert json.loads((tmp_path / FILE).read_text()) == content and content["pid"] == holder.pid


def test_a_second_training_of_the_same_folder_is_refused(debug_run, refused):
    recipe = load_recipe(debug_run / "recipe.yaml")
    (debug_run / "STATUS").write_text("running\n")
    metrics = (debug_run / "metrics.jsonl").read_bytes()
    parent = lock.psutil.Process(os.getppid())
    with RunLock(debug_run):
        # A lock with this process's own id counts as left over, so write the id of the parent.
        own = json.loads((debug_run / FILE).read_text())
        (debug_run / FILE).write_text(json.dumps(own | {"pid": parent.pid, "started": parent.create_time()}))
        assert refused(lambda: train(recipe, debug_run)) == [("--run-dir", "exists")]
        assert (debug_run / "STATUS").read_text() == "running\n"
        assert (debug_run / "metrics.jsonl").read_bytes() == metrics
        (debug_run / FILE).write_text(json.dumps(own))
    assert train(recipe, debug_run)["steps"] == 4
    assert not list(debug_run.glob("*lock*"))


def test_a_lock_of_a_dead_process_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    with RunLock(tmp_path):
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert not (tmp_path / FILE).exists()


def foreign(folder: Path) -> Path:
    (folder / FILE).write_text(json.dumps({"host": "node7", "pid": 1, "since": "noon", "machine": "node7"}))
    return folder / FILE


@pytest.mark.parametrize("content", ["foreign", "half"])
def test_a_silent_lock_of_another_machine_is_taken_over(content, tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "SILENT_SECONDS", 1.0)
    path, waited = foreign(tmp_path), []
    if content == "half":
        path.write_text("{")
    with RunLock(tmp_path, lambda: waited.append(1)):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert waited


def test_an_old_lock_of_another_machine_is_taken_over_without_waiting(tmp_path):
    path = foreign(tmp_path)
    os.utime(path, (time.time() - 3600,) * 2)
    with RunLock(tmp_path, lambda: pytest.fail("waits")):
        pass


def test_a_renewed_lock_of_another_machine_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(lock, "SILENT_SECONDS", 10.0)
    path, end = foreign(tmp_path), threading.Event()

    def renew() -> None:
        while not end.wait(0.3):
            os.utime(path)

    threading.Thread(target=renew).start()
    try:
        assert refused(lambda: RunLock(tmp_path).__enter__()) == [("--run-dir", "exists")]
    finally:
        end.set()
    assert "node7" in path.read_text()


def test_the_lock_is_renewed_and_a_process_that_lost_it_ends(tmp_path):
    script = """
import json, sys, time
from pathlib import Path
from mnist_dist.run import lock
lock.RENEW_SECONDS = 0.1
folder = Path(sys.argv[1])
with lock.RunLock(folder):
    before = (folder / lock.FILE).stat().st_mtime_ns
    while (folder / lock.FILE).stat().st_mtime_ns == before:
        time.sleep(0.01)
    (folder / lock.FILE).write_text(json.dumps({"host": "node7", "pid": 1, "since": "noon"}))
    time.sleep(60)
"""
    done = run([sys.executable, "-c", script, tmp_path])
    assert done.returncode == 1 and "node7" in done.stderr
    assert (tmp_path / FILE).exists(), "the lock now belongs to the other process"


@pytest.mark.parametrize("elastic", [True, False])
def test_a_process_of_an_elastic_run_waits_until_the_writer_of_a_lost_machine_is_silent(
    elastic, tmp_path, monkeypatch, refused
):
    """A plain process is refused at the first renewal. The writer has chosen its own time of silence."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3" if elastic else "0")
    path, renewals = foreign(tmp_path), iter(range(3))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"silent_seconds": 2.0 if elastic else 300.0}))
    os.utime(path, (time.time() - 1, time.time() - 1))  # older than after a renewal, on a machine of any speed

    def renew() -> None:
        if next(renewals, None) is not None:
            os.utime(path)

    if not elastic:
        assert refused(lambda: RunLock(tmp_path, renew).__enter__()) == [("--run-dir", "exists")]
        return
    with RunLock(tmp_path, renew):
        assert json.loads(path.read_text())["silent_seconds"] == lock.ELASTIC_SILENT_SECONDS


def test_a_writer_that_was_paused_ends_before_it_writes(tmp_path):
    """The thread that renews the lock may notice the loss only after the paused process has written."""
    script = """
import json, sys
from pathlib import Path
from mnist_dist.run import lock
folder = Path(sys.argv[1])
with lock.RunLock(folder) as held:
    held.end_if_lost()
    (folder / lock.FILE).write_text(json.dumps({"host": "node7", "pid": 1, "since": "noon"}))
    held.end_if_lost()
    print("wrote")
"""
    done = run([sys.executable, "-c", script, tmp_path])
    assert done.returncode == 1 and "node7" in done.stderr and not done.stdout
