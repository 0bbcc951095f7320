"""Stopping and resuming a run; tests/faults covers kills, signals and damaged checkpoints."""

from __future__ import annotations

import json
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from accelerate import PartialState

from mnist_dist import load_recipe, load_run, train
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.engine.checkpoint import load_checkpoint, save_checkpoint
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.errors import RecipeError
from mnist_dist.run.checkpointing import Checkpointer
from mnist_dist.run.data import load_data
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.resume import load_newest
from mnist_dist.tracking import JSONLTracker
from mnist_dist.train import main
from tests.faults.training import STEPS, command, finish, start, start_launcher, wait_for_step
from tests.processes import run


@pytest.mark.launch
def test_a_signal_to_the_launcher_of_one_process_reaches_the_trainer(tmp_path):
    run_dir = tmp_path / "run"
    process = start_launcher([sys.executable, "-m", "accelerate.commands.launch", *command(run_dir)[1:]])
    wait_for_step(run_dir, 10, process)
    process.terminate()
    process.wait(timeout=120)
    deadline = time.monotonic() + 60
    while (run_dir / "STATUS").read_text() == "running\n" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (run_dir / "STATUS").read_text() == "preempted\n"


def test_a_run_resumes_with_the_same_samples_at_another_world_size(tmp_path):
    run_dir = tmp_path / "run"
    process = start(command(run_dir))
    wait_for_step(run_dir, 20, process)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == PREEMPTED
    finish(run_dir, world_size=2)
    found = [(line["step"], line["epoch"], "eval/loss" in line) for line in load_run(run_dir).metrics]
    epoch = STEPS // 4
    logged = {(step, step / epoch, False) for step in range(1, STEPS + 1) if step % 5 == 0 or step % epoch == 0}
    evaluated = {(step, step / epoch, True) for step in range(epoch, STEPS + 1, epoch)}
    assert found == sorted(logged | evaluated)


@pytest.mark.parametrize("step", [4, 8])  # in the middle, and after the last step
def test_the_training_time_of_a_resumed_run_includes_the_steps_before(tmp_path, step):
    words = ("data.limit_train=200", "data.limit_test=50", "batch_size=50", "epochs=2", "checkpoint.every_steps=4")
    words += ("tracking.wandb.mode=offline",)
    first = train(load_recipe("debug", *words), tmp_path / "first")
    checkpoint = load_checkpoint(tmp_path / "first" / "checkpoints" / f"step-{step}")
    assert 0 < checkpoint["train_seconds"] <= first["train_seconds"]
    save_checkpoint(tmp_path, step, checkpoint | {"train_seconds": 1000.0}, keep=1)
    resumed = train(load_recipe("debug", *words), tmp_path / "second", resume=str(tmp_path / f"step-{step}"))
    assert 1000 < resumed["train_seconds"] < 1000 + 60
    assert (resumed["wandb_share"] > 0) == (step == 4)


# --- checkpoints on disk ------------------------------------------------------------------------------------------


def test_every_minutes_counts_from_the_resume(tmp_path, monkeypatch):
    words = ("data.limit_train=200", "data.limit_test=50", "batch_size=50", "epochs=2", "log_every=1")
    recipe = load_recipe("debug", *words, "tracking.wandb.mode=disabled", "checkpoint.every_steps=4")
    train(recipe.model_copy(update={"max_steps": 5}), tmp_path / "first")
    path = tmp_path / "first" / "checkpoints" / "step-4"
    state = load_checkpoint(path)
    state["components"]["meter"]["train_seconds"] = 3600.0  # as if the first steps had taken an hour
    save_checkpoint(tmp_path / "old" / "checkpoints", 4, state, keep=1)
    due: list[bool] = []
    is_due = Checkpointer.is_due
    monkeypatch.setattr(Checkpointer, "is_due", lambda keep, logged: due.append(is_due(keep, logged)) or due[-1])
    by_time = recipe.checkpoint.model_copy(update={"every_steps": None, "every_minutes": 5.0})
    train(recipe.model_copy(update={"checkpoint": by_time}), tmp_path / "second", resume=str(tmp_path / "old"))
    assert due == [False] * 3 + [True]  # a checkpoint of the last step is always due


def test_an_old_checkpoint_is_removed_only_after_the_next_is_complete(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr("torch.save", full)
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]
    save_checkpoint(tmp_path, 3, {"step": 3}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-3"]


def test_the_next_checkpoint_removes_the_staged_folder_of_a_killed_one(tmp_path):
    (tmp_path / ".step-3.staged").mkdir()
    (tmp_path / ".step-3.staged" / "state.pt").write_bytes(b"half")
    save_checkpoint(tmp_path, 4, {"step": 4}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-4"]


def test_the_best_weights_are_restored_from_the_checkpoint(tmp_path):
    """The file may belong to a later evaluation, be damaged or be missing. The resumed run would not write it again."""
    words = ("data.limit_train=200", "data.limit_test=50", "batch_size=50", "epochs=2", "checkpoint.every_steps=5")
    folder = RunFolder(tmp_path / "run")
    recipe = load_recipe("debug", *words)
    train(recipe, folder.path)
    data = load_data(recipe, PartialState()).train
    shutil.rmtree(folder.checkpoints / "step-8")  # of the last step
    content = bytes(load_checkpoint(folder.checkpoints / "step-5")["best"].numpy())
    for damaged, named in ((None, True), (content[:100], True), (content[:-1] + b"?", False), (content, False)):
        folder.best.unlink()
        if damaged:
            folder.best.write_bytes(damaged)
        checkpoint, problems = load_newest(folder, PartialState(), recipe, data, False)
        assert checkpoint["progress"]["step"] == 5 and "best" not in checkpoint
        assert folder.best.read_bytes() == content
        assert [str(folder.best) in problem for problem in problems] == [True] * named


def test_metrics_shorter_than_the_checkpoint_expects_keep_their_complete_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    JSONLTracker(path, keep_bytes=1000).log({"step": 3})
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    JSONLTracker(path, keep_bytes=12).log({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_a_process_that_has_lost_the_run_does_not_write_into_the_metrics_of_its_successor(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lost = JSONLTracker(path)
    lost.log({"step": 1})
    successor = JSONLTracker(path, keep_bytes=path.stat().st_size)
    lost.log({"step": 2, "lost": True})
    successor.log({"step": 2})
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_valid_checkpoint_of_the_same_step_is_never_deleted(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    with monkeypatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path, **keywords: pytest.fail(f"{path} was deleted"))
        save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    (tmp_path / "step-1" / "state.pt").write_bytes(b"")
    save_checkpoint(tmp_path, 1, {"step": 1}, keep=1)
    assert load_checkpoint(tmp_path / "step-1") == {"step": 1}


# --- which run folders can resume ---------------------------------------------------------------------------------


def test_a_run_killed_before_its_recipe_is_written_can_use_its_folder_again(tmp_path, monkeypatch):
    recipe = load_recipe("debug")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "replace", lambda path, target: (_ for _ in ()).throw(KeyboardInterrupt))
        RunFolder.open(tmp_path / "run", recipe)
    folder = RunFolder.open(tmp_path / "run", recipe)
    assert folder.recipe.is_file() and folder.plots.is_dir()


def test_another_recipe_is_refused_with_the_difference_unless_allowed(tmp_path, monkeypatch, refused):
    words = ["data.limit_train=200", "data.limit_test=50", "tracking.wandb.mode=disabled"]
    recipe = load_recipe("debug", *words)
    monkeypatch.setattr("mnist_dist.train.fit", lambda *arguments: False)  # as if a signal stopped the run at once
    train(recipe, tmp_path / "run")
    with pytest.raises(RecipeError, match=r"batch_size: 128 -> 64") as caught:
        train(load_recipe("debug", *words, "batch_size=64"), tmp_path / "run")
    assert [(problem.key, problem.kind) for problem in caught.value.problems] == [("--run-dir", "conflict")]
    train(load_recipe("debug", *words, "checkpoint.keep=5"), tmp_path / "run")  # changes no result
    train(load_recipe("debug", *words, "batch_size=64"), tmp_path / "run", allow_recipe_change=True)
    before = (tmp_path / "run" / "recipe.yaml").read_bytes()
    for word in ("model.name=mnistnet", "model.freeze=[features.*]", "optimizer.name=radam", "data.dataset=digits"):
        key = word.partition("=")[0]
        with pytest.raises(RecipeError, match=rf"\n *{key}: .* -> .*\n(.|\n)*model\.init_from") as caught:
            train(load_recipe("debug", *words, "batch_size=64", word), tmp_path / "run", allow_recipe_change=True)
        assert [(problem.key, problem.kind) for problem in caught.value.problems] == [("--run-dir", "conflict")]
    assert (tmp_path / "run" / "recipe.yaml").read_bytes() == before
    assert refused(lambda: train(recipe, tmp_path / "run", resume="never")) == [("--run-dir", "exists")]


def last_weights(run_dir):
    return (run_dir / "last.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([], ["optimizer.weight_decay=0.3"]),
        ([], ["optimizer.betas=[0.5, 0.9]"]),
        ([], ["ema_decay=0.9"]),
        (["ema_decay=0.9"], []),
        ([], ["schedule={name: plateau, patience: 0}"]),
        (["schedule={name: plateau, patience: 0}"], ["optimizer.lr=0.01"]),
        (["schedule={name: plateau, patience: 0}"], []),
    ],
    ids=str,
)
def test_a_changed_recipe_takes_effect_when_a_run_resumes(tmp_path, before, after):
    words = ["data.limit_train=200", "data.limit_test=50", "batch_size=50", "epochs=2", "optimizer.name=adamw"]
    words += ["tracking.wandb.mode=disabled", "checkpoint.every_steps=4", "checkpoint.keep=9"]
    train(load_recipe("debug", *words, *before), tmp_path / "first")
    source = str(tmp_path / "first" / "checkpoints" / "step-4")
    same = {"resume": source, "allow_recipe_change": True}
    train(load_recipe("debug", *words, *after), tmp_path / "second", **same)
    assert last_weights(tmp_path / "second") != last_weights(tmp_path / "first")


def test_the_same_command_resumes_although_the_source_of_its_checkpoint_is_gone(tmp_path, monkeypatch):
    words = ("data.limit_train=200", "data.limit_test=50", "batch_size=50", "tracking.wandb.mode=disabled")
    recipe = load_recipe("debug", *words, "epochs=2", "checkpoint.every_steps=3", "checkpoint.keep=9")
    train(recipe, tmp_path / "first")
    again = {"run_dir": tmp_path / "second", "resume": str(tmp_path / "first" / "checkpoints" / "step-3")}
    with monkeypatch.context() as patch:
        patch.setattr("mnist_dist.train.fit", lambda *arguments: False)
        train(recipe, **again)
    shutil.rmtree(tmp_path / "first" / "checkpoints")
    train(recipe, **again)
    assert last_weights(tmp_path / "second") == last_weights(tmp_path / "first")


def test_the_same_command_on_a_finished_run_returns_its_summary(debug_run, refused, capsys):
    recipe = load_recipe(debug_run / "recipe.yaml")
    before = {path: path.stat().st_mtime_ns for path in debug_run.rglob("*")}
    assert train(recipe, debug_run) == json.loads((debug_run / "summary.json").read_text())
    [line] = capsys.readouterr().out.splitlines()
    assert "already done" in line and str(debug_run) in line and "7.81" in line
    assert {path: path.stat().st_mtime_ns for path in debug_run.rglob("*")} == before
    harmless = recipe.model_copy(update={"checkpoint": recipe.checkpoint.model_copy(update={"keep": 7})})
    assert train(harmless, debug_run)["steps"] == 4
    assert refused(lambda: train(recipe, debug_run, resume="never")) == [("--run-dir", "exists")]
    other = recipe.model_copy(update={"seed": 5})
    assert refused(lambda: train(other, debug_run)) == [("--run-dir", "conflict")]


def test_the_command_of_a_finished_run_exits_with_0(debug_run, capsys):
    words = ["--recipe", str(debug_run / "recipe.yaml"), "--run-dir", str(debug_run)]
    assert main(words) == 0
    assert "already done" in capsys.readouterr().out


@pytest.mark.parametrize("content", [None, '{"recipe": "deb', "{}", '{"epochs": "all"}'])
def test_a_finished_run_without_its_summary_is_finished_again(debug_run, content):
    summary, weights = debug_run / "summary.json", last_weights(debug_run)
    summary.unlink() if content is None else summary.write_text(content)
    assert train(load_recipe(debug_run / "recipe.yaml"), debug_run)["steps"] == 4
    assert json.loads(summary.read_text())["steps"] == 4 and last_weights(debug_run) == weights


# --- the end of a run ---------------------------------------------------------------------------------------------


def once(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """Sends SIGUSR1 to this process at the first call of a function, before it does its work."""
    owner, _, name = where.rpartition(".")
    owner = pkgutil.resolve_name(owner)
    real, sent = getattr(owner, name), []

    def signalled(*arguments, **keywords):
        if not sent:
            sent.append(True)
            signal.raise_signal(signal.SIGUSR1)
        return real(*arguments, **keywords)

    monkeypatch.setattr(owner, name, signalled)


@pytest.mark.pictures
@pytest.mark.parametrize(
    ("where", "early_stop"),
    [
        ("mnist_dist.run.checkpointing.Checkpointer.save_last", False),
        ("mnist_dist.run.checkpointing.Checkpointer.save_last", True),
        ("mnist_dist.run.summary.write_atomically", False),
        ("mnist_dist.plots.curves.plot_training_history", False),
        ("mnist_dist.plots.images.plot_augmented_samples", False),
    ],
)
def test_a_signal_at_the_end_stops_the_run_and_the_same_command_ends_it(where, early_stop, tmp_path, monkeypatch):
    words = ["data.limit_train=200", "data.limit_test=50", "batch_size=50", "epochs=2", "tracking.wandb.mode=disabled"]
    recipe = load_recipe("debug", *words, *["optimizer.lr=1e-12", "epochs=9", "early_stopping.patience=1"] * early_stop)
    with monkeypatch.context() as patch:
        patch.setattr("mnist_dist.run.summary._pictures", lambda *arguments: [])
        expected = train(recipe, tmp_path / "undisturbed")
    with monkeypatch.context() as patch:
        once(patch, where)
        assert train(recipe, tmp_path / "run")["status"] == "preempted"
    assert (tmp_path / "run" / "STATUS").read_text() == "preempted\n"
    monkeypatch.setattr(TrainStep, "__call__", lambda *arguments: pytest.fail("the training is repeated"))
    found = train(recipe, tmp_path / "run")
    assert last_weights(tmp_path / "run") == last_weights(tmp_path / "undisturbed")
    keys = [key for key in expected if key.startswith(("eval.", "train.", "step", "epoch"))]
    assert [found[key] for key in keys] == [expected[key] for key in keys]
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"
    assert len(list((tmp_path / "run" / "plots").glob("*.png"))) == 6


def test_a_signal_before_the_first_step_is_not_lost(tmp_path, monkeypatch):
    words = ["data.limit_train=200", "data.limit_test=50", "batch_size=50", "tracking.wandb.mode=disabled"]
    recipe = load_recipe("debug", *words)
    with monkeypatch.context() as patch:
        once(patch, "mnist_dist.train.build_components")
        assert train(recipe, tmp_path / "run") == {"status": "preempted", "step": 1}
    assert (tmp_path / "run" / "STATUS").read_text() == "preempted\n"
    assert train(recipe, tmp_path / "run")["steps"] == 4


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_before_the_run_folder_is_opened_exits_with_75(number):
    source = f"""
import os
from mnist_dist.distributed.signals import exit_on_signals
exit_on_signals()
os.kill(os.getpid(), {int(number)})
"""
    done = run([sys.executable, "-c", source])
    assert done.returncode == PREEMPTED and "Traceback" not in done.stderr


def test_the_handlers_of_the_command_line_need_no_torch():
    source = "import sys, mnist_dist.distributed.signals; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", source]).returncode == 0


def test_a_checkpoint_of_an_earlier_version_resumes(tmp_path):
    """Earlier versions stored the state of the components under another key."""
    words = ("data.limit_train=200", "data.limit_test=50", "batch_size=50", "epochs=2", "checkpoint.every_steps=3")
    recipe = load_recipe("debug", *words, "checkpoint.keep=9", "tracking.wandb.mode=disabled")
    train(recipe, tmp_path / "first")
    state = load_checkpoint(tmp_path / "first" / "checkpoints" / "step-3")
    state["parts"] = state.pop("components")
    save_checkpoint(tmp_path / "old" / "checkpoints", 3, state, keep=1)
    train(recipe, tmp_path / "second", resume=str(tmp_path / "old"))
    assert last_weights(tmp_path / "second") == last_weights(tmp_path / "first")
