"""Distillation computes the loss of the paper, with micro-batches and with several processes."""

from __future__ import annotations

import shutil
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnist_dist import build_model, load_recipe, load_run, train
from mnist_dist.data import DATASETS
from mnist_dist.data.sources.request import Splits
from mnist_dist.engine.distillation import Distillation
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.recipe.changes import describe_changes
from mnist_dist.recipe.schema import Recipe
from tests.engine.test_train_step import DATA, FakeProcess, gradient, lenet, make_step, weights
from tests.processes import run_ranks

STUDENT = {"mean": DATA.mean, "std": DATA.std}


def teacher_of(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name).eval()


def distillation_from(*modules: nn.Module, weight: float = 0.5, temperature: float = 1.0) -> Distillation:
    teachers = [(module, DATA.mean, DATA.std) for module in modules]
    return Distillation(teachers, weight=weight, temperature=temperature, **STUDENT)


# --- the loss -----------------------------------------------------------------------------------------------------


def test_the_loss_equals_that_of_the_paper():
    images, labels = DATA.normalize(DATA.images[:6]), DATA.labels[:6]
    first, second, student = teacher_of("lenet5", 1), teacher_of("ms_ran", 2), lenet()
    logits = student(images)
    found = distillation_from(first, second, weight=0.3, temperature=4.0)(
        F.cross_entropy(logits, labels, reduction="sum"), images, logits
    )
    with torch.no_grad():
        target = ((first(images) / 4).softmax(1) + (second(images) / 4).softmax(1)).double() / 2
    softened = (logits / 4).double().softmax(1)
    divergence = (target * (target / softened).log()).sum()
    expected = 0.7 * F.cross_entropy(logits.double(), labels, reduction="sum") + 0.3 * 16 * divergence
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_equal_to_its_teacher_has_no_gradient(accelerator):
    module = lenet()
    step = make_step(accelerator, module, distillation=distillation_from(lenet().eval(), weight=1.0, temperature=3))
    step(step.batches.plan(0), 0, 0)
    assert gradient(module).abs().max() < 1e-6
    assert step.meter.read()["train/loss"] == pytest.approx(0, abs=1e-6)


def test_a_teacher_gets_images_normalised_as_in_its_training():
    teacher, images = teacher_of("lenet5", 1), DATA.images[:5]
    distillation = Distillation([(teacher, 0.2, 0.4)], weight=0.5, temperature=1.0, **STUDENT)
    with torch.no_grad():
        expected = teacher(replace(DATA, mean=(0.2,), std=(0.4,)).normalize(images)).softmax(1)
    torch.testing.assert_close(distillation.probabilities(DATA.normalize(images)), expected)


def test_a_teacher_computes_in_the_precision_of_the_student():
    teacher, images = teacher_of("lenet5", 1), DATA.normalize(DATA.images[:5])
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    found = Distillation([(teacher, *STUDENT.values())], weight=0.5, temperature=1.0, autocast=half, **STUDENT)
    with half(), torch.no_grad():
        expected = teacher(images).float().softmax(1)
    assert torch.equal(found.probabilities(images), expected)
    assert not torch.equal(expected, distillation_from(teacher).probabilities(images))


def test_the_teacher_does_not_change_and_has_no_dropout(accelerator):
    teacher = teacher_of("ms_ran", 1)  # with batch norm and dropout
    before, images = weights(teacher), DATA.normalize(DATA.images[:5])
    distillation = distillation_from(teacher)
    assert torch.equal(distillation.probabilities(images), distillation.probabilities(images))
    step = make_step(accelerator, lenet(), distillation=distillation)
    for number in range(3):
        step(step.batches.plan(0), number, number)
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "batch_size", "index"), [(2, 32, 0), (3, 39, 2), (7, 77, 1)])
def test_the_mean_gradient_over_processes_is_that_of_the_global_batch(world_size, batch_size, index):
    def share(rank: int, world_size: int, micro_batch_size: int | None) -> torch.Tensor:
        module, distillation = lenet(), distillation_from(teacher_of("ms_ran", 1), weight=0.9, temperature=2)
        keywords = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "distillation": distillation}
        step = make_step(FakeProcess(rank, world_size), module, **keywords)
        step(step.batches.plan(0), index, 0)
        return gradient(module)

    mean = sum(share(rank, world_size, 4) for rank in range(world_size)) / world_size
    torch.testing.assert_close(mean, share(0, 1, None), rtol=0, atol=1e-6)


# --- from the recipe ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """A folder with two trained runs, `a` and `b`."""
    folder = tmp_path_factory.mktemp("distill")
    for name, data in (("a", "data.limit_train=2000"), ("b", "data.limit_train=1500")):
        train(
            load_recipe("debug", data, "epochs=2", "optimizer.weight_decay=0.001", "tracking.plots=false"),
            folder / name,
        )
    return folder


WORDS = ["data.limit_test=100", "data.limit_train=512", "batch_size=64", "optimizer={name: sgd, lr: 0.05}"]
WORDS += ["schedule={name: constant}", "data.augment.elastic=1", "max_steps=8", "log_every=1", "tracking.plots=false"]


def losses_of(run_dir: Path) -> list[float]:
    return [line["train/loss"] for line in load_run(run_dir).metrics if "train/loss" in line]


@pytest.fixture(scope="module")
def distilled(teachers):
    """The overrides of a run that learns from two teachers, and its losses."""
    words = [*WORDS, f"distill={{from: [{teachers}/a, {teachers}/b], weight: 0.8, temperature: 2}}"]
    train(load_recipe("debug", *words), teachers / "student")
    return words, losses_of(teachers / "student")


def test_two_processes_learn_what_one_learns(distilled, tmp_path):
    words, alone = distilled
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "debug", "--run-dir", tmp_path / "2", *words]
    run_ranks(2, command)
    assert len(alone) == 8
    assert losses_of(tmp_path / "2") == pytest.approx(alone, rel=1e-6)
    train(load_recipe("debug", *WORDS), tmp_path / "plain")
    plain = losses_of(tmp_path / "plain")
    assert all(abs(one - other) > 1e-3 * other for one, other in zip(plain, alone, strict=True))


@pytest.mark.parametrize("word", ["logical_shards=4", "micro_batch_size=auto"])
def test_shards_and_micro_batches_use_the_teachers(distilled, tmp_path, word):
    words, alone = distilled
    train(load_recipe("debug", *words, word), tmp_path / "run")
    assert losses_of(tmp_path / "run") == pytest.approx(alone, rel=1e-6)


def test_a_change_of_teachers_changes_the_result(teachers):
    one, two = (load_recipe("debug", f"distill.from={teachers}/{name}") for name in "ab")
    [change] = describe_changes(one, two)
    assert change.startswith("distill.from") and f"{teachers}/a" in change and f"{teachers}/b" in change


def problem_of(recipe: Recipe, run_dir: Path) -> Problem:
    with pytest.raises(RecipeError) as error:
        train(recipe, run_dir)
    assert not run_dir.exists()
    [problem] = error.value.problems
    return problem


@pytest.mark.parametrize(("damage", "kind"), [("truncate", "damaged"), ("delete", "missing"), ("no run", "missing")])
def test_a_teacher_that_cannot_be_loaded_is_refused(teachers, tmp_path, damage, kind):
    broken = tmp_path / "broken"
    if damage != "no run":
        shutil.copytree(teachers / "b", broken)
    if damage == "truncate":
        (broken / "last.safetensors").write_bytes(b"")
    if damage == "delete":
        (broken / "last.safetensors").unlink()
    problem = problem_of(load_recipe("debug", f"distill.from=[{teachers}/a, {broken}]"), tmp_path / "run")
    assert (problem.key, problem.kind) == ("distill.from", kind)
    assert str(broken) in problem.message


def test_a_teacher_of_other_classes_is_refused(teachers, tmp_path, monkeypatch):
    ten_classes = DATASETS["synthetic"]

    def seven_classes(request):
        splits = ten_classes(request)
        return Splits(*(replace(part, labels=part.labels % 7, classes=tuple("abcdefg")) for part in splits.parts))

    monkeypatch.setitem(DATASETS, "synthetic", seven_classes)
    problem = problem_of(load_recipe("debug", f"distill.from={teachers}/a"), tmp_path / "run")
    assert (problem.key, problem.kind) == ("distill.from", "conflict")
    assert "10 classes" in problem.message and "7 (a, b, c" in problem.message
