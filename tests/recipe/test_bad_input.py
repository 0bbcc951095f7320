"""Bad input of any kind ends before training: exit code 2, one screen on stderr, nothing left half-written."""

from __future__ import annotations

import gzip
import os
import struct
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import yaml
from accelerate.state import AcceleratorState
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import mnist_dist
from mnist_dist.cli import run_command
from mnist_dist.errors import RecipeError
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.train import main

GOOD = """\
model:
  name: lenet5
data:
  dataset: synthetic
"""
"""Four lines, so that what a test adds begins in line 5."""

SCREEN = 24
WIDTH = 120


def tree(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder; of files, what they hold."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(autouse=True)
def an_empty_folder(tmp_path, monkeypatch):
    """A working directory without data, without the network."""

    def unreachable(*args: object, **keywords: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a model of one's own adds the folder
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for name in ("ACCELERATE_MIXED_PRECISION", "MNIST_DIST_DATA", "RANK"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls the door with words that it must refuse; returns the message on one line."""

    def fit(*args: object) -> None:
        pytest.fail("training began")

    monkeypatch.setattr("mnist_dist.train.fit", fit)

    def call(*argv: str) -> str:
        before = tree(tmp_path)
        code = run_command(lambda: main([str(word) for word in argv]))
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert_one_screen(err)
        assert tree(tmp_path) == before, "something was left behind"
        return " ".join(err.split())

    return call


@pytest.fixture
def refused_recipe(refused):
    """As `refused`, of the text of a recipe and overrides."""

    def call(text: str, *overrides: str) -> str:
        Path("my.yaml").write_text(text, encoding="utf-8")
        return refused("--recipe", "my.yaml", *overrides)

    return call


def assert_one_screen(err: str) -> None:
    assert err.startswith("mnist_dist: ")
    assert "Traceback" not in err
    assert sum(1 + len(line) // WIDTH for line in err.splitlines()) <= SCREEN, err


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("simple_cn", "--recipe 'simple_cn' there is no such recipe; did you mean 'simple_cnn'"),
        ("configs/simple_cn.yaml", "did you mean 'simple_cnn'"),
        ("recipes/wied.yaml", "did you mean 'recipes/wide.yaml'?"),
        ("recipes/wide.yaml/more", "there is no such recipe"),
        ("nothing/like/it", "bundled: debug, lenet5, "),
        ("recipes", "--recipe 'recipes' a folder; in a run folder the recipe is recipe.yaml"),
        ("", "--recipe '' a folder"),
        ("x" * 300, "File name too long"),
    ],
)
def test_a_recipe_that_is_not_there(refused, name, expected):
    Path("recipes").mkdir()
    Path("recipes/wide.yaml").write_text(GOOD, encoding="utf-8")
    assert expected in refused("--recipe", name)


def test_no_recipe_at_all(refused):
    assert "command line --recipe NAME is needed; --list-recipes shows the bundled ones" in refused()


def test_an_unknown_option(refused):
    assert "unrecognized arguments: --epochs" in refused("--recipe", "simple_cnn", "--epochs", "3")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "my.yaml a recipe is a mapping of keys to values"),
        (b"# only a comment\n", "my.yaml a recipe is a mapping of keys to values"),
        (b"- model\n- data\n", "my.yaml a recipe is a mapping of keys to values"),
        (b"simple_cnn\n", "my.yaml a recipe is a mapping of keys to values"),
        (
            b"model:\n  name: [a\nepochs: 1\n",
            "my.yaml:3 cannot be read: while parsing a flow sequence expected ',' or ']'",
        ),
        (b"model:\n  name: lenet5\n epochs: 1\n", "my.yaml:3 cannot be read: while parsing a block mapping"),
        (b"epochs: 1\nmodel:\n\tname: lenet5\n", "my.yaml:3 cannot be read: while scanning for the next token"),
        (b"model:\n\tname: lenet5\n", "indent with spaces, not tabs"),
        (
            b"epochs: 1\nbatch_size: 2\nepochs: 3\n",
            "my.yaml:3 cannot be read: epochs is given twice, here and at my.yaml:1",
        ),
        (
            b"model:\n  name: a\n  name: b\n",
            "my.yaml:3 cannot be read: model.name is given twice, here and at my.yaml:2",
        ),
        (b"model: &m\n  name: lenet5\n  again: *m\n", "my.yaml:1 cannot be read: a section or list contains itself"),
        (b"epochs: 1\nmodel: *nobody\n", "my.yaml:2 cannot be read: found undefined alias 'nobody'"),
        (b"model: !!python/object:os.system {}\n", "my.yaml:1 cannot be read: 'python/object:os.system' has no place"),
        (b"model: !mine {}\n", "my.yaml:1 cannot be read: '!mine' has no place in a recipe"),
        (b"name: !!timestamp 2026-01-01\n", "my.yaml:1 cannot be read: 'timestamp' has no place in a recipe"),
        (b"epochs: !!int many\n", "my.yaml cannot be read: invalid literal for int()"),
        (b"deterministic: !!bool maybe\n", "my.yaml cannot be read: "),
        (b"epochs: 1\n2: 3\n", "my.yaml:2 cannot be read: a key is text; put it in quotes if it is meant"),
        (b"epochs: 1\n---\nepochs: 2\n", "my.yaml:2 cannot be read: expected a single document"),
        (bytes(range(256)), "my.yaml not a text file (invalid start byte at byte 128); a recipe is YAML in UTF-8"),
        (b"\x00\x01", "my.yaml cannot be read: unacceptable character #x0000"),
        ("name: é\n".encode("latin-1"), "my.yaml not a text file (invalid continuation byte at byte 6)"),
        (b"[" * 5000, "my.yaml cannot be read"),
    ],
)
def test_a_file_that_is_not_a_recipe(refused, content, expected):
    Path("my.yaml").write_bytes(content)
    assert expected in refused("--recipe", "my.yaml")


# --- keys and types -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epoch: 3", "my.yaml:5: epoch unknown key; did you mean 'epochs'?"),
        (
            "  augment: {rotaton: 3}",
            "my.yaml:5: data.augment.rotaton unknown key; did you mean 'rotation'?",
        ),
        ("tracking: {wandb: {porject: x}}", "tracking.wandb.porject unknown key; did you mean 'project'?"),
        ("optimizer.lr: 0.1", "my.yaml:5: optimizer.lr unknown key"),
        ("'': 3", "unknown key; known: name, seed"),
        ("distill: {form: runs/a}", "my.yaml:5: distill.form unknown key; did you mean 'from'?"),
        ("distill: {teachers: runs/a}", "distill.teachers unknown key; known: from, weight, temperature"),
        ("engine: {gpu: true}", "my.yaml:5: engine.gpu unknown key; known: capture, channels_last"),
        (
            "optimizer: {momentun: 0.9}",
            "optimizer.momentun unknown key; did you mean 'momentum'?",
        ),
        ("optimizer: {params: 3}", "optimizer.params unknown key; known: name, lr, momentum"),
        ("schedule: {name: cosine, t_max: 3}", "schedule.t_max unknown key; did you mean 'T_max'?"),
        ("schedule: {name: constant, span: 3}", "schedule.span unknown key; known: name"),
    ],
)
def test_an_unknown_key(refused_recipe, text, expected):
    assert expected in refused_recipe(GOOD + text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "name: ms_ran\n  widht: 8",
            "my.yaml:3: model.widht unknown key; did you mean 'width'?",
        ),
        ("name: ms_ran\n  num_classes: 8", "model.num_classes unknown key; known: name, freeze, init_from, width"),
        ("name: lenet5\n  width: 8", "my.yaml:3: model.width unknown key; known: name, freeze"),
        ("name: torchvision/resnet18\n  widht: 8", "my.yaml:3: model.widht"),
    ],
)
def test_an_unknown_keyword_of_a_model(refused_recipe, text, expected):
    assert expected in refused_recipe(f"model:\n  {text}\n")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 2.5", "my.yaml:5: epochs expected a whole number, got 2.5"),
        ("epochs: '3'", 'epochs expected a whole number, got "3"'),
        ("epochs: true", "epochs expected a whole number, got true"),
        ("epochs: [3]", "epochs expected a whole number, got [3]"),
        ("epochs: {a: 3}", 'epochs expected a whole number, got {"a": 3}'),
        ("epochs:", "epochs expected a whole number, got null"),
        ("seed: 1e3", "seed expected a whole number, got 1000.0"),
        ("label_smoothing: little", 'label_smoothing expected a number, got "little"'),
        ("label_smoothing: .nan", "label_smoothing expected a finite number, got NaN"),
        ("clip_grad_norm: .inf", "clip_grad_norm expected a finite number, got Infinity"),
        ("clip_grad_norm: true", "clip_grad_norm expected a number, got true"),
        ("deterministic: no", 'deterministic expected true or false, got "no"'),
        ("name: 3", "name expected text, got 3"),
        (
            "mixed_precision: fp61",
            "mixed_precision expected 'no', 'bf16' or 'fp16', got \"fp61\"; did you mean 'fp16'?",
        ),
        ("mixed_precision: false", "mixed_precision expected 'no', 'bf16' or 'fp16', got false"),
        ("tracking: {wandb: {tags: 3}}", "tracking.wandb.tags expected a list, e.g. [a, b], got 3"),
        ("tracking: {wandb: {tags: [a,\n 3]}}", "my.yaml:6: tracking.wandb.tags.1 expected text, got 3"),
        ("tracking: {wandb: disabled}", 'tracking.wandb expected a section with keys of its own, got "disabled"'),
        ("optimizer: adam", 'my.yaml:5: optimizer expected a section with keys of its own, got "adam"'),
        ("optimizer: [adam]", "optimizer expected a section with keys of its own"),
        ("optimizer:", "optimizer expected a section with keys of its own, got null"),
        ("optimizer: {lr: .nan}", "optimizer.lr expected a finite number, got NaN"),
        ("optimizer: {momentum: much}", 'optimizer.momentum expected a number, got "much"'),
        ("optimizer: {momentum: .nan}", "optimizer.momentum expected a finite number, got NaN"),
        ("optimizer: {nesterov: 1}", "optimizer.nesterov expected true or false, got 1"),
        ("optimizer: {name: adam, betas: 0.9}", "optimizer.betas expected a list, e.g. [a, b], got 0.9"),
        ("optimizer: {name: adam, betas: [0.9]}", "optimizer.betas expected a longer list, got [0.9]"),
        ("optimizer: {name: adam, betas: [a, b]}", 'optimizer.betas expected a number, got ["a", "b"]'),
        ("schedule: {name: onecycle, max_lr: .inf}", "schedule.max_lr expected a finite number, got Infinity"),
        ("schedule: {name: step, step_size: 2.5}", "schedule.step_size expected a whole number, got 2.5"),
        ("schedule: {name: cosine, interval: stpe}", "expected 'epoch' or 'step', got \"stpe\"; did you mean 'step'?"),
        ("  root: 3", "data.root expected text, got 3"),
        ("distill: runs/a", 'distill expected a section with keys of its own, got "runs/a"'),
        ("distill: {from: 3}", "distill.from expected a list, e.g. [a, b], got 3"),
        ("distill: {from: [a, 3]}", "distill.from.1 expected text, got 3"),
        ("  augment: {scale: 2}", "data.augment.scale expected a list, e.g. [a, b], got 2"),
    ],
)
def test_a_wrong_type(refused_recipe, text, expected):
    assert expected in refused_recipe(GOOD + text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("epochs: 0", "my.yaml:5: epochs expected at least 1, got 0"),
        ("batch_size: -8", "batch_size expected at least 1, got -8"),
        ("seed: -1", "seed expected at least 0, got -1"),
        ("seed: 9223372036854775808", "seed expected less than 9223372036854775808"),
        ("label_smoothing: 1", "label_smoothing expected less than 1, got 1"),
        ("ema_decay: 1.5", "ema_decay expected less than 1, got 1.5"),
        ("max_steps: 0", "max_steps expected at least 1, got 0"),
        ("early_stopping: {patience: 0}", "early_stopping.patience expected at least 1, got 0"),
        ("name: a/b", "name 'a/b' cannot name a folder"),
        ("name: ../../elsewhere", "name '../../elsewhere' cannot name a folder"),
        ("name: ''", "name '' cannot name a folder"),
        ("optimizer: {lr: 0}", "optimizer.lr expected greater than 0, got 0"),
        ("optimizer: {lr: -1e-3}", "optimizer.lr expected greater than 0, got -0.001"),
        ("optimizer: {weight_decay: -1}", "optimizer.weight_decay Invalid weight_decay value: -1; see torch.optim.SGD"),
        ("optimizer: {momentum: -1}", "optimizer.momentum Invalid momentum value: -1; see torch.optim.SGD"),
        ("optimizer: {name: adam, betas: [0.9, 2]}", "Invalid beta parameter at index 1: 2; see torch.optim.Adam"),
        ("schedule: {name: onecycle, max_lr: 0}", "schedule.max_lr max_lr is above 0, not 0"),
        ("schedule: {name: onecycle, max_lr: 1, pct_start: 2}", "schedule.pct_start pct_start is a share of the run"),
        ("schedule: {name: onecycle, max_lr: 1, base_momentum: 3}", "schedule.base_momentum"),
        ("schedule: {name: onecycle, max_lr: 1, three_phase: true, pct_start: 0.8}", "schedule.pct_start"),
        ("schedule: {name: step, step_size: 0}", "schedule.step_size step_size is a number of epochs, at least 1"),
        ("schedule: {name: step, step_size: 1, gamma: -3}", "schedule.gamma"),
        ("schedule: {name: cosine, T_max: 0}", "schedule.T_max T_max is a number of epochs above 0, not 0"),
        ("schedule: {name: cosine, eta_min: -1}", "schedule.eta_min"),
        ("schedule: {name: linear, start_factor: 0}", "schedule.start_factor start_factor is above 0"),
        ("schedule: {name: plateau, factor: 2}", "schedule"),
        ("schedule: {name: plateau, factor: -1}", "schedule.factor"),
        ("schedule: {name: plateau, patience: -1}", "schedule.patience"),
        ("distill: {from: a, weight: 1.5}", "distill.weight expected at most 1, got 1.5"),
        ("distill: {from: a, weight: 0}", "distill.weight expected greater than 0, got 0"),
        ("distill: {from: a, temperature: 0}", "distill.temperature expected greater than 0, got 0"),
        ("  validation: -1", "data.validation expected at least 0, got -1"),
        ("  limit_train: 0", "data.limit_train expected at least 1, got 0"),
        ("  augment: {rotation: -5}", "my.yaml:5: data.augment.rotation expected at least 0, got -5"),
        ("  augment: {rotation: 400}", "data.augment.rotation expected at most 180, got 400"),
        ("  augment: {translation: 2}", "data.augment.translation expected at most 1, got 2"),
        ("  augment: {scale: [2, 1]}", "data.augment.scale scale is [lowest, highest]"),
        ("  augment: {scale: [1, 2, 3]}", "data.augment.scale expected a list of 2, got [1, 2, 3]"),
        ("  augment: {scale: [1]}", "data.augment.scale"),
        ("  augment: {scale: []}", "data.augment.scale"),
        (
            "  augment: {interpolation: cubic}",
            "data.augment.interpolation expected 'nearest' or 'bilinear', got \"cubic\"",
        ),
        ("  augment: {fill: 300}", "data.augment.fill expected at most 255, got 300"),
        ("  augment: {elastic: -1}", "data.augment.elastic expected at least 0, got -1"),
        ("  augment: {elastic: {alpha: 3}}", "data.augment.elastic expected a number"),
        ("  augment: {elastic: 1, elastic_sigma: 2}", "data.augment.elastic_sigma expected at least 3, got 2"),
        ("  augment: {shear: 95}", "data.augment.shear expected less than 90, got 95"),
        ("schedule: {name: onecycle, max_lr: 1, final_div_factor: -1}", "schedule.final_div_factor"),
    ],
)
def test_a_value_out_of_range(refused_recipe, text, expected):
    assert expected in refused_recipe(GOOD + text)


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("optimizer: {name: adma}", "my.yaml:5: optimizer.name expected 'adadelta', "),
        ("optimizer: {name: adma}", "got \"adma\"; did you mean 'adamax' or 'adam'?"),
        ("optimizer: {name: SGD}", "got \"SGD\"; did you mean 'sgd'"),
        ("optimizer: {name: lbfgs}", 'got "lbfgs"'),
        ("optimizer: {name: muon}", "optimizer"),
        ("schedule: {name: onecylce}", "schedule.name expected 'constant', "),
        ("schedule: {name: onecylce}", "did you mean 'onecycle'?"),
    ],
)
def test_an_unknown_name(refused_recipe, text, expected):
    assert expected in refused_recipe(GOOD + text)


def test_an_unknown_data_set(refused_recipe):
    message = refused_recipe("model: {name: lenet5}\ndata: {dataset: fashion-mnist}\n")
    assert "my.yaml:2: data.dataset expected 'mnist', " in message
    assert "did you mean 'fashion_mnist'" in message


OWN = """\
from torch import nn

class Shapeless(nn.Module):
    def forward(self, images):
        return images.flatten(1)

class Silent(Shapeless):
    def forward(self, images):
        return None

class Broken(Shapeless):
    def __init__(self):
        raise RuntimeError("out of ideas")

class Twofold(nn.Linear):
    def __init__(self):
        super().__init__(784, 10)

    def forward(self, images):
        logits = super().forward(images.flatten(1))
        return (logits, logits) if self.training else logits

class Weightless(Shapeless):
    def forward(self, images):
        return images.flatten(1)[:, :10]

class NoModule:
    pass

class Needy(Shapeless):
    def __init__(self, depth: int, width: int = 3):
        super().__init__()
"""


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("name: lenet", "my.yaml:1: model.name unknown model 'lenet'"),
        ("name: lenet", "did you mean 'lenet5'?"),
        ("name: ''", "my.yaml:1: model.name unknown model ''"),
        ("name: 3", "my.yaml:1: model.name expected text, got 3"),
        ("freeze: [a]", "my.yaml:1: model.name this key is needed, e.g. `model: {name: simple_cnn}`"),
        ("name: torchvision/resnet1", "did you mean 'resnet18'?"),
        ("name: torchvision/fcn_resnet50", "torchvision has no classifier 'fcn_resnet50'"),
        ("name: torchvision/alexnet", "model.name"),
        ("name: torchvision/vit_b_16", "Wrong image height! Expected 224 but got 28!"),
        ("name: 'nowhere.nets:Net'", "my.yaml:1: model.name model 'nowhere.nets:Net': cannot import 'nowhere.nets'"),
        ("name: 'my_nets:Brokn'", "'my_nets' has no class or function 'Brokn'"),
        ("name: 'my_nets:Brokn'", "did you mean 'Broken'"),
        ("name: 'my_nets:'", "has no class or function ''"),
        ("name: ':Net'", "model.name"),
        ("name: 'my_faulty:Net'", "my.yaml:1: model.name model 'my_faulty:Net': cannot import 'my_faulty'"),
        ("name: 'my_faulty:Net'", "name 'foo' is not defined"),
        ("name: 'my_nets:Broken'", "RuntimeError: out of ideas"),
        ("name: 'my_nets:Shapeless'", "gives (2, 784) for two images; expected (2, 10)"),
        ("name: 'my_nets:Silent'", "gives NoneType for two images; expected (2, 10)"),
        ("name: 'my_nets:Twofold'", "it gives a tensor in evaluation, but tuple in training"),
        ("name: torchvision/googlenet", "it gives a tensor in evaluation, but GoogLeNetOutputs in training"),
        ("name: 'my_nets:NoModule'", "gives a NoModule, not a torch.nn.Module"),
        ("name: 'my_nets:Weightless'", "my.yaml:1: model.name"),
        ("name: 'my_nets:Needy'", "my.yaml:1: model.depth my_nets:Needy needs this key"),
        ("name: 'my_nets:Needy', depth: deep", 'my.yaml:1: model.depth expected a whole number, got "deep"'),
        ("name: 'my_nets:Needy', depth: 2, widht: 3", "my.yaml:1: model.widht unknown key; did you mean 'width'?"),
        ("name: 'builtins:int'", "my.yaml:1: model.name"),
        ("name: ms_ran, width: 0", "my.yaml:1: model.width width must be at least 1, not 0"),
        ("name: ms_ran, dropout: 1.5", "my.yaml:1: model.dropout dropout must be at least 0 and below 1, not 1.5"),
        ("name: ms_ran, width: 2.5", "my.yaml:1: model.width expected a whole number, got 2.5"),
        ("name: ms_ran, width: 1000000", "my.yaml:1: model"),
        ("name: lenet5, freeze: features.*", "model.freeze expected a list, e.g. [a, b]"),
        ("name: lenet5, freeze: [3]", "model.freeze.0 expected text, got 3"),
        (
            "name: lenet5, freeze: [fetures.*]",
            "model.freeze 'fetures.*' matches no parameter; did you mean 'features.*'",
        ),
        ("name: lenet5, freeze: [zzz]", "'zzz' matches no parameter try: features.*, classifier.*"),
        ("name: lenet5, freeze: ['*']", "model.freeze every parameter is frozen: nothing is left to train"),
        ("name: lenet5, freeze: [classifier.*, features.*]", "every parameter is frozen"),
    ],
)
def test_a_model_that_cannot_be(refused_recipe, model, expected):
    Path("my_nets.py").write_text(OWN, encoding="utf-8")
    Path("my_faulty.py").write_text("foo\n", encoding="utf-8")
    sys.modules.pop("my_nets", None)
    assert expected in refused_recipe(f"model: {{{model}}}\ndata: {{dataset: synthetic}}\n")


def test_timm_where_it_is_not_installed(refused_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    message = refused_recipe("model: {name: timm/resnet18}\n")
    assert "my.yaml:1: model.name model 'timm/resnet18' needs timm: pip install timm" in message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("compile: defalt", "my.yaml:5: compile expected true or false or 'default', 'reduce-overhead'"),
        ("compile: defalt", "got \"defalt\"; did you mean 'default'?"),
        ("micro_batch_size: big", "my.yaml:5: micro_batch_size expected a whole number or 'auto', got \"big\""),
        ("micro_batch_size: 0", "my.yaml:5: micro_batch_size expected at least 1 or 'auto', got 0"),
    ],
)
def test_a_key_that_takes_values_of_two_kinds_is_one_problem(refused_recipe, text, expected):
    message = refused_recipe(GOOD + text)
    assert expected in message
    assert "1 problem;" in message


@pytest.mark.parametrize("text", ["model: lenet5\n", "epochs: 3\n", "model:\n", "epochs: 3\nmodel: [lenet5]\n"])
def test_a_recipe_without_a_model(refused_recipe, text):
    assert "model" in refused_recipe(text)


# --- combinations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("micro_batch_size: 256", "my.yaml:5: micro_batch_size 256 is more than the batch_size of 128"),
        ("optimizer:\n  nesterov: true", "my.yaml:5: optimizer Nesterov momentum requires a momentum"),
        ("optimizer: {fused: true, foreach: true}", "`fused` and `foreach` cannot be `True` together"),
        ("schedule: {name: onecycle}", "my.yaml:5: schedule.max_lr onecycle needs this key"),
        (
            "optimizer: {name: adagrad}\nschedule: {name: onecycle, max_lr: 0.1}",
            "my.yaml:6: schedule.cycle_momentum adagrad has no momentum to cycle; set it to false",
        ),
        ("  split: letters", "my.yaml:5: data.split only emnist has splits, not synthetic; leave it out"),
        ("distill: {weight: 0.7}", "my.yaml:5: distill.from this key is needed, e.g. `distill: {from: runs/teacher}`"),
        ("distill: {from: nowhere}", "my.yaml:5: distill.from nowhere is not a run folder"),
        ("  validation: 4096", "validation=4096 leaves nothing of the 4,096 training images"),
        ("mixed_precision: fp16", "mixed_precision fp16 needs a GPU"),
    ],
)
def test_an_impossible_combination(refused_recipe, text, expected):
    assert expected in refused_recipe(GOOD + text)


def test_an_unknown_split(refused_recipe):
    assert "did you mean 'letters'?" in refused_recipe(
        "model: {name: lenet5}\ndata: {dataset: emnist, split: leters}\n"
    )


def test_a_keyword_left_over_from_another_model(refused_recipe):
    message = refused_recipe("model:\n  name: ms_ran\n  width: 8\ndata: {dataset: synthetic}\n", "model.name=lenet5")
    assert "my.yaml:3: model.width unknown key; known: name, freeze" in message


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_precision_of_the_launcher_that_a_cpu_has_not(refused_recipe, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert "the launcher: mixed_precision" in refused_recipe(GOOD)


def test_a_batch_smaller_than_the_world(refused_recipe, monkeypatch):
    world = SimpleNamespace(device=torch.device("cpu"), num_processes=4, is_main_process=True)
    monkeypatch.setattr("mnist_dist.train.launched_world", lambda: world)
    message = refused_recipe(GOOD + "batch_size: 3\n")
    assert "my.yaml:5: batch_size the global batch of 3 cannot be shared by 4 processes" in message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("batch_size: 64\ndata: {dataset: synthetic, limit_train: 129}", "batch_size 64 leaves a process one image"),
        ("micro_batch_size: 1\ndata: {dataset: synthetic}", "micro_batch_size 1 leaves a process one image at a time"),
        ("batch_size: 8\nlogical_shards: 8\ndata: {dataset: synthetic}", "logical_shards 8 leaves a process one image"),
    ],
)
def test_one_image_alone_where_batch_norm_needs_two(refused_recipe, words, expected):
    message = refused_recipe(f"model: {{name: separable_cnn, head: weighted}}\n{words}\n")
    assert expected in message and "Expected more than 1 value per channel" in message


def test_a_problem_met_while_building_names_file_and_line(refused_recipe):
    assert "my.yaml:5: mixed_precision fp16 needs a GPU" in refused_recipe(GOOD + "mixed_precision: fp16")
    assert "my.yaml:3: data" in refused_recipe(GOOD + "  validation: 4096")
    message = refused_recipe("epochs: 1\n\nmodel:\n  name: torchvision/alexnet\ndata: {dataset: synthetic}\n")
    assert "my.yaml:4: model.name" in message


# --- several at once ----------------------------------------------------------------------------------------------


def test_every_problem_in_one_message(refused_recipe):
    message = refused_recipe(
        "epoch: 3\n"
        "batch_size: -3\n"
        "model: {name: lenet5, width: 3}\n"
        "optimizer: {name: adm, lr: 0}\n"
        "schedule: {name: onecycle}\n"
        "data: {dataset: mnst, augment: {rotation: -3}}\n",
        "label_smoothing=1",
        "seed",
    )
    assert "mnist_dist: 10 problems; nothing was done:" in message
    for expected in [
        "my.yaml:1: epoch unknown key",
        "my.yaml:2: batch_size expected",
        "my.yaml:3: model.width unknown key",
        "my.yaml:4: optimizer.name expected",
        "my.yaml:4: optimizer.lr expected",
        "my.yaml:5: schedule.max_lr onecycle needs this key",
        "my.yaml:6: data.dataset expected",
        "my.yaml:6: data.augment.rotation expected",
        "command line: label_smoothing expected",
        "command line: seed an override is written key=value",
    ]:
        assert expected in message


def test_a_wrong_type_hides_no_impossible_combination(refused_recipe):
    message = refused_recipe(
        "epochs: 2.5\n"
        "micro_batch_size: 300\n"
        "model: {name: ms_ran, width: 0, bottleneck: 0, freeze: [nothing]}\n"
        "optimizer: {nesterov: true, momentum: -1, weight_decay: -1}\n"
        "schedule: {name: onecycle, max_lr: 1, pct_start: 2, div_factor: 0}\n"
    )
    keys = ["epochs", "micro_batch_size", "model.width", "model.bottleneck", "model.freeze"]
    keys += ["optimizer.momentum", "optimizer.weight_decay", "schedule.pct_start", "schedule.div_factor"]
    assert f"{len(keys)} problems" in message
    for key in keys:
        assert f": {key} " in message


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text("abc 1.-é#'{[", max_size=5)
WORDS = ["ms_ran", "adam", "onecycle", "emnist", "letters", "bilinear", "torchvision/resnet18", "no", "*"]
KEYS = [
    "name",
    "freeze",
    "width",
    "lr",
    "momentum",
    "betas",
    "max_lr",
    "T_max",
    "split",
    "augment",
    "scale",
    "wandb",
    "tags",
]
VALUES = st.recursive(
    SCALARS | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=3), inner),
    max_leaves=8,
)


@given(st.dictionaries(st.sampled_from(list(Recipe.model_fields)) | st.text(max_size=3), VALUES, max_size=5))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_values_are_taken_or_refused_in_words(values):
    Path("my.yaml").write_text(yaml.safe_dump({"model": {"name": "lenet5"}} | values), encoding="utf-8")
    try:
        load_recipe("my.yaml")
    except RecipeError as error:
        assert error.problems


@given(st.text(max_size=40) | st.text("ab:-[]{}&*!|>'\"#%?, \n\t", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_refused_in_words(text):
    Path("my.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe("my.yaml")


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("epochs", "command line: epochs an override is written key=value, e.g. optimizer.lr=0.05"),
        ("=3", "command line: =3 an override is written key=value"),
        ("optimizer..lr=3", "command line: optimizer..lr=3 an override is written key=value"),
        ("model.freeze.0=x", "an override is written key=value"),
        ("epochs=", "command line: epochs expected a whole number, got null"),
        ("epochs==3", 'command line: epochs expected a whole number, got "=3"'),
        ("epochs=[1", "command line: epochs cannot be read"),
        ("epochs=*a", "command line: epochs cannot be read: found undefined alias 'a'"),
        ("epochs=!!python/name:os.system", "command line: epochs cannot be read"),
        ("optimizer={name: adam, name: sgd}", "command line: optimizer cannot be read: name is given twice"),
        ("epoch=3", "command line: epoch unknown key; did you mean 'epochs'?"),
        ("a.b.c=3", "command line: a unknown key"),
        ("optimizer.momentun=3", "command line: optimizer.momentun unknown key; did you mean 'momentum'?"),
        ("optimizer={name: adma}", "command line: optimizer.name expected"),
        ("epochs.x=3", "command line: epochs expected a whole number"),
        ("model.name.x=3", "command line: model.name expected text"),
        ("model=lenet5", "command line: model expected a section with keys of its own"),
        ("data=null", "command line: data expected a section with keys of its own, got null"),
        ("optimizer.lr=abc", 'command line: optimizer.lr expected a number, got "abc"'),
        (
            "tracking.wandb.mode=no",
            "command line: tracking.wandb.mode expected 'auto', 'online', 'offline' or 'disabled'",
        ),
    ],
)
def test_a_bad_override(refused_recipe, word, expected):
    assert expected in refused_recipe(GOOD, word)


# --- data ---------------------------------------------------------------------------------------------------------

MNIST = "model: {name: lenet5}\ndata: {dataset: mnist}\n"
FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
IMAGES, LABELS = FILES[:2]


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def packed(values: np.ndarray) -> bytes:
    return gzip.compress(idx(values))


def write_mnist() -> Path:
    """Twenty images and labels each in ./data, packed."""
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 28, 28)), np.arange(20) % 10
    for name, values in zip(FILES, [images, labels] * 2, strict=True):
        (raw / f"{name}.gz").write_bytes(packed(values))
    return raw


@pytest.mark.parametrize("root", ["data", "elsewhere", "my.yaml"])
def test_missing_data_without_a_network(refused_recipe, root):
    message = refused_recipe(MNIST, f"data.root={root}")
    assert f"{root}/MNIST/raw lacks" in message
    assert all(name in message for name in FILES)
    assert "put the files there, or name another folder with data.root=… or MNIST_DIST_DATA" in message


@pytest.mark.parametrize("dataset", ["fashion_mnist", "kmnist", "qmnist", "emnist"])
def test_a_missing_data_set_without_a_network(refused_recipe, dataset):
    assert "put the files there" in refused_recipe(MNIST, f"data.dataset={dataset}")


def test_the_digits_without_scikit_learn(refused_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert "pip install" in refused_recipe(MNIST, "data.dataset=digits")


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize(
    ("name", "damage", "expected"),
    [
        (IMAGES, lambda whole: whole[: len(whole) // 2], "is damaged"),
        (IMAGES, lambda whole: flipped(whole, 1000), "is damaged"),
        (LABELS, lambda whole: flipped(whole, 20), "is damaged"),
        (IMAGES, lambda whole: flipped(whole, -6), "is damaged"),
        (IMAGES, lambda whole: b"", "is damaged"),
        (IMAGES, lambda whole: b"<html>Not found</html>", "is damaged"),
        (IMAGES, lambda whole: gzip.compress(b"\x08\x08\x08\x03" + bytes(100)), "is damaged"),
        (IMAGES, lambda whole: gzip.compress(b"\x00\x00\x07\x03" + bytes(100)), "is damaged"),
        (IMAGES, lambda whole: gzip.compress(b"\x00\x00\x08\x03" + bytes(3)), "is damaged"),
        (IMAGES, lambda whole: gzip.compress(gzip.decompress(whole)[:-5]), "is damaged"),
        (LABELS, lambda whole: packed(np.zeros(19)), "20 images but 19 labels"),
        (LABELS, lambda whole: packed(np.full(20, 10)), "labels run from 10 to 10, not from 0 to 9"),
        (LABELS, lambda whole: packed(np.zeros((20, 3))), "data/MNIST/raw"),
        (IMAGES, lambda whole: packed(np.zeros((20, 32, 32))), "expected uint8 images of 28×28"),
    ],
)
def test_damaged_data(refused_recipe, name, damage, expected):
    path = write_mnist() / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    message = refused_recipe(MNIST)
    assert expected in message
    assert "data/MNIST/raw" in message
    if expected == "is damaged":
        assert f"{name}.gz is damaged" in message
        assert "delete it to have it downloaded again" in message


@pytest.mark.parametrize(("first", "second"), [FILES[:2], FILES[2:]])
def test_data_without_an_image(refused_recipe, first, second):
    raw = write_mnist()
    (raw / f"{first}.gz").write_bytes(packed(np.zeros((0, 28, 28))))
    (raw / f"{second}.gz").write_bytes(packed(np.zeros(0)))
    assert "data" in refused_recipe(MNIST)


def test_a_validation_part_as_large_as_the_training_set(refused_recipe):
    write_mnist()
    assert "validation=20 leaves nothing of the 20 training images" in refused_recipe(MNIST, "data.validation=20")


# --- the run folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_dir", "expected"),
    [
        ("full", "command line: --run-dir full is not empty"),
        ("other", "command line: --run-dir the run in other began with another recipe: epochs: 3 -> 1"),
        (".", "is not empty"),
        ("my.yaml", "my.yaml cannot be written: File exists; give another --run-dir"),
        ("my.yaml/run", "my.yaml/run cannot be written: Not a directory; give another --run-dir"),
        ("/proc/run", "/proc/run cannot be written"),
        ("x" * 300, "cannot be written: File name too long"),
        ("", "command line: --run-dir"),
    ],
)
def test_a_run_folder_that_cannot_be_used(refused, run_dir, expected):
    for folder, file, text in [("full", "notes.txt", ""), ("other", "recipe.yaml", "name: my\nepochs: 3\n" + GOOD)]:
        Path(folder).mkdir()
        Path(folder, file).write_text(text, encoding="utf-8")
    Path("my.yaml").write_text(GOOD, encoding="utf-8")
    assert expected in refused("--recipe", "my.yaml", "--run-dir", run_dir)


@pytest.mark.parametrize("path", ["runs", "runs/my"])
def test_a_file_where_the_run_folders_go(refused_recipe, path):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("a file", encoding="utf-8")
    assert "cannot be written: Not a directory; give another --run-dir" in refused_recipe(GOOD)


# --- in processes of their own ------------------------------------------------------------------------------------


def in_processes(world_size: int, *words: str) -> subprocess.CompletedProcess[str]:
    """Runs the door in the working directory, from which Python also takes a sitecustomize.py."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world_size)]
    command = [sys.executable, *(launcher if world_size > 1 else []), "-m", "mnist_dist.train", *words]
    paths = [str(Path.cwd()), str(Path(mnist_dist.__file__).parent.parent)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.run(
        command, env=environment | {"PYTHONDONTWRITEBYTECODE": "1"}, capture_output=True, text=True, timeout=120
    )


def test_one_process_ends_with_code_2_and_nothing_on_stdout(tmp_path):
    Path("my.yaml").write_text(GOOD, encoding="utf-8")
    before = tree(tmp_path)
    done = in_processes(1, "--recipe", "my.yaml", "--run-dir", "my.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_screen(done.stderr)
    assert "my.yaml cannot be written: File exists" in done.stderr
    assert tree(tmp_path) == before


def test_two_processes_give_one_message_although_the_first_is_the_slower(tmp_path):
    # A launcher ends the others as soon as one process has ended, with or without the message.
    slow = "import os, time\nif os.environ.get('RANK') == '0':\n    time.sleep(2)\n"
    Path("sitecustomize.py").write_text(slow, encoding="utf-8")
    Path("my.yaml").write_text(GOOD, encoding="utf-8")
    before = tree(tmp_path)
    done = in_processes(2, "--recipe", "my.yaml", "epoch=3")
    ours = [line for line in done.stderr.splitlines() if "nothing was done" in line]
    assert ours == ["mnist_dist: 1 problem; nothing was done:"], done.stderr
    assert "did you mean 'epochs'?" in done.stderr
    assert "Traceback" not in done.stderr.partition("'epochs'")[0]
    assert "exitcode  : 2 " in done.stderr
    assert done.stdout == ""
    assert tree(tmp_path) == before
