"""Training a recipe: the run folder, the metrics, and settings that change the length of a run."""

from __future__ import annotations

import json
import os
import subprocess

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from mnist_dist import load_recipe, load_run, train
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.engine.evaluation import evaluate
from mnist_dist.evaluate import evaluate as evaluate_run
from mnist_dist.run.build import build_components
from mnist_dist.run.data import load_data
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.model_setup import build_module
from mnist_dist.tracking import ConsoleTracker, JSONLTracker
from mnist_dist.train import main
from tests.processes import forked_python

TINY = [
    "data.dataset=synthetic",
    "data.limit_train=200",
    "data.limit_test=100",
    "batch_size=64",
    "log_every=2",
    "tracking.wandb.mode=disabled",
]


@pytest.mark.launch
def test_quickstart_through_accelerate_launch_reaches_97_percent(tmp_path):
    pytest.importorskip("sklearn", reason='the digits come with scikit-learn: pip install -e ".[demo]"')
    command = [
        forked_python(),
        "-m",
        "accelerate.commands.launch",
        "-m",
        "mnist_dist.train",
        "--recipe",
        "quickstart.yaml",
        "tracking.plots=false",
    ]
    # No credentials of W&B: neither the variables nor a file in the home folder.
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB", "NETRC"))}
    variables |= {"HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\x1b" not in done.stdout, "escape codes without a terminal"
    [run_dir] = (tmp_path / "runs" / "quickstart").iterdir()
    run = load_run(run_dir, weights="last")
    assert run.summary["eval.last.accuracy"] >= 97.0
    assert f"{run.summary['eval.last.accuracy']:.2f} %" in done.stdout
    assert list(run_dir.glob("wandb/offline-run-*")), "without credentials W&B logs offline into the run folder"


def test_one_process_on_a_mac_trains_on_its_gpu(accelerator, monkeypatch):
    """This test pretends that there is a Mac's GPU. tests/test_platforms.py has several processes, on its CPU."""
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr("accelerate.state.is_mps_available", lambda: True)
    AcceleratorState._reset_state(reset_partial_state=True)
    assert launched_world().device.type == Accelerator().device.type == "mps"


def test_momentum_starts_at_zero(accelerator):
    recipe = load_recipe("model_v1_step", *TINY)
    dataset = load_data(recipe, launched_world())
    components = build_components(recipe, "no", dataset.train, build_module(recipe, dataset))
    for parameter in components.module.parameters():
        assert not components.update.optimizer.state[parameter]["momentum_buffer"].any()


def test_momentum_that_the_schedule_adds_starts_at_zero(accelerator):
    cycle = "schedule={name: onecycle, max_lr: 0.1, cycle_momentum: true}"
    recipe = load_recipe("lenet5", *TINY, "optimizer={name: sgd}", "optimizer.weight_decay=null", cycle)
    dataset = load_data(recipe, launched_world())
    components = build_components(recipe, "no", dataset.train, build_module(recipe, dataset))
    for parameter in components.module.parameters():
        assert not components.update.optimizer.state[parameter]["momentum_buffer"].any()


def test_logical_shards_do_not_change_integer_buffers(tmp_path):
    words = ["data.limit_train=8", "data.limit_test=8", "batch_size=4", "logical_shards=2", "max_steps=2"]
    recipe = load_recipe("debug", *words, "model.name=torchvision/swin_t", "tracking.wandb.mode=disabled")
    train(recipe, tmp_path / "run")
    tables = [value for name, value in load_run(tmp_path / "run").model.state_dict().items() if name.endswith("_index")]
    assert tables and all(int(table.max()) == 168 for table in tables)


def test_home_and_variables_in_every_path_are_replaced(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WHERE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["--recipe", "debug", "epochs=1", "max_steps=4", "tracking.plots=false"]
    assert main([*words, "--run-dir=~/first", "checkpoint.every_steps=2"]) == 0
    assert main([*words, "--run-dir=$WHERE/second", "model.init_from=~/first"]) == 0
    assert main([*words, "--run-dir=~/third", "distill.from=[~/first, $WHERE/second]"]) == 0
    assert main([*words, "--run-dir=~/fourth", "--resume=~/first"]) == 0
    train(load_recipe("~/first/recipe.yaml"), "~/fifth")
    for name in ("first", "second", "third", "fourth", "fifth"):
        assert load_run(f"~/{name}").folder.path == tmp_path / name
    assert not (tmp_path / "~").exists() and not (tmp_path / "$WHERE").exists()


@pytest.mark.pictures
def test_a_run_folder_holds_all_files_of_a_run(tmp_path):
    recipe = load_recipe("lenet5", *TINY, "epochs=2", "optimizer.lr=0.02")
    summary = train(recipe, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    assert folder.status.read_text() == "done\n"
    # The resolved recipe: the precision is the launcher's.
    assert load_recipe(folder.recipe) == recipe.model_copy(update={"mixed_precision": "no"})
    assert json.loads(folder.summary.read_text()) == summary
    assert set(summary) >= {
        *("recipe", "model", "parameters", "world_size", "device", "mixed_precision", "epochs", "steps"),
        *("train_seconds", "images_per_second", "versions", "git_commit"),
        *("eval.last.accuracy", "eval.last.loss", "eval.best.accuracy", "eval.best.epoch"),
    }
    assert summary["parameters"] == 61_706
    assert (summary["epochs"], summary["steps"]) == (2, 8)
    pictures = {path.name for path in folder.plots.iterdir() if path.read_bytes().startswith(b"\x89PNG")}
    assert pictures == {
        *("training_history.png", "per_batch_loss.png", "predictions.png", "misclassified.png"),
        *("confusion_matrix.png", "augmented_samples.png"),
    }
    assert "61,706" in folder.model_summary.read_text()
    assert "epoch 2/2" in folder.console.read_text()
    assert not list(tmp_path.rglob("*.tmp"))


def test_metrics_have_a_line_per_interval_and_per_evaluation(tmp_path):
    train(load_recipe("lenet5", *TINY, "epochs=2"), tmp_path / "run")
    lines = load_run(tmp_path / "run").metrics
    training = [line for line in lines if "train/loss" in line]
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in training] == [2, 4, 6, 8]  # every 2 steps; an epoch is 4 steps of 64, 64, 64, 8
    assert [(line["step"], line["epoch"]) for line in evaluations] == [(4, 1.0), (8, 2.0)]
    for line in training:
        assert set(line) >= {"train/accuracy", "train/lr", "train/grad_norm", "train/images_per_second", "epoch"}
        assert 0 <= line["train/accuracy"] <= 100


def test_load_run_returns_the_network_that_was_evaluated(tmp_path):
    from mnist_dist.data import load_dataset

    summary = train(load_recipe("simple_cnn", *TINY, "eval_batch_size=50"), tmp_path / "run")
    data = load_dataset("synthetic", limit_test=100).test
    model = load_run(tmp_path / "run", weights="last").model
    with torch.no_grad():
        logits = torch.cat([model(data.normalize(part)) for part in data.images.split(50)])
    assert 100 * (logits.argmax(1) == data.labels).float().mean().item() == pytest.approx(summary["eval.last.accuracy"])


def test_training_twice_in_one_process_with_two_precisions(tmp_path):
    first = train(load_recipe("lenet5", *TINY, "mixed_precision=no"), tmp_path / "a")
    second = train(load_recipe("lenet5", *TINY, "mixed_precision=bf16"), tmp_path / "b")
    assert (first["mixed_precision"], second["mixed_precision"]) == ("no", "bf16")


def test_equal_seeds_give_equal_bytes_and_different_seeds_different_bytes(tmp_path):
    def weights(name: str, seed: int) -> bytes:
        train(load_recipe("model_v1_onecycle", *TINY, "epochs=1", f"seed={seed}"), tmp_path / name)
        return RunFolder(tmp_path / name).last.read_bytes()

    assert weights("a", 1) == weights("b", 1) != weights("c", 2)


def test_the_validation_part_is_evaluated_and_the_test_images_are_used_once(tmp_path, monkeypatch):
    evaluated: list[int] = []

    def evaluate_and_count(accelerator, module, data, **keywords):
        evaluated.append(len(data))
        return evaluate(accelerator, module, data, **keywords)

    monkeypatch.setattr("mnist_dist.run.components.evaluate", evaluate_and_count)
    recipe = load_recipe("lenet5", *TINY, "data.limit_train=null", "data.validation=300", "epochs=3")
    summary = train(recipe, tmp_path / "run")
    assert summary["eval.split"] == "validation"
    assert evaluated == [300, 300, 300, 100]


def test_early_stopping_counts_evaluations_without_improvement(tmp_path):
    frozen = "optimizer.lr=1e-12"  # the network learns nothing, so no evaluation improves
    summary = train(load_recipe("lenet5", *TINY, frozen, "epochs=9", "early_stopping.patience=2"), tmp_path / "run")
    assert (summary["epochs"], summary["eval.best.epoch"]) == (3, 1.0)


def test_max_steps_ends_in_the_middle_of_an_epoch_with_an_evaluation(tmp_path):
    summary = train(load_recipe("lenet5", *TINY, "epochs=2", "max_steps=6"), tmp_path / "run")
    assert (summary["steps"], summary["epochs"]) == (6, 1.5)
    assert load_run(tmp_path / "run").metrics[-1]["step"] == 6


def test_averaged_weights_are_the_ones_evaluated_and_saved(tmp_path):
    recipe = load_recipe("lenet5", *TINY, "epochs=3", "ema_decay=0.5", "optimizer.lr=0.1")
    averaged = train(recipe, tmp_path / "averaged")
    plain = train(load_recipe("lenet5", *TINY, "epochs=3", "optimizer.lr=0.1"), tmp_path / "plain")
    assert averaged["train.last.loss"] == plain["train.last.loss"]
    assert averaged["eval.last.loss"] != plain["eval.last.loss"]
    found = evaluate_run(load_run(tmp_path / "averaged", weights="last"))
    assert found["loss"] == averaged["eval.last.loss"]


def test_less_patience_takes_effect_when_the_run_resumes(tmp_path):
    """The resumed run has already had more evaluations without improvement than the new patience allows."""
    words = ("optimizer.lr=1e-12", "epochs=9", "checkpoint.every_steps=4")
    train(load_recipe("lenet5", *TINY, *words, "early_stopping.patience=5", "max_steps=16"), tmp_path / "run")
    recipe = load_recipe("lenet5", *TINY, *words, "early_stopping.patience=2")
    summary = train(recipe, tmp_path / "less", resume=str(tmp_path / "run"), allow_recipe_change=True)
    assert summary["epochs"] == 4


def test_a_crash_ends_the_trackers_and_sets_the_status(tmp_path, monkeypatch):
    ended: list[str] = []
    for tracker in (ConsoleTracker, JSONLTracker):
        monkeypatch.setattr(tracker, "finish", lambda tracker: ended.append(tracker.name))
    monkeypatch.setattr("mnist_dist.train.fit", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(load_recipe("lenet5", *TINY), tmp_path / "run")
    assert sorted(ended) == ["console", "jsonl"], "otherwise a terminal keeps its cursor hidden"
    assert RunFolder(tmp_path / "run").status.read_text() == "failed\n"


@pytest.mark.parametrize(("recipe", "least"), [("simple_cnn", 97.0), ("model_v1_onecycle", 96.5)])
def test_one_epoch_of_mnist(recipe, least, mnist_root, tmp_path):
    summary = train(
        load_recipe(recipe, "epochs=1", f"data.root={mnist_root}", "tracking.wandb.mode=disabled"), tmp_path / "r"
    )
    assert summary["eval.last.accuracy"] >= least
