"""Learning from trained networks: the loss of the paper, for the whole batch, whoever computes it."""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mnist_dist import build_model, load_recipe, load_run, train
from mnist_dist.data import images as datasets
from mnist_dist.engine.distillation import Distillation
from mnist_dist.errors import RecipeError
from mnist_dist.recipe.changes import describe_changes
from tests.distributed.test_worlds import launch, relative_deviations
from tests.engine.test_train_step import DATA, PretendedProcess, gradient, lenet, make_update, weights

PLAIN = {"mean": DATA.mean, "std": DATA.std}


def teacher_of(name: str, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return build_model(name).eval()


def distillation_from(*modules: nn.Module, weight: float = 0.5, temperature: float = 1.0) -> Distillation:
    teachers = [(module, DATA.mean, DATA.std) for module in modules]
    return Distillation(teachers, weight=weight, temperature=temperature, **PLAIN)


# The loss


def test_the_loss_is_the_paper_s():
    images, labels = DATA.normalize(DATA.images[:6]), DATA.labels[:6]
    first, second, student = teacher_of("lenet5", 1), teacher_of("ms_ran", 2), lenet()
    logits = student(images)
    found = distillation_from(first, second, weight=0.3, temperature=4.0)(
        F.cross_entropy(logits, labels, reduction="sum"), images, logits
    )
    with torch.no_grad():
        wanted = ((first(images) / 4).softmax(1) + (second(images) / 4).softmax(1)).double() / 2
    answered = (logits / 4).double().softmax(1)
    divergence = (wanted * (wanted / answered).log()).sum()
    expected = 0.7 * F.cross_entropy(logits.double(), labels, reduction="sum") + 0.3 * 16 * divergence
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_student_that_agrees_has_nothing_to_learn(accelerator):
    module = lenet()
    update = make_update(accelerator, module, distillation=distillation_from(lenet().eval(), weight=1.0, temperature=3))
    update(update.batches.plan(0), 0, 0)
    assert gradient(module).abs().max() < 1e-6
    assert update.meter.read()["train/loss"] == pytest.approx(0, abs=1e-6)


def test_a_teacher_sees_images_as_it_was_trained_on_them():
    teacher, images = teacher_of("lenet5", 1), DATA.images[:5]
    distillation = Distillation([(teacher, 0.2, 0.4)], weight=0.5, temperature=1.0, **PLAIN)
    with torch.no_grad():
        expected = teacher(replace(DATA, mean=0.2, std=0.4).normalize(images)).softmax(1)
    torch.testing.assert_close(distillation.probabilities(DATA.normalize(images)), expected)


def test_a_teacher_is_computed_in_the_students_precision():
    teacher, images = teacher_of("lenet5", 1), DATA.normalize(DATA.images[:5])
    half = partial(torch.autocast, "cpu", torch.bfloat16)
    found = Distillation([(teacher, *PLAIN.values())], weight=0.5, temperature=1.0, autocast=half, **PLAIN)
    with half(), torch.no_grad():
        expected = teacher(images).float().softmax(1)
    assert torch.equal(found.probabilities(images), expected)
    assert not torch.equal(expected, distillation_from(teacher).probabilities(images))


def test_the_teacher_neither_learns_nor_drops_out(accelerator):
    teacher = teacher_of("ms_ran", 1)  # with batch norm and dropout
    before = weights(teacher)
    update = make_update(accelerator, lenet(), distillation=distillation_from(teacher))
    for step in range(3):
        update(update.batches.plan(0), step, step)
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


# The whole batch


@pytest.mark.parametrize(("world_size", "batch_size", "index"), [(2, 32, 0), (3, 39, 2), (7, 77, 1)])
def test_the_mean_of_the_processes_gradients_is_the_whole_batchs(world_size, batch_size, index):
    def share(rank: int, world_size: int, micro_batch_size: int | None) -> torch.Tensor:
        module, distillation = lenet(), distillation_from(teacher_of("ms_ran", 1), weight=0.9, temperature=2)
        keywords = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "distillation": distillation}
        update = make_update(PretendedProcess(rank, world_size), module, **keywords)
        update(update.batches.plan(0), index, 0)
        return gradient(module)

    mean = sum(share(rank, world_size, 4) for rank in range(world_size)) / world_size
    torch.testing.assert_close(mean, share(0, 1, None), rtol=0, atol=1e-6)


# From the recipe


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distill")
    for name, data in (("a", "data.limit_train=2000"), ("b", "data.limit_train=1500")):
        train(load_recipe("debug", data, "epochs=2", "optimizer.weight_decay=0.001"), folder / name)
    return folder


WORDS = ["data.limit_test=100", "data.limit_train=512", "batch_size=64", "optimizer={name: sgd, lr: 0.05}"]
WORDS += ["schedule={name: constant}", "data.augment.elastic=1", "max_steps=8", "log_every=1"]


@pytest.fixture(scope="module")
def distilled(teachers):
    """The words of a run that learns from two teachers, and its metrics."""
    words = [*WORDS, f"distill={{from: [{teachers}/a, {teachers}/b], weight: 0.8, temperature: 2}}"]
    train(load_recipe("debug", *words), teachers / "student")
    return words, load_run(teachers / "student").metrics


def test_two_processes_learn_what_one_learns(distilled, tmp_path):
    words, alone = distilled
    deviations = relative_deviations(alone, launch(2, tmp_path / "2", "--recipe", "debug", *words))
    assert len(deviations) == 8 and max(deviations) <= 1e-6, deviations
    train(load_recipe("debug", *WORDS), tmp_path / "plain")
    assert min(relative_deviations(alone, load_run(tmp_path / "plain").metrics)) > 1e-3


@pytest.mark.parametrize("word", ["logical_shards=4", "micro_batch_size=auto"])
def test_every_way_to_compute_a_step_asks_the_teachers(distilled, tmp_path, word):
    words, alone = distilled
    train(load_recipe("debug", *words, word), tmp_path / "run")
    assert max(relative_deviations(alone, load_run(tmp_path / "run").metrics)) <= 1e-6


def test_a_change_of_teachers_changes_the_result(teachers):
    one, two = (load_recipe("debug", f"distill.from={teachers}/{name}") for name in "ab")
    assert describe_changes(one, two) == [f"distill.from: ['{teachers}/a'] -> ['{teachers}/b']"]


def test_a_teacher_that_cannot_teach_is_refused(teachers, tmp_path, monkeypatch):
    words = ["tracking.wandb.mode=disabled", f"distill.from=[{teachers}/a, {tmp_path}/half]"]
    half = shutil.copytree(teachers / "b", tmp_path / "half")
    (half / "last.safetensors").write_bytes(b"")
    with pytest.raises(RecipeError, match=r"distill\.from\n *.*half.last\.safetensors is not a whole weights file"):
        train(load_recipe("debug", *words), tmp_path / "run")
    with pytest.raises(RecipeError, match=r"no/such is not a run folder(.|\n)*train it first"):
        train(load_recipe("debug", "distill.from=no/such"), tmp_path / "run")
    (half / "last.safetensors").unlink()
    with pytest.raises(RecipeError, match=r"No such file or directory.*half.last\.safetensors"):
        train(load_recipe("debug", *words), tmp_path / "run")

    synthetic = datasets.DATASETS["synthetic"]

    def seven(root, split, download):
        parts = synthetic(root, split, download)
        return [replace(part, labels=part.labels % 7, classes=tuple("abcdefg")) for part in parts]

    monkeypatch.setitem(datasets.DATASETS, "synthetic", seven)
    with pytest.raises(RecipeError, match=r"a knows 10 classes \(0, 1, .*\), synthetic has 7 \(a, b, c"):
        train(load_recipe("debug", f"distill.from={teachers}/a"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
