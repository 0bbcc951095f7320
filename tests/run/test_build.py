"""A recipe is refused before anything is built if its world, its data or its network rules out training."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from torch import nn

from mnist_dist import build_model, load_recipe
from mnist_dist.data import load_dataset
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.errors import RecipeError
from mnist_dist.run.build import build_components, check_world
from mnist_dist.run.data import data_root, load_data
from mnist_dist.run.model_setup import build_module

DATASET = load_dataset("synthetic", limit_train=128, limit_test=10)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_FSDP", "FSDP_VERSION"):
        monkeypatch.delenv(name, raising=False)


def world(num_processes: int, device: str = "cpu") -> SimpleNamespace:
    return SimpleNamespace(num_processes=num_processes, device=torch.device(device))


# --- the world ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "state", "key"),
    [
        ([], world(1), None),
        (["mixed_precision=bf16"], world(1), None),
        (["mixed_precision=fp16"], world(1, "cuda"), None),
        (["mixed_precision=fp16"], world(1), "mixed_precision"),
        (["batch_size=4"], world(4), None),
        (["batch_size=3"], world(4), "batch_size"),
        (["logical_shards=4"], world(2), None),
        (["logical_shards=4"], world(3), None),
        (["logical_shards=4"], world(5), "logical_shards"),
    ],
    ids=str,
)
def test_a_recipe_that_this_world_cannot_train_is_refused(refused, words, state, key):
    recipe = load_recipe("debug", *words)
    if key is None:
        assert check_world(recipe, state) == (recipe.mixed_precision or "no")
    else:
        assert refused(lambda: check_world(recipe, state)) == [(key, "unsupported")]


def test_a_gpu_without_bf16_refuses_it(refused, monkeypatch):
    monkeypatch.setattr("mnist_dist.distributed.devices.is_bf16_available", lambda ignore_tpu: False)
    recipe = load_recipe("debug", "mixed_precision=bf16")
    assert refused(lambda: check_world(recipe, world(1, "mps"))) == [("mixed_precision", "unsupported")]
    assert check_world(recipe, world(1)) == "bf16"


def test_an_unknown_precision_of_the_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(RecipeError) as error:
        check_world(load_recipe("debug"), world(1))
    [problem] = error.value.problems
    assert (problem.where, problem.key, problem.kind) == ("the launcher", "mixed_precision", "unsupported")
    assert check_world(load_recipe("debug", "mixed_precision=no"), world(1)) == "no"


def test_every_feature_that_fsdp_excludes_is_named(refused, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    values = {"ema_decay": "0.9", "logical_shards": "2", "micro_batch_size": "8", "mixed_precision": "fp16"}
    recipe = load_recipe("debug", *(f"{key}={value}" for key, value in values.items()))
    assert refused(lambda: check_world(recipe, world(2))) == [(key, "unsupported") for key in values]
    synchronized = load_recipe("debug", "sync_batchnorm=true")
    assert refused(lambda: check_world(synchronized, world(2))) == [("sync_batchnorm", "unsupported")]
    assert check_world(load_recipe("debug"), world(2)) == check_world(synchronized, world(1)) == "no"


# --- the data -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "key", "kind"),
    [
        (FileNotFoundError("no folder"), "data.root", "missing"),
        (ImportError("no scikit-learn"), "data.dataset", "missing"),
        (ValueError("a damaged file"), "data", "damaged"),
        (PermissionError("not readable"), "data.root", "damaged"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
def test_data_that_cannot_be_read_is_refused(refused, monkeypatch, accelerator, error, key, kind):
    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr("mnist_dist.run.data.load_dataset", fail)
    assert refused(lambda: load_data(load_recipe("debug"), PartialState())) == [(key, kind)]


@pytest.mark.parametrize("written", ["~/data", "$HOME/data", "${HOME}/data"])
@pytest.mark.parametrize("place", ["data.root", "MNIST_DIST_DATA"])
def test_home_and_variables_in_the_data_folder_are_replaced(place, written, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("MNIST_DIST_DATA", written if place == "MNIST_DIST_DATA" else "/elsewhere")
    assert data_root(load_recipe("lenet5", *([f"data.root={written}"] * (place == "data.root")))) == Path(
        "/home/me/data"
    )


@pytest.mark.parametrize("place", ["data.root", "MNIST_DIST_DATA"])
def test_a_data_folder_with_an_unset_variable_is_refused(place, monkeypatch, refused):
    monkeypatch.setenv("MNIST_DIST_DATA", "$NOT_SET/data")
    words = ["data.root=$NOT_SET/data"] * (place == "data.root")
    assert refused(lambda: data_root(load_recipe("lenet5", *words))) == [(place, "missing")]


def test_a_validation_set_as_large_as_the_training_set_is_refused(refused, accelerator):
    recipe = load_recipe("debug", "data.validation=4096")
    assert refused(lambda: load_data(recipe, PartialState())) == [("data.validation", "conflict")]


# --- the network --------------------------------------------------------------------------------------------------


class Fails(nn.Module):
    def __init__(self) -> None:
        raise RuntimeError("no reason")


class ReturnsNothing(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor | None:
        return None


class ReturnsATupleInTraining(ReturnsNothing):
    def forward(self, images):
        output = self.layer(images.flatten(1))
        return (output, output) if self.training else output


class HasNoParameter(nn.Module):
    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :10]


class NormalisesByTheBatch(nn.Sequential):
    """Batch norm over one value per channel cannot train on a single image."""

    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 10), nn.BatchNorm1d(10))


@pytest.mark.parametrize("network", [Fails, ReturnsNothing, ReturnsATupleInTraining, HasNoParameter])
def test_a_network_that_cannot_be_trained_is_refused(refused, network):
    recipe = load_recipe("debug", f"model.name={__name__}:{network.__name__}")
    assert refused(lambda: build_module(recipe, DATASET)) == [("model.name", "model")]


@pytest.mark.parametrize(
    ("words", "world_size", "key"),
    [
        (["batch_size=127"], 1, "batch_size"),  # 128 images: the last batch has one
        (["batch_size=128"], 1, None),
        (["batch_size=3"], 3, "batch_size"),
        (["batch_size=64", "logical_shards=64"], 1, "logical_shards"),
        (["batch_size=64", "micro_batch_size=1"], 1, "micro_batch_size"),
        (["batch_size=64", "micro_batch_size=2"], 1, None),
        (["batch_size=4", "sync_batchnorm=true"], 4, None),
    ],
    ids=str,
)
def test_a_micro_batch_of_one_image_is_refused_if_the_network_cannot_train_on_it(refused, words, world_size, key):
    recipe = load_recipe("debug", *words, f"model.name={__name__}:NormalisesByTheBatch")
    if key is None:
        assert build_module(recipe, DATASET, world_size).training
    else:
        assert refused(lambda: build_module(recipe, DATASET, world_size)) == [(key, "model")]


def test_a_frozen_batch_norm_stays_in_eval_mode():
    """All parameters but those of the last batch norm are frozen."""
    names = [name for name, _ in build_model("model_v1").named_parameters()]
    recipe = load_recipe("debug", "model={name: model_v1}", f"model.freeze={names[:-2]}")
    module = build_module(recipe, DATASET)
    assert [name for name, each in module.named_parameters() if each.requires_grad] == names[-2:]
    norms = [part for part in module.modules() if isinstance(part, nn.BatchNorm2d)]
    assert len(norms) > 1 and [part.training for part in norms] == [False] * (len(norms) - 1) + [True]
    assert module.training


# --- the components -----------------------------------------------------------------------------------------------


def test_components_follow_the_recipe(accelerator):
    words = ["ema_decay=0.9", "micro_batch_size=auto", "clip_grad_norm=0.5", "on_nonfinite=skip", "max_steps=3"]
    recipe = load_recipe("debug", *words, "batch_size=32", "ddp.comm_hook=bf16", "engine.capture=off")
    components = build_components(recipe, "no", DATASET.train, build_module(recipe, DATASET))
    step = components.update
    assert isinstance(step, TrainStep) and components.captured is None
    assert (step.clip_grad_norm, step.on_nonfinite, step.micro_batch_size) == (0.5, "skip", 32)
    assert (components.batches.steps_per_epoch, components.total_steps) == (4, 3)
    assert components.eval_model is step.average.module and components.module is step.module
    assert [note.split()[0] for note in components.notes] == ["ddp.comm_hook", "micro_batch_size"]


@pytest.mark.parametrize(("precision", "emulated"), [("bf16", True), ("bf16", False), ("no", True)])
def test_a_cpu_that_emulates_bf16_is_named(accelerator, monkeypatch, precision, emulated):
    monkeypatch.setattr("mnist_dist.run.build.emulates_bf16", lambda device: emulated)
    recipe = load_recipe("debug", f"mixed_precision={precision}")
    notes = build_components(recipe, "no", DATASET.train, build_module(recipe, DATASET)).notes
    assert [note.split(":")[0] for note in notes] == ["bf16 is emulated"] * (emulated and precision == "bf16")


def test_a_gpu_that_the_run_does_not_use_is_named(accelerator, monkeypatch):
    monkeypatch.setattr("mnist_dist.run.build.unused_gpu", lambda device: f"no driver for {device.type}")
    recipe = load_recipe("debug")
    [note] = build_components(recipe, "no", DATASET.train, build_module(recipe, DATASET)).notes
    assert "NVIDIA GPU" in note and "no driver for cpu" in note


# --- the images' shape and place ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "keys"),
    [
        (["data.augment.crop_padding=28"], ["crop_padding"]),
        (["data.augment.cutout=29", "data.augment.fill=[1, 2, 3]"], ["fill", "cutout"]),
        (["data.augment.crop_padding=27", "data.augment.cutout=28", "data.augment.fill=[9]"], []),
    ],
)
def test_augmentation_that_does_not_fit_the_images_is_refused(accelerator, refused, words, keys):
    recipe = load_recipe("debug", *words)
    if not keys:
        build_components(recipe, "no", DATASET.train, build_module(recipe, DATASET))
        return
    found = refused(lambda: build_components(recipe, "no", DATASET.train, build_module(recipe, DATASET)))
    assert found == [(f"data.augment.{key}", "conflict") for key in keys]
