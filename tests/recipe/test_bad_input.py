"""Wrong input of any kind ends before training: exit code 2, one screen on stderr, nothing written."""

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

from mnist_dist.cli import run_command
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.recipe.schema import Recipe
from mnist_dist.train import main
from tests import processes

GOOD = """\
model:
  name: lenet5
data:
  dataset: synthetic
"""
"""Four lines: what a test adds starts in line 5."""

SCREEN = 24
WIDTH = 120


def tree(folder: Path) -> dict[str, bytes | None]:
    """Returns every path below a folder, with the content of files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """A working directory without data, and no network."""

    def unreachable(*args: object, **keywords: object) -> None:
        raise URLError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # a user's own model adds the folder
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    for name in ("ACCELERATE_MIXED_PRECISION", "MNIST_DIST_DATA", "RANK"):
        monkeypatch.delenv(name, raising=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def refused(tmp_path, monkeypatch, capsys):
    """Calls `train` with arguments that it must refuse; returns the problems."""

    def fit(*args: object) -> None:
        pytest.fail("training started")

    monkeypatch.setattr("mnist_dist.train.fit", fit)

    def call(*argv: object) -> list[Problem]:
        problems: list[Problem] = []

        def run() -> int:
            try:
                return main([str(word) for word in argv])
            except RecipeError as error:
                problems.extend(error.problems)
                raise

        before = tree(tmp_path)
        code = run_command(run)
        out, err = capsys.readouterr()
        assert code == 2, err
        assert out == ""
        assert_one_screen(err)
        assert tree(tmp_path) == before, "a file was left behind"
        return problems

    return call


@pytest.fixture
def refused_recipe(refused):
    """As `refused`, with the text of a recipe and overrides."""

    def call(text: str, *overrides: str) -> list[Problem]:
        Path("my.yaml").write_text(text, encoding="utf-8")
        return refused("--recipe", "my.yaml", *overrides)

    return call


def assert_one_screen(err: str) -> None:
    assert err.startswith("mnist_dist: ")
    assert "Traceback" not in err
    assert sum(1 + len(line) // WIDTH for line in err.splitlines()) <= SCREEN, err


def assert_problem(problems: list[Problem], where: str | int | None, key: str, kind: str, *words: str) -> None:
    """Asserts that there is one problem, with these properties and these words in its message.

    Args:
        where: a line of my.yaml; None for my.yaml itself; or the location itself.
    """
    [problem] = problems
    location = where if isinstance(where, str) else "my.yaml" if where is None else f"my.yaml:{where}"
    assert (problem.where, problem.key, problem.kind) == (location, key, kind), problem
    assert not [word for word in words if word not in problem.message], problem.message


# --- the file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("simple_cn", ["'simple_cn'", "'simple_cnn'"]),
        ("configs/simple_cn.yaml", ["'simple_cnn'"]),
        ("recipes/wied.yaml", ["'recipes/wide.yaml'"]),
        ("recipes/wide.yaml/more", ["'recipes/wide.yaml/more'"]),
        ("nothing/like/it", ["debug, lenet5, "]),
        ("recipes", ["'recipes'", "recipe.yaml"]),
        ("", ["''"]),
        ("x" * 300, ["File name too long"]),
    ],
)
def test_missing_recipe(refused, name, words):
    Path("recipes").mkdir()
    Path("recipes/wide.yaml").write_text(GOOD, encoding="utf-8")
    assert_problem(refused("--recipe", name), "command line", "--recipe", "missing", *words)


def test_no_recipe_at_all(refused):
    assert_problem(refused(), "command line", "--recipe", "missing", "--list-recipes")


def test_unknown_option(refused):
    assert_problem(refused("--recipe", "simple_cnn", "--epochs", "3"), "command line", "--epochs", "usage")


@pytest.mark.parametrize(
    ("content", "line", "words"),
    [
        (b"", None, []),
        (b"# only a comment\n", None, []),
        (b"- model\n- data\n", None, []),
        (b"simple_cnn\n", None, []),
        (b"model:\n  name: [a\nepochs: 1\n", 3, ["',' or ']'"]),
        (b"model:\n  name: lenet5\n epochs: 1\n", 3, []),
        (b"epochs: 1\nmodel:\n\tname: lenet5\n", 3, ["tabs"]),
        (b"model:\n\tname: lenet5\n", 2, ["tabs"]),
        (b"epochs: 1\nbatch_size: 2\nepochs: 3\n", 3, ["epochs", "my.yaml:1"]),
        (b"model:\n  name: a\n  name: b\n", 3, ["model.name", "my.yaml:2"]),
        (b"model: &m\n  name: lenet5\n  again: *m\n", 1, ["contains itself"]),
        (b"epochs: 1\nmodel: *nobody\n", 2, ["'nobody'"]),
        (b"model: !!python/object:os.system {}\n", 1, ["'python/object:os.system'"]),
        (b"model: !mine {}\n", 1, ["'!mine'"]),
        (b"name: !!timestamp 2026-01-01\n", 1, ["'timestamp'"]),
        (b"epochs: !!int many\n", None, ["'many'"]),
        (b"deterministic: !!bool maybe\n", None, ["maybe"]),
        (b"epochs: 1\n2: 3\n", 2, ["quote"]),
        (b"epochs: 1\n---\nepochs: 2\n", 2, ["document"]),
        (bytes(range(256)), None, ["byte 128", "UTF-8"]),
        (b"\x00\x01", None, ["#x0000"]),
        ("name: é\n".encode("latin-1"), None, ["byte 6"]),
        (b"[" * 5000, None, []),
    ],
)
def test_file_that_is_not_a_recipe(refused, content, line, words):
    Path("my.yaml").write_bytes(content)
    assert_problem(refused("--recipe", "my.yaml"), line, "", "syntax", *words)


# --- keys and types -----------------------------------------------------------------------------------------------
# Each row: what is added to GOOD, or the recipe; line, key and kind of the problem; words of the message.


@pytest.mark.parametrize(
    "case",
    [
        ("epoch: 3", 5, "epoch", "unknown", "'epochs'"),
        ("  augment: {rotaton: 3}", 5, "data.augment.rotaton", "unknown", "'rotation'"),
        ("tracking: {wandb: {porject: x}}", 5, "tracking.wandb.porject", "unknown", "'project'"),
        ("optimizer.lr: 0.1", 5, "optimizer.lr", "unknown"),
        ("'': 3", 5, "", "unknown", "name, seed"),
        ("distill: {form: runs/a}", 5, "distill.form", "unknown", "'from'"),
        ("distill: {teachers: runs/a}", 5, "distill.teachers", "unknown", "from, weight, temperature"),
        ("engine: {gpu: true}", 5, "engine.gpu", "unknown", "capture, channels_last"),
        ("optimizer: {momentun: 0.9}", 5, "optimizer.momentun", "unknown", "'momentum'"),
        ("optimizer: {params: 3}", 5, "optimizer.params", "unknown", "name, lr, momentum"),
        ("schedule: {name: cosine, t_max: 3}", 5, "schedule.t_max", "unknown", "'T_max'"),
        ("schedule: {name: constant, span: 3}", 5, "schedule.span", "unknown"),
        ("schedule: {name: cosine, warmup_epoch: 3}", 5, "schedule.warmup_epoch", "unknown", "'warmup_epochs'"),
        ("schedule: {name: plateau, warmup_epochs: 3}", 5, "schedule.warmup_epochs", "unknown"),
        ("schedule: {name: multistep, milestone: [3], milestones: [3]}", 5, "schedule.milestone", "unknown"),
        ("optimizer: {name: muon, adamw_lr: 0.1}", 5, "optimizer.adamw_lr", "unknown", "'adamw_lr_ratio'"),
        ("optimizer: {name: lion, beta: [0.9, 0.99]}", 5, "optimizer.beta", "unknown", "'betas'"),
    ],
    ids=lambda case: case[0],
)
def test_unknown_key(refused_recipe, case):
    text, *expected = case
    assert_problem(refused_recipe(GOOD + text), *expected)


@pytest.mark.parametrize(
    "case",
    [
        ("name: ms_ran\n  widht: 8", 3, "model.widht", "unknown", "'width'"),
        ("name: ms_ran\n  num_classes: 8", 3, "model.num_classes", "conflict", "set by the trainer"),
        ("name: lenet5\n  width: 8", 3, "model.width", "unknown", "name, pretrained, freeze"),
        ("name: torchvision/resnet18\n  weights: DEFAULT", 3, "model.weights", "conflict", "set by the trainer"),
        ("name: torchvision/resnet18\n  widht: 8", 3, "model.widht", "unknown"),
    ],
    ids=lambda case: case[0],
)
def test_unknown_keyword_of_a_model(refused_recipe, case):
    text, *expected = case
    assert_problem(refused_recipe(f"model:\n  {text}\n"), *expected)


@pytest.mark.parametrize(
    "case",
    [
        ("epochs: 2.5", 5, "epochs", "type", "2.5"),
        ("epochs: '3'", 5, "epochs", "type"),
        ("epochs: true", 5, "epochs", "type", "true"),
        ("epochs: [3]", 5, "epochs", "type", "[3]"),
        ("epochs: {a: 3}", 5, "epochs", "type", '{"a": 3}'),
        ("epochs:", 5, "epochs", "type", "null"),
        ("seed: 1e3", 5, "seed", "type", "1000.0"),
        ("label_smoothing: little", 5, "label_smoothing", "type", '"little"'),
        ("label_smoothing: .nan", 5, "label_smoothing", "range", "NaN"),
        ("clip_grad_norm: .inf", 5, "clip_grad_norm", "range", "Infinity"),
        ("clip_grad_norm: true", 5, "clip_grad_norm", "type", "true"),
        ("deterministic: no", 5, "deterministic", "type", '"no"'),
        ("name: 3", 5, "name", "type"),
        ("mixed_precision: fp61", 5, "mixed_precision", "unknown", "'bf16'", "'fp16'", '"fp61"'),
        ("mixed_precision: false", 5, "mixed_precision", "type", "false"),
        ("tracking: {wandb: {tags: 3}}", 5, "tracking.wandb.tags", "type"),
        ("tracking: {wandb: {tags: [a,\n 3]}}", 6, "tracking.wandb.tags.1", "type"),
        ("tracking: {wandb: disabled}", 5, "tracking.wandb", "type", '"disabled"'),
        ("optimizer: adam", 5, "optimizer", "type", '"adam"'),
        ("optimizer: [adam]", 5, "optimizer", "type"),
        ("optimizer:", 5, "optimizer", "type", "null"),
        ("optimizer: {lr: .nan}", 5, "optimizer.lr", "range", "NaN"),
        ("optimizer: {momentum: much}", 5, "optimizer.momentum", "type", '"much"'),
        ("optimizer: {momentum: .nan}", 5, "optimizer.momentum", "range", "NaN"),
        ("optimizer: {nesterov: 1}", 5, "optimizer.nesterov", "type"),
        ("optimizer: {name: adam, betas: 0.9}", 5, "optimizer.betas", "type", "0.9"),
        ("optimizer: {name: adam, betas: [0.9]}", 5, "optimizer.betas", "type", "[0.9]"),
        ("optimizer: {name: adam, betas: [a, b]}", 5, "optimizer.betas", "type", '["a", "b"]'),
        ("schedule: {name: onecycle, max_lr: .inf}", 5, "schedule.max_lr", "range", "Infinity"),
        ("schedule: {name: step, step_size: 2.5}", 5, "schedule.step_size", "type", "2.5"),
        ("schedule: {name: multistep, milestones: 3}", 5, "schedule.milestones", "type", "3"),
        ("schedule: {name: cosine_restarts, T_0: 2.5}", 5, "schedule.T_0", "type", "2.5"),
        ("schedule: {name: cosine, warmup_epochs: many}", 5, "schedule.warmup_epochs", "type", '"many"'),
        ("optimizer: {name: muon, adjust_lr_fn: orignal}", 5, "optimizer.adjust_lr_fn", "unknown", "'original'"),
        ("optimizer: {name: muon, ns_steps: 2.5}", 5, "optimizer.ns_steps", "type", "2.5"),
        ("schedule: {name: cosine, interval: stpe}", 5, "schedule.interval", "unknown", "'step'", '"stpe"'),
        ("  root: 3", 5, "data.root", "type"),
        ("distill: runs/a", 5, "distill", "type", '"runs/a"'),
        ("distill: {from: 3}", 5, "distill.from", "type"),
        ("distill: {from: [a, 3]}", 5, "distill.from.1", "type"),
        ("  augment: {scale: 2}", 5, "data.augment.scale", "type"),
    ],
    ids=lambda case: case[0],
)
def test_wrong_type(refused_recipe, case):
    text, *expected = case
    assert_problem(refused_recipe(GOOD + text), *expected)


@pytest.mark.parametrize(
    "case",
    [
        ("epochs: 0", 5, "epochs", "range"),
        ("batch_size: -8", 5, "batch_size", "range", "-8"),
        ("seed: -1", 5, "seed", "range", "-1"),
        ("seed: 9223372036854775808", 5, "seed", "range", "9223372036854775808"),
        ("label_smoothing: 1", 5, "label_smoothing", "range"),
        ("ema_decay: 1.5", 5, "ema_decay", "range", "1.5"),
        ("max_steps: 0", 5, "max_steps", "range"),
        ("early_stopping: {patience: 0}", 5, "early_stopping.patience", "range"),
        ("name: a/b", 5, "name", "range", "'a/b'"),
        ("name: ../../elsewhere", 5, "name", "range", "'../../elsewhere'"),
        ("name: ''", 5, "name", "range"),
        ("optimizer: {lr: 0}", 5, "optimizer.lr", "range"),
        ("optimizer: {lr: -1e-3}", 5, "optimizer.lr", "range", "-0.001"),
        ("optimizer: {weight_decay: -1}", 5, "optimizer.weight_decay", "range", "-1", "torch.optim.SGD"),
        ("optimizer: {momentum: -1}", 5, "optimizer.momentum", "range", "-1", "torch.optim.SGD"),
        ("optimizer: {name: adam, betas: [0.9, 2]}", 5, "optimizer", "range", "index 1: 2", "torch.optim.Adam"),
        ("schedule: {name: onecycle, max_lr: 0}", 5, "schedule.max_lr", "range"),
        ("schedule: {name: onecycle, max_lr: 1, pct_start: 2}", 5, "schedule.pct_start", "range"),
        ("schedule: {name: onecycle, max_lr: 1, base_momentum: 3}", 5, "schedule.base_momentum", "range"),
        (
            "schedule: {name: onecycle, max_lr: 1, three_phase: true, pct_start: 0.8}",
            5,
            "schedule.pct_start",
            "conflict",
        ),
        ("schedule: {name: step, step_size: 0}", 5, "schedule.step_size", "range"),
        ("schedule: {name: step, step_size: 1, gamma: -3}", 5, "schedule.gamma", "range"),
        ("schedule: {name: cosine, T_max: 0}", 5, "schedule.T_max", "range"),
        ("schedule: {name: cosine, eta_min: -1}", 5, "schedule.eta_min", "range"),
        ("schedule: {name: linear, start_factor: 0}", 5, "schedule.start_factor", "range"),
        ("schedule: {name: multistep, milestones: []}", 5, "schedule.milestones", "range"),
        ("schedule: {name: exponential, gamma: 0}", 5, "schedule.gamma", "range"),
        ("schedule: {name: polynomial, power: 0}", 5, "schedule.power", "range"),
        ("schedule: {name: polynomial, total_iters: -1}", 5, "schedule.total_iters", "range"),
        ("schedule: {name: cosine_restarts, T_0: 0}", 5, "schedule.T_0", "range"),
        ("schedule: {name: cosine_restarts, T_0: 1, T_mult: 0}", 5, "schedule.T_mult", "range"),
        ("schedule: {name: cosine, warmup_epochs: -1}", 5, "schedule.warmup_epochs", "range"),
        ("schedule: {name: linear, warmup_start_factor: 2}", 5, "schedule.warmup_start_factor", "range"),
        ("optimizer: {name: muon, momentum: 1}", 5, "optimizer.momentum", "range"),
        ("optimizer: {name: muon, ns_steps: 0}", 5, "optimizer.ns_steps", "range"),
        ("optimizer: {name: muon, adamw_betas: [0.9, 1]}", 5, "optimizer.adamw_betas", "range"),
        ("optimizer: {name: muon, adamw_weight_decay: -1}", 5, "optimizer.adamw_weight_decay", "range"),
        ("optimizer: {name: lion, betas: [0.9, 2]}", 5, "optimizer.betas", "range"),
        ("schedule: {name: plateau, factor: 2}", 5, "schedule.factor", "range"),
        ("schedule: {name: plateau, factor: -1}", 5, "schedule.factor", "range"),
        ("schedule: {name: plateau, patience: -1}", 5, "schedule.patience", "range"),
        ("distill: {from: a, weight: 1.5}", 5, "distill.weight", "range", "1.5"),
        ("distill: {from: a, weight: 0}", 5, "distill.weight", "range"),
        ("distill: {from: a, temperature: 0}", 5, "distill.temperature", "range"),
        ("  validation: -1", 5, "data.validation", "range", "-1"),
        ("  limit_train: 0", 5, "data.limit_train", "range"),
        ("  augment: {rotation: -5}", 5, "data.augment.rotation", "range", "-5"),
        ("  augment: {rotation: 400}", 5, "data.augment.rotation", "range", "400"),
        ("  augment: {translation: 2}", 5, "data.augment.translation", "range"),
        ("  augment: {scale: [2, 1]}", 5, "data.augment.scale", "range"),
        ("  augment: {scale: [1, 2, 3]}", 5, "data.augment.scale", "type", "[1, 2, 3]"),
        ("  augment: {scale: [1]}", 5, "data.augment.scale.1", "type"),
        ("  augment: {interpolation: cubic}", 5, "data.augment.interpolation", "unknown", '"cubic"'),
        ("  augment: {fill: 300}", 5, "data.augment.fill", "range", "300"),
        ("  augment: {fill: [1, 300, 2]}", 5, "data.augment.fill", "range", "300"),
        ("  augment: {fill: []}", 5, "data.augment.fill", "range"),
        ("  augment: {fill: red}", 5, "data.augment.fill", "type"),
        ("  augment: {flip: 1}", 5, "data.augment.flip", "type"),
        ("  augment: {crop_padding: -1}", 5, "data.augment.crop_padding", "range"),
        ("  augment: {crop_padding: 2.5}", 5, "data.augment.crop_padding", "type"),
        ("  augment: {cutout: -8}", 5, "data.augment.cutout", "range"),
        ("  augment: {brightness: 1.5}", 5, "data.augment.brightness", "range"),
        ("  augment: {contrast: -0.5}", 5, "data.augment.contrast", "range"),
        ("  augment: {saturation: much}", 5, "data.augment.saturation", "type"),
        ("  augment: {mixup: -1}", 5, "data.augment.mixup", "range"),
        ("  augment: {cutmix: 1000}", 5, "data.augment.cutmix", "range"),
        ("  augment: {randaugment: [2, 31]}", 5, "data.augment.randaugment.1", "range"),
        ("  augment: {randaugment: 9}", 5, "data.augment.randaugment", "type"),
        ("  place: disc", 5, "data.place", "unknown", "'disk'"),
        ("  augment: {elastic: -1}", 5, "data.augment.elastic", "range", "-1"),
        ("  augment: {elastic: {alpha: 3}}", 5, "data.augment.elastic", "type"),
        ("  augment: {elastic: 1, elastic_sigma: 2}", 5, "data.augment.elastic_sigma", "range"),
        ("  augment: {shear: 95}", 5, "data.augment.shear", "range", "95"),
        ("schedule: {name: onecycle, max_lr: 1, final_div_factor: -1}", 5, "schedule.final_div_factor", "range"),
    ],
    ids=lambda case: case[0],
)
def test_value_out_of_range(refused_recipe, case):
    text, *expected = case
    assert_problem(refused_recipe(GOOD + text), *expected)


def test_list_that_is_too_short(refused_recipe):
    problems = refused_recipe(GOOD + "  augment: {scale: []}")
    assert [(p.key, p.kind) for p in problems] == [("data.augment.scale.0", "type"), ("data.augment.scale.1", "type")]


# --- names --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        ("optimizer: {name: adma}", 5, "optimizer.name", "unknown", "'adadelta', ", "'adamax'", '"adma"'),
        ("optimizer: {name: SGD}", 5, "optimizer.name", "unknown", "'sgd'", '"SGD"'),
        ("optimizer: {name: lbfgs}", 5, "optimizer.name", "unknown", '"lbfgs"'),
        ("optimizer: {name: nadam, capturable: true}", 5, "optimizer.name", "model", "nadam"),
        ("schedule: {name: onecylce}", 5, "schedule.name", "unknown", "'constant', ", "'onecycle'"),
    ],
    ids=lambda case: case[0],
)
def test_unknown_name(refused_recipe, case):
    text, *expected = case
    assert_problem(refused_recipe(GOOD + text), *expected)


def test_unknown_data_set(refused_recipe):
    problems = refused_recipe("model: {name: lenet5}\ndata: {dataset: fashion-mnist}\n")
    assert_problem(problems, 2, "data.dataset", "unknown", "known: mnist, ", "'fashion_mnist'")


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
    "case",
    [
        ("name: lenet", 1, "model.name", "unknown", "'lenet5'"),
        ("name: ''", 1, "model.name", "unknown"),
        ("name: 3", 1, "model.name", "type"),
        ("freeze: [a]", 1, "model.name", "missing"),
        ("name: torchvision/resnet1", 1, "model.name", "unknown", "'resnet18'"),
        ("name: torchvision/fcn_resnet50", 1, "model.name", "unknown", "'torchvision/fcn_resnet50'"),
        ("name: torchvision/alexnet", 1, "model.name", "model"),
        ("name: torchvision/vit_b_16", 1, "model", "model", "28×28"),
        ("name: 'nowhere.nets:Net'", 1, "model.name", "missing", "'nowhere.nets'"),
        ("name: 'my_nets:Brokn'", 1, "model.name", "unknown", "'Broken'"),
        ("name: 'my_nets:'", 1, "model.name", "unknown"),
        ("name: ':Net'", 1, "model.name", "model"),
        ("name: 'my_faulty:Net'", 1, "model.name", "model", "'my_faulty'", "'foo'"),
        ("name: 'my_nets:Broken'", 1, "model.name", "model", "out of ideas"),
        ("name: 'my_nets:Shapeless'", 1, "model.name", "model", "(2, 784)", "(2, 10)"),
        ("name: 'my_nets:Silent'", 1, "model.name", "model", "NoneType", "(2, 10)"),
        ("name: 'my_nets:Twofold'", 1, "model.name", "model", "tuple"),
        ("name: torchvision/googlenet", 1, "model.name", "model", "GoogLeNetOutputs"),
        ("name: 'my_nets:NoModule'", 1, "model.name", "model", "NoModule"),
        ("name: 'my_nets:Weightless'", 1, "model.name", "model"),
        ("name: 'my_nets:Needy'", 1, "model.depth", "missing", "my_nets:Needy"),
        ("name: 'my_nets:Needy', depth: deep", 1, "model.depth", "type", '"deep"'),
        ("name: 'my_nets:Needy', depth: 2, widht: 3", 1, "model.widht", "unknown", "'width'"),
        ("name: 'builtins:int'", 1, "model.name", "model"),
        ("name: ms_ran, width: 0", 1, "model.width", "range"),
        ("name: ms_ran, dropout: 1.5", 1, "model.dropout", "range", "1.5"),
        ("name: ms_ran, width: 2.5", 1, "model.width", "type", "2.5"),
        ("name: ms_ran, width: 1000000", 1, "model.name", "model"),
        ("name: lenet5, freeze: features.*", 1, "model.freeze", "type"),
        ("name: lenet5, freeze: [3]", 1, "model.freeze.0", "type"),
        ("name: lenet5, freeze: [fetures.*]", 1, "model.freeze", "unknown", "'features.*'"),
        ("name: lenet5, freeze: [zzz]", 1, "model.freeze", "unknown", "features.*, classifier.*"),
        ("name: lenet5, freeze: ['*']", 1, "model.freeze", "conflict"),
        ("name: lenet5, freeze: [classifier.*, features.*]", 1, "model.freeze", "conflict"),
    ],
    ids=lambda case: case[0],
)
def test_model_that_cannot_be_built(refused_recipe, case):
    Path("my_nets.py").write_text(OWN, encoding="utf-8")
    Path("my_faulty.py").write_text("foo\n", encoding="utf-8")
    sys.modules.pop("my_nets", None)
    model, *expected = case
    assert_problem(refused_recipe(f"model: {{{model}}}\ndata: {{dataset: synthetic}}\n"), *expected)


def test_timm_where_it_is_not_installed(refused_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    problems = refused_recipe("model: {name: timm/resnet18}\n")
    assert_problem(problems, 1, "model.name", "missing", "'timm/resnet18'", "pip install timm")


@pytest.mark.parametrize(
    "case",
    [
        ("compile: defalt", 5, "compile", "unknown", "'reduce-overhead'", "'default'", '"defalt"'),
        ("micro_batch_size: big", 5, "micro_batch_size", "unknown", "'auto'", '"big"'),
        ("micro_batch_size: 0", 5, "micro_batch_size", "range"),
    ],
    ids=lambda case: case[0],
)
def test_key_with_two_types_is_one_problem(refused_recipe, case):
    text, *expected = case
    assert_problem(refused_recipe(GOOD + text), *expected)


@pytest.mark.parametrize(
    "case",
    [
        ("model: lenet5\n", 1, "model", "type", '"lenet5"'),
        ("epochs: 3\n", None, "model", "missing"),
        ("model:\n", 1, "model", "type"),
        ("epochs: 3\nmodel: [lenet5]\n", 2, "model", "type"),
    ],
    ids=lambda case: case[0],
)
def test_recipe_without_a_model(refused_recipe, case):
    text, *expected = case
    assert_problem(refused_recipe(text), *expected)


# --- combinations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        ("micro_batch_size: 256", 5, "micro_batch_size", "conflict", "256", "128"),
        ("optimizer:\n  nesterov: true", 5, "optimizer", "conflict"),
        ("optimizer: {fused: true, foreach: true}", 5, "optimizer.fused", "conflict", "`foreach`"),
        ("schedule: {name: onecycle}", 5, "schedule.max_lr", "missing", "onecycle"),
        ("schedule: {name: multistep}", 5, "schedule.milestones", "missing", "multistep"),
        ("schedule: {name: exponential}", 5, "schedule.gamma", "missing", "exponential"),
        ("schedule: {name: cosine_restarts}", 5, "schedule.T_0", "missing", "cosine_restarts"),
        (
            "optimizer: {name: adagrad}\nschedule: {name: onecycle, max_lr: 0.1}",
            6,
            "schedule.cycle_momentum",
            "conflict",
        ),
        ("  split: letters", 5, "data.split", "conflict", "synthetic"),
        ("  test: qmnist50k", 5, "data.test", "conflict", "synthetic"),
        ("distill: {weight: 0.7}", 5, "distill.from", "missing"),
        ("distill: {from: nowhere}", 5, "distill.from", "missing", "nowhere"),
        ("  validation: 4096", 5, "data.validation", "conflict", "4,096"),
        ("mixed_precision: fp16", 5, "mixed_precision", "unsupported"),
    ],
    ids=lambda case: case[0],
)
def test_impossible_combination(refused_recipe, case):
    text, *expected = case
    assert_problem(refused_recipe(GOOD + text), *expected)


def test_unknown_split(refused_recipe):
    problems = refused_recipe("model: {name: lenet5}\ndata: {dataset: emnist, split: leters}\n")
    assert_problem(problems, 2, "data.split", "unknown", "'letters'")


def test_keyword_left_over_from_another_model(refused_recipe):
    problems = refused_recipe("model:\n  name: ms_ran\n  width: 8\ndata: {dataset: synthetic}\n", "model.name=lenet5")
    assert_problem(problems, 3, "model.width", "unknown", "name, pretrained, freeze")


@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_launcher_precision_that_a_cpu_lacks(refused_recipe, monkeypatch, precision):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    assert_problem(refused_recipe(GOOD), "the launcher", "mixed_precision", "unsupported", precision)


def test_batch_smaller_than_the_world(refused_recipe, monkeypatch):
    world = SimpleNamespace(device=torch.device("cpu"), num_processes=4, is_main_process=True)
    monkeypatch.setattr("mnist_dist.train.launched_world", lambda: world)
    assert_problem(refused_recipe(GOOD + "batch_size: 3\n"), 5, "batch_size", "unsupported", "3", "4 processes")


@pytest.mark.parametrize(
    "case",
    [
        ("batch_size: 64\ndata: {dataset: synthetic, limit_train: 129}", 2, "batch_size", "model", "64"),
        ("micro_batch_size: 1\ndata: {dataset: synthetic}", 2, "micro_batch_size", "model"),
        ("batch_size: 8\nlogical_shards: 8\ndata: {dataset: synthetic}", 3, "logical_shards", "model", "8"),
    ],
    ids=lambda case: case[0],
)
def test_one_image_where_batch_norm_needs_two(refused_recipe, case):
    text, *expected = case
    problems = refused_recipe(f"model: {{name: separable_cnn, head: weighted}}\n{text}\n")
    assert_problem(problems, *expected, "separable_cnn", "more than 1 value per channel")


# --- several problems ---------------------------------------------------------------------------------------------


def test_every_problem_in_one_message(refused_recipe):
    problems = refused_recipe(
        "epoch: 3\n"
        "batch_size: -3\n"
        "model: {name: lenet5, width: 3}\n"
        "optimizer: {name: adm, lr: 0}\n"
        "schedule: {name: onecycle}\n"
        "data: {dataset: mnst, augment: {rotation: -3}}\n",
        "label_smoothing=1",
        "seed",
    )
    assert {(problem.where, problem.key, problem.kind) for problem in problems} == {
        ("my.yaml:1", "epoch", "unknown"),
        ("my.yaml:2", "batch_size", "range"),
        ("my.yaml:3", "model.width", "unknown"),
        ("my.yaml:4", "optimizer.name", "unknown"),
        ("my.yaml:4", "optimizer.lr", "range"),
        ("my.yaml:5", "schedule.max_lr", "missing"),
        ("my.yaml:6", "data.dataset", "unknown"),
        ("my.yaml:6", "data.augment.rotation", "range"),
        ("command line", "label_smoothing", "range"),
        ("command line", "seed", "usage"),
    }
    assert len(problems) == 10


def test_wrong_type_hides_no_impossible_combination(refused_recipe):
    problems = refused_recipe(
        "epochs: 2.5\n"
        "micro_batch_size: 300\n"
        "model: {name: ms_ran, width: 0, bottleneck: 0, freeze: [nothing]}\n"
        "optimizer: {nesterov: true, momentum: -1, weight_decay: -1}\n"
        "schedule: {name: onecycle, max_lr: 1, pct_start: 2, div_factor: 0}\n"
    )
    assert {(problem.key, problem.kind) for problem in problems} == {
        ("epochs", "type"),
        ("micro_batch_size", "conflict"),
        ("model.width", "range"),
        ("model.bottleneck", "range"),
        ("model.freeze", "unknown"),
        ("optimizer.momentum", "range"),
        ("optimizer.weight_decay", "range"),
        ("schedule.pct_start", "range"),
        ("schedule.div_factor", "range"),
    }
    assert len(problems) == 9


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
def test_any_values_are_accepted_or_refused(values):
    Path("my.yaml").write_text(yaml.safe_dump({"model": {"name": "lenet5"}} | values), encoding="utf-8")
    try:
        load_recipe("my.yaml")
    except RecipeError as error:
        assert error.problems


@given(st.text(max_size=40) | st.text("ab:-[]{}&*!|>'\"#%?, \n\t", max_size=40))
@settings(max_examples=200, deadline=None)
def test_any_text_is_refused(text):
    Path("my.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(RecipeError):
        load_recipe("my.yaml")


# --- overrides ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        ("epochs", "epochs", "usage"),
        ("=3", "=3", "usage"),
        ("optimizer..lr=3", "optimizer..lr=3", "usage"),
        ("model.freeze.0=x", "model.freeze.0=x", "usage"),
        ("epochs=", "epochs", "type", "null"),
        ("epochs==3", "epochs", "type", '"=3"'),
        ("epochs=[1", "epochs", "syntax"),
        ("epochs=*a", "epochs", "syntax", "'a'"),
        ("epochs=!!python/name:os.system", "epochs", "syntax"),
        ("optimizer={name: adam, name: sgd}", "optimizer", "syntax"),
        ("epoch=3", "epoch", "unknown", "'epochs'"),
        ("a.b.c=3", "a", "unknown"),
        ("optimizer.momentun=3", "optimizer.momentun", "unknown", "'momentum'"),
        ("optimizer={name: adma}", "optimizer.name", "unknown"),
        ("epochs.x=3", "epochs", "type"),
        ("model.name.x=3", "model.name", "type"),
        ("model=lenet5", "model", "type"),
        ("data=null", "data", "type", "null"),
        ("optimizer.lr=abc", "optimizer.lr", "type", '"abc"'),
        ("tracking.wandb.mode=no", "tracking.wandb.mode", "unknown", "'auto', 'online'"),
    ],
    ids=lambda case: case[0],
)
def test_wrong_override(refused_recipe, case):
    word, *expected = case
    assert_problem(refused_recipe(GOOD, word), "command line", *expected)


# --- data ---------------------------------------------------------------------------------------------------------

MNIST = "model: {name: lenet5}\ndata: {dataset: mnist}\n"
FILES = ["train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"]
IMAGES, LABELS = FILES[:2]


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


def packed(values: np.ndarray) -> bytes:
    return gzip.compress(idx(values))


def write_mnist() -> Path:
    """Writes 20 images and labels for each of training and test into ./data, compressed; returns their folder."""
    raw = Path("data/MNIST/raw")
    raw.mkdir(parents=True)
    images, labels = np.random.default_rng(0).integers(0, 256, (20, 28, 28)), np.arange(20) % 10
    for name, values in zip(FILES, [images, labels] * 2, strict=True):
        (raw / f"{name}.gz").write_bytes(packed(values))
    return raw


@pytest.mark.parametrize("root", ["data", "elsewhere", "my.yaml"])
def test_missing_data_without_a_network(refused_recipe, root):
    problems = refused_recipe(MNIST, f"data.root={root}")
    assert_problem(problems, "command line", "data.root", "missing", f"{root}/MNIST/raw", "MNIST_DIST_DATA", *FILES)


@pytest.mark.parametrize("dataset", ["fashion_mnist", "kmnist", "qmnist", "emnist"])
def test_missing_data_set_without_a_network(refused_recipe, dataset):
    problems = refused_recipe(MNIST, f"data.dataset={dataset}")
    assert_problem(problems, 2, "data.root", "missing", "data.root=", "MNIST_DIST_DATA")


def test_digits_without_scikit_learn(refused_recipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    problems = refused_recipe(MNIST, "data.dataset=digits")
    assert_problem(problems, "command line", "data.dataset", "missing", "digits", "pip install")


def flipped(content: bytes, position: int) -> bytes:
    return content[:position] + bytes([content[position] ^ 0xFF]) + content[position + 1 :]


@pytest.mark.parametrize(
    ("name", "damage", "words"),
    [
        (IMAGES, lambda content: content[: len(content) // 2], [f"{IMAGES}.gz"]),
        (IMAGES, lambda content: flipped(content, 1000), [f"{IMAGES}.gz"]),
        (LABELS, lambda content: flipped(content, 20), [f"{LABELS}.gz"]),
        (IMAGES, lambda content: flipped(content, -6), [f"{IMAGES}.gz"]),
        (IMAGES, lambda content: b"", [f"{IMAGES}.gz"]),
        (IMAGES, lambda content: b"<html>Not found</html>", [f"{IMAGES}.gz"]),
        (IMAGES, lambda content: gzip.compress(b"\x08\x08\x08\x03" + bytes(100)), [f"{IMAGES}.gz"]),
        (IMAGES, lambda content: gzip.compress(b"\x00\x00\x07\x03" + bytes(100)), [f"{IMAGES}.gz"]),
        (IMAGES, lambda content: gzip.compress(b"\x00\x00\x08\x03" + bytes(3)), [f"{IMAGES}.gz"]),
        (IMAGES, lambda content: gzip.compress(gzip.decompress(content)[:-5]), [f"{IMAGES}.gz"]),
        (LABELS, lambda content: packed(np.zeros(19)), ["20 images", "19 labels"]),
        (LABELS, lambda content: packed(np.full(20, 10)), ["10 to 10", "0 to 9"]),
        (LABELS, lambda content: packed(np.zeros((20, 3))), []),
        (IMAGES, lambda content: packed(np.zeros((20, 32, 32))), ["(20, 32, 32)", "(20, 28, 28)"]),
    ],
)
def test_damaged_data(refused_recipe, name, damage, words):
    path = write_mnist() / f"{name}.gz"
    path.write_bytes(damage(path.read_bytes()))
    assert_problem(refused_recipe(MNIST), 2, "data", "damaged", "data/MNIST/raw", *words)


@pytest.mark.parametrize(("first", "second"), [FILES[:2], FILES[2:]])
def test_data_without_an_image(refused_recipe, first, second):
    raw = write_mnist()
    (raw / f"{first}.gz").write_bytes(packed(np.zeros((0, 28, 28))))
    (raw / f"{second}.gz").write_bytes(packed(np.zeros(0)))
    assert_problem(refused_recipe(MNIST), 2, "data", "damaged")


def test_validation_part_as_large_as_the_training_set(refused_recipe):
    write_mnist()
    assert_problem(
        refused_recipe(MNIST, "data.validation=20"), "command line", "data.validation", "conflict", "20 training images"
    )


# --- the run folder -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("run_dir", "kind", "words"),
    [
        ("full", "exists", ["full"]),
        ("other", "conflict", ["other", "epochs: 3 -> 1"]),
        (".", "exists", []),
        ("my.yaml", "unwritable", ["my.yaml", "File exists"]),
        ("my.yaml/run", "unwritable", ["my.yaml/run", "Not a directory"]),
        ("/proc/run", "unwritable", ["/proc/run"]),
        ("x" * 300, "unwritable", ["File name too long"]),
        ("", "exists", []),
    ],
)
def test_run_folder_that_cannot_be_used(refused, run_dir, kind, words):
    for folder, file, text in [("full", "notes.txt", ""), ("other", "recipe.yaml", "name: my\nepochs: 3\n" + GOOD)]:
        Path(folder).mkdir()
        Path(folder, file).write_text(text, encoding="utf-8")
    Path("my.yaml").write_text(GOOD, encoding="utf-8")
    problems = refused("--recipe", "my.yaml", "--run-dir", run_dir)
    assert_problem(problems, "command line", "--run-dir", kind, *words)


@pytest.mark.parametrize("path", ["runs", "runs/my"])
def test_file_in_the_place_of_the_run_folders(refused_recipe, path):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text("a file", encoding="utf-8")
    [problem] = refused_recipe(GOOD)
    assert problem.kind == "unwritable"
    assert "Not a directory" in problem.message and "--run-dir" in problem.message


# --- child processes ----------------------------------------------------------------------------------------------


def test_one_process_ends_with_code_2_and_nothing_on_stdout(tmp_path):
    Path("my.yaml").write_text(GOOD, encoding="utf-8")
    before = tree(tmp_path)
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "my.yaml", "--run-dir", "my.yaml"]
    done = processes.run(command, env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert_one_screen(done.stderr)
    assert "my.yaml" in done.stderr and "File exists" in done.stderr
    assert tree(tmp_path) == before


@pytest.mark.launch
def test_two_processes_print_one_message_although_rank_0_is_slower(tmp_path):
    # A launcher ends the other processes as soon as one has ended, whether rank 0 has printed its message or not.
    python, slow = processes.forked_python(), tmp_path / "python"
    slow.write_text(f'#!/bin/sh\n[ "$RANK" != 0 ] || sleep 2\nexec "{python}" "$@"\n', encoding="utf-8")
    slow.chmod(0o755)
    Path("my.yaml").write_text(GOOD, encoding="utf-8")
    before = tree(tmp_path)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [python, *launcher, "-m", "mnist_dist.train", "--recipe", "my.yaml", "epoch=3"]
    variables = {"OMP_NUM_THREADS": "1", "PYTHON_EXEC": str(slow), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=300)
    screens = [line for line in done.stderr.splitlines() if line.startswith("mnist_dist: ")]
    assert len(screens) == 1, done.stderr
    assert "command line: epoch" in done.stderr and "'epochs'" in done.stderr
    assert "Traceback" not in done.stderr.partition("'epochs'")[0]
    assert "exitcode  : 2 " in done.stderr
    assert done.stdout == ""
    assert tree(tmp_path) == before
