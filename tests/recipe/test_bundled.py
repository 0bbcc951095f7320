"""Every shipped recipe loads, has its notes, has the parameters of its document, and trains."""

from __future__ import annotations

import math
import re

import pytest
import torch

from mnist_dist import build_model, load_recipe, train
from mnist_dist.models import count_parameters
from mnist_dist.recipe.file import bundled_recipes, recipe_notes
from mnist_dist.run.checkpointing import Checkpointer
from mnist_dist.train import main
from tests.models import parameters

DOCUMENTED = ["ms_ran", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "simple_cnn", "mnistnet"]
DOCUMENTED += ["mnistnet_25k", "mnistnet_13k", "model_v1_step", "model_v1_onecycle", "model_v2_step"]
DOCUMENTED += ["model_v2_onecycle", "model_v3_step", "model_v3_onecycle", "lenet5"]
PARAMETERS = {name: parameters.PARAMETERS[re.sub("_(step|onecycle)$", "", name)] for name in DOCUMENTED}
NAMES = list(bundled_recipes())


def test_documented_recipes_are_shipped():
    assert set(NAMES) >= {*PARAMETERS, "quickstart", "debug", "small_cnn"}


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_its_notes(name):
    notes = recipe_notes(bundled_recipes()[name])
    assert set(notes) >= {"command", "document", "claim", "measured"}
    folder, _, stem = name.rpartition("/")
    commands = {
        "": f"accelerate launch -m mnist_dist.train --recipe {name}.yaml",
        "plus": f"launch/reproduce.sh {stem}",
        "speed": f"python -m mnist_dist.benchmark --time-to-accuracy configs/{name}.yaml --seeds 30",
    }
    assert notes["command"] == commands[folder]
    assert load_recipe(name).name == name.rpartition("/")[2]


@pytest.mark.parametrize(("name", "count"), PARAMETERS.items())
def test_recipe_has_the_parameters_of_its_document(name, count):
    model = load_recipe(name).model
    with torch.device("meta"):
        assert count_parameters(build_model(model.name, **model.keywords)) == count


@pytest.mark.parametrize("name", NAMES)
def test_recipe_trains_two_steps(name, tmp_path, monkeypatch):
    monkeypatch.setattr(Checkpointer, "save", lambda self, **_: None)  # with ResNet-152 it takes longer than the steps
    words = ["data.dataset=synthetic", "data.limit_train=8", "data.limit_test=8", "batch_size=4", "max_steps=2"]
    words += ["epochs=1", "tracking.wandb.mode=disabled"]
    if load_recipe(name).distill.teachers:
        train(load_recipe("lenet5", *words), tmp_path / "teacher")
        words += [f"distill.from={tmp_path / 'teacher'}"]
    summary = train(load_recipe(name, *words), tmp_path / "run")
    assert summary["steps"] == 2
    assert math.isfinite(summary["eval.last.loss"]) and math.isfinite(summary["train.last.loss"])


def test_list_shows_every_recipe(capsys):
    assert main(["--list-recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in NAMES:
        [line] = [line for line in lines if line.split()[:1] == [name]]
        if name in PARAMETERS:
            assert f"{PARAMETERS[name]:,}" in line
    [line] = [line for line in lines if line.split()[:1] == ["cifar10_quick"]]
    assert "577,578" in line  # of colour images with 32×32 pixels
