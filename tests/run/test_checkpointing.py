"""Saving while training continues: who writes, who waits, and how a failure of the writing thread ends the run."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time

import pytest

from mnist_dist import load_recipe, load_run, train
from mnist_dist.engine.checkpoint import list_checkpoints, load_checkpoint
from mnist_dist.errors import RunError
from mnist_dist.run import checkpointing
from mnist_dist.run.checkpointing import Checkpointer
from mnist_dist.run.folder import RunFolder
from tests.faults.training import VARIABLES
from tests.processes import free_port, rank_variables, run_in_each

WORDS = ["data.dataset=synthetic", "data.limit_train=320", "data.limit_test=50", "batch_size=64", "log_every=1"]
WORDS += ["epochs=2", "tracking.wandb.mode=disabled", "tracking.plots=false"]
PATIENCE = 60.0


def wrap(monkeypatch, name: str, before=lambda *arguments: None, after=lambda *arguments: None) -> None:
    """Calls functions before and after each save_checkpoint or save_weights of a run, with its arguments."""
    real = getattr(checkpointing, name)

    def wrapped(*arguments, **keywords):
        before(*arguments)
        real(*arguments, **keywords)
        after(*arguments)

    monkeypatch.setattr(checkpointing, name, wrapped)


def test_training_continues_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    folder, lines = RunFolder(tmp_path / "run"), []

    def wait_for_a_later_step(path, step, *rest):
        assert threading.current_thread() is not threading.main_thread()
        deadline = time.monotonic() + PATIENCE
        while step == 3 and time.monotonic() < deadline:
            lines[:] = folder.metrics.read_text().splitlines()
            if len(lines) >= 5:  # one line per step
                return
            time.sleep(0.001)

    wrap(monkeypatch, "save_checkpoint", wait_for_a_later_step)
    words = ["eval_every=2", "checkpoint.every_steps=3", "checkpoint.keep=9"]
    summary = train(load_recipe("lenet5", *WORDS, *words), folder.path)
    assert len(lines) >= 5
    # What was written is the state after step 3, not the state of the moment when it was written.
    state = load_checkpoint(folder.checkpoints / "step-3")
    assert {each["step"].item() for each in state["components"]["optimizer"]["state"].values()} == {3}
    assert summary["saving.write_seconds"] > summary["saving.pause_seconds"] >= summary["saving.longest_pause"] > 0


def test_a_checkpoint_written_late_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    recipe = load_recipe("lenet5", *WORDS, "checkpoint.every_steps=3", "checkpoint.keep=9", "ema_decay=0.9")
    with monkeypatch.context() as patch:
        wrap(patch, "save_checkpoint", lambda *arguments: time.sleep(0.2))
        train(recipe, tmp_path / "first")
    for step in (3, 6):
        train(recipe, tmp_path / f"from-{step}", resume=str(tmp_path / "first" / "checkpoints" / f"step-{step}"))
        for name in ("last.safetensors", "best.safetensors"):
            assert (tmp_path / f"from-{step}" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()


def test_one_thread_writes_all_files_of_a_run_in_the_order_of_the_steps(tmp_path, monkeypatch):
    written, threads = [], set()

    def note(path, step, *rest):
        threads.add(threading.get_ident())
        written.append(path.name if path.suffix else step)

    for name in ("save_checkpoint", "save_weights"):
        wrap(monkeypatch, name, after=note)
    train(load_recipe("lenet5", *WORDS, "checkpoint.every_steps=4"), tmp_path / "run")
    steps = [each for each in written if isinstance(each, int)]
    assert steps == [4, 8, 10] and written[-1] == "last.safetensors"
    assert len(threads) == 1 and threading.main_thread().ident not in threads


def test_a_stopped_run_has_published_its_checkpoint_before_its_status_says_so(tmp_path, monkeypatch):
    folder, statuses = RunFolder(tmp_path / "run"), []

    def slowly(path, step, *rest):
        time.sleep(0.3)
        statuses.append(folder.status.read_text())

    wrap(monkeypatch, "save_checkpoint", slowly)
    is_due = Checkpointer.is_due

    def signal_at_step_4(self, logged):
        if self._progress.step == 4:
            signal.raise_signal(signal.SIGTERM)
        return is_due(self, logged)

    monkeypatch.setattr(Checkpointer, "is_due", signal_at_step_4)
    result = train(load_recipe("lenet5", *WORDS), folder.path)
    assert result["status"] == "preempted" and statuses == ["running\n"]
    assert [path.name for path in list_checkpoints(folder.checkpoints)] == [f"step-{result['step']}"]
    assert result["step"] < 10


def test_a_run_is_done_only_when_its_last_files_are_written(tmp_path, monkeypatch):
    folder, statuses = RunFolder(tmp_path / "run"), []

    def slowly(path, *rest):
        time.sleep(0.3)
        statuses.append(folder.status.read_text())

    for name in ("save_checkpoint", "save_weights"):
        wrap(monkeypatch, name, slowly)
    train(load_recipe("lenet5", *WORDS), folder.path)
    assert set(statuses) == {"running\n"} and folder.status.read_text() == "done\n"
    assert load_run(folder.path, "last") and list_checkpoints(folder.checkpoints)


# --- failures of the thread ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_failed_write_ends_the_run_at_the_next_step(number, tmp_path, monkeypatch):
    folder, steps = RunFolder(tmp_path / "run"), []

    def fail(path, step, *rest):
        if step == 6:
            raise OSError(number, os.strerror(number), str(path / "state.pt"))

    wrap(monkeypatch, "save_checkpoint", fail)

    def due_at_3_and_6(self, logged):
        steps.append(self._progress.step)
        deadline = time.monotonic() + PATIENCE
        while steps[-1] > 6 and not self.has_failed and time.monotonic() < deadline:
            time.sleep(0.001)
        return steps[-1] in (3, 6)

    monkeypatch.setattr(Checkpointer, "is_due", due_at_3_and_6)
    with pytest.raises(RunError) as caught:
        train(load_recipe("lenet5", *WORDS, "eval_every=2"), folder.path)
    message = str(caught.value)
    assert steps[-1] in (6, 7)  # the step after the failure asks whether to stop, and then saves
    assert os.strerror(number) in message and "state.pt" in message
    assert str(folder.checkpoints / "step-3") in message
    assert folder.status.read_text() == "failed\n"


@pytest.mark.parametrize("function", ["save_checkpoint", "save_weights"])
def test_a_failed_write_of_the_last_files_fails_the_run(function, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "run")

    def fail(path, step, *rest):
        if step == 10 or path.name == "last.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    wrap(monkeypatch, function, fail)
    with pytest.raises(RunError, match=os.strerror(errno.ENOSPC)):
        train(load_recipe("lenet5", *WORDS), folder.path)
    assert folder.status.read_text() == "failed\n" and not folder.summary.exists()


FULL = """
import sys
from mnist_dist.cli import run_command
from mnist_dist.run import checkpointing
from mnist_dist.train import main

def fail(folder, step, *rest, **options):
    raise OSError(28, "No space left on device", str(folder / "state.pt"))

checkpointing.save_checkpoint = fail
sys.exit(run_command(lambda: main(sys.argv[1:])))
"""


def test_a_failed_write_of_rank_0_ends_all_ranks(tmp_path):
    script = tmp_path / "full.py"
    script.write_text(FULL)
    words = [*WORDS, "epochs=1000", "checkpoint.every_steps=4", "eval_every=1000"]
    command = [sys.executable, script, "--recipe", "lenet5", "--run-dir", tmp_path / "run", *words]
    port = free_port()
    first, second = run_in_each([os.environ | VARIABLES | rank_variables(rank, 2, port) for rank in range(2)], command)
    assert (first.returncode, second.returncode) == (1, 1)
    assert "Traceback" not in first.stderr + second.stderr
    assert "state.pt" in first.stderr and os.strerror(errno.ENOSPC) in first.stderr
    assert "rank 0" in second.stderr and os.strerror(errno.ENOSPC) in second.stderr
    assert (tmp_path / "run" / "STATUS").read_text() == "failed\n"
