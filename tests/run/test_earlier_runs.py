"""Earlier runs: fitting initial weights are copied, frozen tensors stay equal bit for bit, bad teachers are refused."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mnist_dist import load_recipe, load_run, train
from mnist_dist.data import DATASETS
from mnist_dist.data.sources.request import Splits
from mnist_dist.engine.checkpoint import load_weights
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.errors import RecipeError
from tests.faults.training import REPOSITORY, VARIABLES
from tests.processes import run_ranks

FROZEN = ["stem.*", "residual1.*"]
NET = ["model.name=ms_ran", "model.width=4", "model.bottleneck=2", "data.limit_test=50", "tracking.wandb.mode=disabled"]
# 195 images in batches of 64: the last has three, fewer than the logical shards.
TRANSFER = [*NET, "data.limit_train=195", "batch_size=64", "model.freeze=[stem.*,residual1.*]", "epochs=2"]
TRANSFER += ["optimizer={name: sgd, lr: 0.05, momentum: 0.9, weight_decay: 0.1}", "schedule={name: constant}"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("transfer") / "source"
    train(load_recipe("debug", *NET, "data.limit_train=256"), folder)
    return folder


@pytest.fixture
def seven_classes(monkeypatch):
    def load(request):
        splits = synthetic(request)
        return Splits(*(replace(part, labels=part.labels % 7, classes=tuple("abcdefg")) for part in splits.parts))

    synthetic = DATASETS["synthetic"]
    monkeypatch.setitem(DATASETS, "synthetic", load)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "last.safetensors")[0]


def assert_frozen(folder: Path, source: Path) -> None:
    """Checks that the frozen stages equal the source's, running statistics included, and that the rest has changed."""
    before, after = tensors(source), tensors(folder)
    for name, value in after.items():
        if any(fnmatch(name, pattern) for pattern in FROZEN):
            assert torch.equal(value, before[name]), name
        elif value.shape == before[name].shape:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("word", ["ema_decay=0.9", "logical_shards=4", "clip_grad_norm=0.1"])
def test_frozen_stages_stay_and_a_head_of_another_size_is_random(source, tmp_path, seven_classes, word):
    train(load_recipe("debug", *TRANSFER, f"model.init_from={source}", word), tmp_path / "run")
    assert_frozen(tmp_path / "run", source)
    assert tensors(tmp_path / "run")["classifier.2.weight"].shape == (7, 32)
    console = (tmp_path / "run" / "console.log").read_text()
    [note] = [line for line in console.splitlines() if f"{source}/last.safetensors (ms_ran)" in line]
    listed = [set(part.partition(": ")[2].split(", ")) for part in note.split("; ")[1:]]
    assert listed == [{"classifier.2.weight", "classifier.2.bias"}] * 2, "the random ones and the unused ones"


def test_frozen_stages_stay_in_two_processes(source, tmp_path):
    words = [*TRANSFER, f"model.init_from={source / 'best.safetensors'}", "sync_batchnorm=true", "tracking.plots=false"]
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "debug", "--run-dir", tmp_path / "run", *words]
    run_ranks(2, command, cwd=REPOSITORY, env=os.environ | VARIABLES)
    assert load_run(tmp_path / "run").summary["world_size"] == 2
    assert_frozen(tmp_path / "run", source)


def test_a_run_resumes_although_its_initial_weights_are_gone(source, tmp_path, monkeypatch, refused):
    origin = shutil.copytree(source, tmp_path / "origin")
    recipe = load_recipe("debug", *TRANSFER, f"model.init_from={origin}", "checkpoint.every_steps=2")
    train(recipe, tmp_path / "undisturbed")

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        update = TrainStep.__call__

        def interrupted(self, plan, index, step):
            if step == 5:
                raise KeyboardInterrupt
            update(self, plan, index, step)

        patch.setattr(TrainStep, "__call__", interrupted)
        train(recipe, tmp_path / "run")
    shutil.rmtree(origin)
    again = shutil.copytree(tmp_path / "run", tmp_path / "again")
    train(recipe, tmp_path / "run")
    assert (tmp_path / "run/last.safetensors").read_bytes() == (tmp_path / "undisturbed/last.safetensors").read_bytes()

    # If all checkpoints are damaged the run must start again, and then it needs the initial weights.
    for checkpoint in again.glob("checkpoints/step-*/state.pt"):
        checkpoint.write_bytes(b"")
    assert refused(lambda: train(recipe, again)) == [("model.init_from", "missing")]


def test_a_safetensors_file_without_description_is_accepted(source, tmp_path):
    save_file(tensors(source), tmp_path / "weights.safetensors")
    train(load_recipe("debug", *TRANSFER, f"model.init_from={tmp_path}/weights.safetensors"), tmp_path / "run")
    assert_frozen(tmp_path / "run", source)


@pytest.mark.parametrize(
    ("init_from", "word", "kind", "named"),
    [
        ("nowhere", "", "missing", ["nowhere"]),
        ("EMPTY", "", "missing", ["empty/last.safetensors"]),
        ("SOURCE/recipe.yaml", "", "damaged", ["recipe.yaml"]),
        ("SOURCE", "model={name: lenet5}", "conflict", ["ms_ran", "lenet5"]),
        ("SOURCE", "model.width=8", "conflict", ["ms_ran", "stem.0.weight", "model.freeze"]),
    ],
)
def test_unusable_weights_are_refused(source, tmp_path, monkeypatch, init_from, word, kind, named):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    init_from = init_from.replace("SOURCE", str(source)).replace("EMPTY", "empty")
    words = [*TRANSFER, *([word] if word else []), f"model.init_from={init_from}"]
    with pytest.raises(RecipeError) as caught:
        train(load_recipe("debug", *words), tmp_path / "run")
    [problem] = caught.value.problems
    assert (problem.where, problem.key, problem.kind) == ("command line", "model.init_from", kind)
    assert all(name in problem.message for name in named), problem.message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "kind", "advice"), [(None, "missing", "train it first"), (b"", "damaged", "train it again")]
)
def test_a_teacher_without_usable_weights_is_refused(source, tmp_path, damage, kind, advice):
    teacher = shutil.copytree(source, tmp_path / "teacher")
    (teacher / "last.safetensors").unlink()
    if damage is not None:
        (teacher / "last.safetensors").write_bytes(damage)
    with pytest.raises(RecipeError) as caught:
        train(load_recipe("debug", *NET, f"distill.from={teacher}"), tmp_path / "run")
    [problem] = caught.value.problems
    assert (problem.key, problem.kind) == ("distill.from", kind) and problem.message.splitlines()[-1].startswith(advice)
