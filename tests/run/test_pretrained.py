"""Weights of one run as the beginning of another: what fits is taken, what is frozen stays as it is, bit for bit."""

from __future__ import annotations

import shutil
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mnist_dist import load_recipe, train
from mnist_dist.data import images as datasets
from mnist_dist.engine.checkpoint import load_weights
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.errors import RecipeError
from tests.distributed.test_worlds import launch

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
    def load(root, split, download):
        parts = synthetic(root, split, download)
        return [replace(part, labels=part.labels % 7, classes=tuple("abcdefg")) for part in parts]

    synthetic = datasets.DATASETS["synthetic"]
    monkeypatch.setitem(datasets.DATASETS, "synthetic", load)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_weights(folder / "last.safetensors")[0]


def assert_frozen(folder: Path, source: Path) -> None:
    """All that lies in a frozen stage is the source's, running statistics too; all other parameters have moved."""
    before, after = tensors(source), tensors(folder)
    for name, value in after.items():
        if any(fnmatch(name, pattern) for pattern in FROZEN):
            assert torch.equal(value, before[name]), name
        elif value.shape == before[name].shape:
            assert not torch.equal(value, before[name]), name


@pytest.mark.parametrize("word", ["ema_decay=0.9", "logical_shards=4", "clip_grad_norm=0.1"])
def test_what_is_frozen_stays_and_a_head_of_another_size_begins_anew(source, tmp_path, seven_classes, word):
    train(load_recipe("debug", *TRANSFER, f"model.init_from={source}", word), tmp_path / "run")
    assert_frozen(tmp_path / "run", source)
    assert tensors(tmp_path / "run")["classifier.2.weight"].shape == (7, 32)
    console = (tmp_path / "run" / "console.log").read_text()
    assert (
        f"{source}/last.safetensors (ms_ran); begins anew: classifier.2.weight, classifier.2.bias; not used" in console
    )


def test_what_is_frozen_stays_in_two_processes(source, tmp_path):
    words = ["--recipe", "debug", *TRANSFER, f"model.init_from={source / 'best.safetensors'}", "sync_batchnorm=true"]
    launch(2, tmp_path / "run", *words)
    assert_frozen(tmp_path / "run", source)


def test_a_run_goes_on_without_what_it_began_from(source, tmp_path, monkeypatch):
    origin = shutil.copytree(source, tmp_path / "origin")
    recipe = load_recipe("debug", *TRANSFER, f"model.init_from={origin}", "checkpoint.every_steps=2")
    train(recipe, tmp_path / "whole")

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
    assert (tmp_path / "run/last.safetensors").read_bytes() == (tmp_path / "whole/last.safetensors").read_bytes()

    # Begun anew it would need them; other weights than those asked for are no way out.
    for checkpoint in again.glob("checkpoints/step-*/state.pt"):
        checkpoint.write_bytes(b"")
    with pytest.raises(RecipeError, match=r"there is no .*origin"):
        train(recipe, again)


def test_a_file_from_elsewhere_serves_too(source, tmp_path):
    save_file({f"{name}": value for name, value in tensors(source).items()}, tmp_path / "weights.safetensors")
    train(load_recipe("debug", *TRANSFER, f"model.init_from={tmp_path}/weights.safetensors"), tmp_path / "run")
    assert_frozen(tmp_path / "run", source)


@pytest.mark.parametrize(
    ("init_from", "word", "expected"),
    [
        ("nowhere", "", "command line: model.init_from\n *there is no nowhere; name a finished run's folder"),
        ("EMPTY", "", r"there is no .*last\.safetensors; name a finished run"),
        ("SOURCE/recipe.yaml", "", "recipe.yaml is not a whole weights file"),
        ("SOURCE", "model={name: lenet5}", "is of ms_ran: not one of its tensors fits lenet5 by name and shape"),
        ("SOURCE", "model.width=8", r"\(ms_ran\) does not bring stem.0.weight, .* and \d+ more, which model.freeze"),
    ],
)
def test_weights_that_do_not_serve_are_refused(source, tmp_path, monkeypatch, init_from, word, expected):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    init_from = init_from.replace("SOURCE", str(source)).replace("EMPTY", "empty")
    words = [*TRANSFER, *([word] if word else []), f"model.init_from={init_from}"]
    with pytest.raises(RecipeError, match=expected):
        train(load_recipe("debug", *words), tmp_path / "run")
    assert not (tmp_path / "run").exists()
