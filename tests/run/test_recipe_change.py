"""Resuming with another recipe: batch size, optimizer, length; with other data; and the first speed after a resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from mnist_dist import load_recipe, train
from mnist_dist.data import DATASETS, Images
from mnist_dist.data.sources.request import Splits
from mnist_dist.engine.metrics import Meter

SMALL = ["data.limit_train=200", "data.limit_test=50", "tracking.wandb.mode=disabled", "checkpoint.keep=99"]


def last_weights(run_dir):
    return (run_dir / "last.safetensors").read_bytes()


def test_a_run_from_a_copied_checkpoint_prints_no_message_about_missing_weights(tmp_path, capsys):
    recipe = load_recipe("debug", *SMALL, "batch_size=50", "epochs=2", "checkpoint.every_steps=6")
    train(recipe, tmp_path / "first")
    capsys.readouterr()
    train(recipe, tmp_path / "second", resume=str(tmp_path / "first" / "checkpoints" / "step-6"))
    assert "best.safetensors" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("optimizer", "added"),
    [("rmsprop", "momentum: 0.9"), ("sgd", "momentum: 0.9"), ("sgd", "momentum: 0.9, nesterov: true")],
)
def test_a_new_keyword_of_the_optimizer_starts_with_zeros(optimizer, added, tmp_path):
    words = [*SMALL, "batch_size=50", "epochs=2", "checkpoint.every_steps=4"]
    train(load_recipe("debug", *words, f"optimizer={{name: {optimizer}, lr: 0.01}}"), tmp_path / "first")
    source = str(tmp_path / "first" / "checkpoints" / "step-4")
    recipe = load_recipe("debug", *words, f"optimizer={{name: {optimizer}, lr: 0.01, {added}}}")
    train(recipe, tmp_path / "second", resume=source, allow_recipe_change=True)
    assert last_weights(tmp_path / "second") != last_weights(tmp_path / "first")


@pytest.mark.parametrize(
    ("words", "step", "expected"),
    [
        (["batch_size=100"], 4, 2),
        (["batch_size=100"], 7, 3),  # epoch 1, 150 samples seen: one batch of 100
        (["batch_size=25"], 6, 12),
        (["batch_size=64"], 6, 5),
        (["data.limit_train=100", "batch_size=50"], 7, 3),
        (["data.limit_train=400", "batch_size=50"], 4, 8),
    ],
)
def test_another_batch_size_converts_the_step(words, step, expected, tmp_path, capsys):
    common = [*SMALL, "epochs=3", "checkpoint.every_steps=1"]
    train(load_recipe("debug", *common, "batch_size=50"), tmp_path / "first")
    recipe = load_recipe("debug", *common, *words)
    source = str(tmp_path / "first" / "checkpoints" / f"step-{step}")
    capsys.readouterr()
    found = train(recipe, tmp_path / "second", resume=source, allow_recipe_change=True)
    output = capsys.readouterr().out
    assert f"step {step:,} is step {expected:,}" in output and "epoch 3/3" in output
    assert "4/3" not in output and found["epochs"] == 3
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "second" / "checkpoints").iterdir())
    assert steps == list(range(expected, found["steps"] + 1)), "no checkpoint of the old plan is left"


def test_a_shorter_run_than_the_checkpoint_is_refused(tmp_path, refused):
    words = [*SMALL, "batch_size=50", "checkpoint.every_steps=1"]
    train(load_recipe("debug", *words, "epochs=3"), tmp_path / "first")
    source = {"resume": str(tmp_path / "first" / "checkpoints" / "step-9"), "allow_recipe_change": True}
    for word in ("epochs=2", "max_steps=8"):
        recipe = load_recipe("debug", *words, "epochs=3", word)
        found = refused(lambda recipe=recipe: train(recipe, tmp_path / "second", **source))
        assert found == [(word.partition("=")[0], "conflict")]


@pytest.mark.parametrize(
    "schedule",
    [
        "{name: constant, warmup_epochs: 1}",
        "{name: step, step_size: 1}",
        "{name: multistep, milestones: [1, 3]}",
        "{name: exponential, gamma: 0.5}",
        "{name: polynomial, total_iters: 5}",
        "{name: cosine, T_max: 9}",
        "{name: cosine_restarts, T_0: 2}",
    ],
)
def test_a_finished_run_trains_longer(schedule, tmp_path, refused):
    words = [*SMALL, "batch_size=50", f"schedule={schedule}"]
    three, four = (load_recipe("debug", *words, f"epochs={epochs}") for epochs in (3, 4))
    train(three, tmp_path / "run")
    assert refused(lambda: train(four, tmp_path / "run")) == [("--run-dir", "conflict")]
    assert train(four, tmp_path / "run", allow_recipe_change=True)["epochs"] == 4
    train(four, tmp_path / "straight")
    assert last_weights(tmp_path / "run") == last_weights(tmp_path / "straight")
    shorter = load_recipe("debug", *words, "epochs=2")
    assert refused(lambda: train(shorter, tmp_path / "run", allow_recipe_change=True)) == [("--run-dir", "exists")]


@pytest.mark.parametrize(
    "schedule",
    [
        "{name: cosine}",
        "{name: cosine, interval: step, warmup_epochs: 1}",
        "{name: polynomial}",
        "{name: onecycle, max_lr: 0.1}",
    ],
)
def test_a_run_whose_schedule_depends_on_its_length_is_not_prolonged(schedule, tmp_path, refused):
    words = [*SMALL, "batch_size=50", f"schedule={schedule}"]
    train(load_recipe("debug", *words, "epochs=2"), tmp_path / "run")
    three = load_recipe("debug", *words, "epochs=3")
    assert refused(lambda: train(three, tmp_path / "run", allow_recipe_change=True)) == [("schedule.name", "conflict")]
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"


def test_the_first_speed_after_a_resume_counts_only_time_since_then(accelerator, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    first, second = Meter(accelerator), Meter(accelerator)
    for meter, seconds in ((first, 6.0), (second, 4.0)):
        meter.resume()
        meter.count_step(50)
        meter.add(torch.tensor(1.0), torch.zeros(50, 10), torch.zeros(50, dtype=torch.int64))
        now[0] += seconds
        if meter is first:
            second.load_state_dict(first.state_dict())
    assert second.read()["train/images_per_second"] == pytest.approx(10.0)
    assert second.seconds_per_step == 5.0 and second.own_seconds == 4.0


# --- other data ---------------------------------------------------------------------------------------------------


def rename(data: Images) -> Images:
    return replace(data, classes=(*data.classes[:-1], "nine"))


def add_class(data: Images) -> Images:
    return replace(data, classes=(*data.classes, "ten"))


def change_one_label(data: Images) -> Images:
    return replace(data, labels=torch.cat([9 - data.labels[:1], data.labels[1:]]))


def change_images(data: Images) -> Images:
    return replace(data, images=255 - data.images)


@pytest.fixture
def resume_with(tmp_path, monkeypatch, capsys) -> Callable[..., str]:
    """A function that resumes a run with changed training images and returns what it prints."""
    words = [*SMALL, "batch_size=50", "checkpoint.every_steps=2", "epochs=2"]
    train(load_recipe("debug", *words, "max_steps=2"), tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "STATUS").write_text("preempted\n")
    source = DATASETS["synthetic"]

    def resume(change: Callable[[Images], Images], allow: bool, *overrides: str) -> str:
        monkeypatch.setitem(
            DATASETS, "synthetic", lambda request: Splits(*(change(part) for part in source(request).parts))
        )
        capsys.readouterr()
        train(load_recipe("debug", *words, *overrides, "max_steps=2"), tmp_path / "run", allow_recipe_change=allow)
        return capsys.readouterr().out

    return resume


def test_other_classes_are_refused_and_only_other_names_can_be_allowed(resume_with, refused):
    assert refused(lambda: resume_with(rename, False)) == [("data.dataset", "conflict")]
    assert refused(lambda: resume_with(add_class, True)) == [("data.dataset", "conflict")]
    assert "classes have changed" in resume_with(rename, True)


def test_a_refusal_changes_no_checkpoint(resume_with, refused, tmp_path):
    def files() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes() for path in (tmp_path / "run" / "checkpoints").rglob("*") if path.is_file()
        }

    before = files()
    assert len(before) > 1
    words = "data.limit_train=100"  # other data of another size would convert the checkpoint
    assert refused(lambda: resume_with(add_class, True, words)) == [("data.dataset", "conflict")]
    assert files() == before
    assert "images in batches of" in resume_with(lambda data: data, True, words)
    assert files() != before


@pytest.mark.parametrize("change", [change_one_label, change_images])
def test_other_images_or_labels_are_a_note(resume_with, change):
    assert "training images or their labels have changed since the checkpoint at step 2" in resume_with(change, False)


def test_the_same_data_gives_no_note(resume_with):
    assert "have changed" not in resume_with(lambda data: data, False)
