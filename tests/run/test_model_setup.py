"""A network is tried before training, with the layout, precision, optimizer and number of processes of the run."""

import random
import sys
import threading
from contextlib import nullcontext
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist import load_recipe, load_run, train
from mnist_dist.data import load_dataset
from mnist_dist.errors import RecipeError
from mnist_dist.evaluate import evaluate
from mnist_dist.run.build import build_components
from mnist_dist.run.model_setup import PreparedModel, prepare_model
from mnist_dist.run.model_trial import describe_region, unsafe_layers
from tests.processes import run_ranks

DATASET = load_dataset("synthetic", limit_train=128, limit_test=10)
QUIET = ("tracking.wandb.mode=disabled", "tracking.plots=false")


def recipe_of(network: type[nn.Module] | str, *words: str):
    name = network if isinstance(network, str) else f"{__name__}:{network.__name__}"
    return load_recipe("debug", f"model={{name: {name}}}", *words, *QUIET)


def prepare(network: type[nn.Module] | str, *words: str, world_size: int = 1) -> PreparedModel:
    return prepare_model(recipe_of(network, *words), DATASET, world_size)


class Flat(nn.Module):
    """One linear layer; the networks below change its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(784, 10)

    def forward(self, images: Tensor):
        return self.layer(images.flatten(1))


# --- layout -------------------------------------------------------------------------------------------------------


class IgniteNet(nn.Module):
    """The network of the MNIST examples of PyTorch and Ignite."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 10, kernel_size=5)
        self.conv2 = nn.Conv2d(10, 20, kernel_size=5)
        self.conv2_drop = nn.Dropout2d()
        self.fc1 = nn.Linear(320, 50)
        self.fc2 = nn.Linear(50, 10)

    def forward(self, x):
        x = F.relu(F.max_pool2d(self.conv1(x), 2))
        x = F.relu(F.max_pool2d(self.conv2_drop(self.conv2(x)), 2))
        x = x.view(-1, 320)
        x = F.relu(self.fc1(x))
        x = F.dropout(x, training=self.training)
        return F.log_softmax(self.fc2(x), dim=-1)


class FlattensInPlace(nn.Module):
    """Its `view` follows a single convolution without padding."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv2d(1, 4, 3, stride=2), nn.Linear(676, 10)

    def forward(self, x):
        return self.out(self.conv(x).view(x.size(0), -1))


class Video(nn.Module):
    """Has a parameter of five dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv3d(1, 2, (1, 3, 3), stride=2, padding=(0, 1, 1)), nn.Linear(392, 10)

    def forward(self, x):
        return self.out(self.conv(x[:, :, None]).flatten(1))


class ViewsOnlyInTraining(FlattensInPlace):
    def forward(self, x):
        x = self.conv(x)
        return self.out(x.view(x.size(0), -1) if self.training else x.flatten(1))


class _ViewedGradient(torch.autograd.Function):
    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        gradient.contiguous(memory_format=torch.preserve_format).view(-1)
        return gradient


class ViewsInTheBackwardPass(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.last, self.out = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 10)

    def forward(self, x):
        return self.out(self.last(_ViewedGradient.apply(self.conv(x))).mean((2, 3)))


@pytest.mark.parametrize("network", [IgniteNet, FlattensInPlace, Video, ViewsOnlyInTraining, ViewsInTheBackwardPass])
def test_a_network_that_does_not_run_in_channels_last_trains_in_contiguous_layout(accelerator, network):
    prepared = prepare(network, "batch_size=32", "ema_decay=0.9")
    assert prepared.recipe.engine.channels_last is False
    assert [note.split(":")[0] for note in prepared.notes if "channels_last" in note] == ["engine.channels_last"]
    components = build_components(prepared.recipe, "no", DATASET.train, prepared.module)
    for step in range(2):
        components.update(components.batches.plan(0), step, step)
    assert components.evaluate(DATASET.test, 5).loss > 0
    assert prepare(network, "engine.channels_last=false").notes == [n for n in prepared.notes if "channels" not in n]


def test_a_network_that_runs_in_channels_last_keeps_that_layout():
    prepared = prepare("lenet5")
    assert prepared.recipe.engine.channels_last is True and prepared.notes == []


@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "groups", "is_safe"),
    [
        (4, 1, 2, 1, False),
        (15, 1, (2, 1), 1, False),
        (32, 1, 2, 4, False),  # each group has 8 input channels
        (16, 1, 2, 1, True),
        (4, 1, 1, 1, True),
        (4, 3, 2, 1, True),
    ],
)
def test_layers_that_damage_memory_in_channels_last_layout_are_named(channels, kernel, stride, groups, is_safe):
    layer = nn.Conv2d(channels, 2 * groups, kernel, stride, groups=groups)
    module = nn.Sequential(nn.Conv2d(1, channels, 3, stride=3), nn.Sequential(layer))
    assert ("1.0" in unsafe_layers(module, torch.device("cpu"))) == (not is_safe)
    assert not unsafe_layers(module, torch.device("cuda")), "cuDNN has no such fault"


def test_a_narrow_network_with_a_strided_shortcut_trains_in_contiguous_layout():
    narrow, wide = (prepare("ms_ran", f"model.width={width}", "model.bottleneck=2") for width in (8, 16))
    assert narrow.recipe.engine.channels_last is False and wide.recipe.engine.channels_last is True
    [note] = [note for note in narrow.notes if "channels_last" in note]
    assert "residual1.shortcut.0" in note and "residual2" not in note


def test_a_network_of_timm_with_five_dimensions_trains_in_contiguous_layout():
    pytest.importorskip("timm", reason="timm is not installed: pip install timm")
    assert prepare("timm/lambda_resnet26t").recipe.engine.channels_last is False


def test_the_layout_is_kept_in_the_run_and_by_a_student(tmp_path, accelerator):
    train(recipe_of(IgniteNet, "max_steps=2"), tmp_path / "a")
    assert load_run(tmp_path / "a").recipe.engine.channels_last is False
    words = [*QUIET, "max_steps=2", f"distill.from={tmp_path / 'a'}"]
    train(load_recipe("debug", *words), tmp_path / "b", allow_code=[__name__])
    assert (tmp_path / "b" / "summary.json").is_file()


# --- precision and optimizer --------------------------------------------------------------------------------------


class NeedsFloat32(Flat):
    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images)
        if output.dtype != torch.float32:
            raise TypeError(f"float32 is needed, not {output.dtype}")
        return output


def test_the_trial_uses_the_precision_of_the_run(refused):
    assert prepare(NeedsFloat32).notes == []
    assert refused(lambda: prepare(NeedsFloat32, "mixed_precision=bf16")) == [("model.name", "model")]


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.levels, self.out = nn.Embedding(8, 2, sparse=True), nn.Linear(1568, 10)

    def forward(self, images):
        return self.out(self.levels(images.clamp(0, 7).long()).flatten(1))


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad"])
def test_sparse_gradients_are_refused_by_the_name_of_the_parameter(optimizer):
    with pytest.raises(RecipeError, match=r"levels\.weight") as error:
        prepare(Sparse, f"optimizer={{name: {optimizer}}}")
    assert [(each.key, each.kind) for each in error.value.problems] == [("model.name", "model")]


class HasNoGradient(Flat):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images).detach()


class FailsInTheBackwardPass(Flat):
    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images).exp()
        return output.mul_(2)  # the backward pass of exp needs its output unchanged


class HasAnotherShapeInTraining(Flat):
    def forward(self, images: Tensor) -> Tensor:
        output = super().forward(images)
        return output[:, :5] if self.training else output


@pytest.mark.parametrize("network", [HasNoGradient, FailsInTheBackwardPass, HasAnotherShapeInTraining])
def test_a_network_that_fails_only_in_training_is_refused(refused, network):
    assert refused(lambda: prepare(network)) == [("model.name", "model")]


def test_an_optimizer_that_fails_at_its_first_step_is_refused(refused, monkeypatch):
    def fail(self, closure=None):
        raise RuntimeError("no step")

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    assert refused(lambda: prepare(Flat, "optimizer={name: sgd}")) == [("optimizer.name", "model")]


# --- parameters without a gradient --------------------------------------------------------------------------------


class HasAnUnusedLayer(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(3, 3)


class SkipsALayerByChance(HasAnUnusedLayer):
    def forward(self, images):
        output = super().forward(images)
        return output + self.spare(output[:, :3]).sum() if random.random() < 0.5 else output


class AlternatesLayers(HasAnUnusedLayer):
    calls = 0

    def forward(self, images):
        self.calls += 1
        output = super().forward(images)
        return output + self.spare(output[:, :3]).sum() if self.calls % 2 else output


@pytest.mark.parametrize("network", [HasAnUnusedLayer, SkipsALayerByChance, AlternatesLayers])
def test_two_processes_refuse_a_layer_that_is_not_always_called(network):
    random.seed(0)
    with pytest.raises(RecipeError, match=r"spare\.weight, spare\.bias") as error:
        prepare(network, world_size=2)
    assert [(each.key, each.kind) for each in error.value.problems] == [("ddp.find_unused_parameters", "conflict")]
    assert prepare(network, "ddp.find_unused_parameters=true", world_size=2).module.training
    assert prepare(network, "logical_shards=2", world_size=2).module.training


class Probabilities(nn.Sequential):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes), nn.Softmax(dim=1))


class LogProbabilities(nn.Sequential):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes), nn.LogSoftmax(dim=1))


class Positive(nn.Sequential):
    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, num_classes), nn.ReLU())


@pytest.mark.parametrize(
    ("network", "noted"), [(Probabilities, True), (LogProbabilities, False), (Positive, False), ("lenet5", False)]
)
def test_a_note_names_a_network_with_a_softmax(network, noted):
    assert ["softmax" in note for note in prepare(network).notes] == [True] * noted


def test_a_note_names_a_layer_that_is_never_called(monkeypatch):
    for world_size, words in [(1, []), (2, ["ddp.find_unused_parameters=true"])]:
        [note] = prepare(HasAnUnusedLayer, *words, world_size=world_size).notes
        assert "spare.weight, spare.bias" in note
    frozen = load_recipe("debug", f"model={{name: '{__name__}:HasAnUnusedLayer', freeze: ['spare.*']}}")
    assert prepare_model(frozen, DATASET, 2).notes == []


@pytest.mark.parametrize("find", [False, True])
def test_two_processes_train_an_unused_layer_only_with_find_unused_parameters(tmp_path, find):
    words = ["--recipe", "debug", f"model={{name: '{__name__}:SkipsALayerByChance'}}", "max_steps=6", *QUIET]
    words += ["--run-dir", str(tmp_path / "run"), f"ddp.find_unused_parameters={find}".lower()]
    # Rank 1 prints no message of its own in the time that a launcher needs to end it.
    program = "import sys, mnist_dist.errors as errors; errors.RANK_0_SECONDS = 0.1; from mnist_dist.train import main"
    program += "; sys.exit(errors.run_command(main))"
    with nullcontext() if find else pytest.raises(AssertionError, match=r"ddp\.find_unused_parameters"):
        run_ranks(2, [sys.executable, "-c", program, *words])
    assert (tmp_path / "run" / "summary.json").exists() is (tmp_path / "run").exists() is find


# --- the part of the image that matters ---------------------------------------------------------------------------


class Crops(Flat):
    def forward(self, images):
        return super().forward(F.pad(images[:, :, :, :14], (14, 0)))


class Patches(nn.Sequential):
    """Patches of 8×8 leave out four rows and columns."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 8, stride=8), nn.Flatten(), nn.Linear(36, 10))


@pytest.mark.parametrize(
    ("network", "parts"),
    [(Crops, ("columns 15 to 28", "50 %")), (Patches, ("rows 25 to 28", "columns 25 to 28", "27 %"))],
)
def test_the_part_of_the_image_without_effect_is_named(network, parts):
    [note] = prepare(network).notes
    assert all(part in note for part in parts)


class StartsAtZero(Flat):
    def __init__(self) -> None:
        super().__init__()
        nn.init.zeros_(self.layer.weight)


class Pools(nn.Sequential):
    """The gradient of one image reaches one pixel of 49."""

    def __init__(self) -> None:
        super().__init__(nn.MaxPool2d(7), nn.Flatten(), nn.Linear(16, 10))


class Binarizes(Flat):
    """The gradient of its input is zero, but the input has an effect."""

    def forward(self, images):
        return super().forward((images > 0).float().requires_grad_())


class StridesOver(nn.Sequential):
    """A convolution that does not reach the last row and the last column."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(1, 4, 3, stride=3), nn.Flatten(), nn.Linear(324, 10))


@pytest.mark.parametrize("network", [StartsAtZero, Pools, Binarizes, StridesOver, "simple_cnn", "mnistnet", "ms_ran"])
def test_no_part_of_the_image_is_named_if_all_of_it_has_an_effect(network):
    assert prepare(network).notes == []


class Normalizes(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(784, 10))


class Drops(Flat):
    """Dropout that is no module."""

    def forward(self, images):
        return super().forward(F.dropout(images, 0.1, self.training))


class NormalizesAndDrops(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(Normalizes(), nn.Dropout(0.1))


@pytest.mark.parametrize(
    ("network", "effects"),
    [
        (Flat, []),
        ("lenet5", []),
        (Normalizes, ["batch norm"]),
        (Drops, ["dropout"]),
        (NormalizesAndDrops, ["batch norm", "dropout"]),
    ],
)
@pytest.mark.parametrize(
    ("words", "world_size", "splits"),
    [
        ([], 1, False),
        (["micro_batch_size=128"], 1, False),
        (["micro_batch_size=64"], 1, True),
        (["micro_batch_size=64"], 2, False),
        (["micro_batch_size=63"], 2, True),
        (["micro_batch_size=64", "logical_shards=2"], 1, False),
        (["micro_batch_size=auto"], 1, True),
    ],
)
def test_a_note_says_if_micro_batches_change_the_result(network, effects, words, world_size, splits):
    notes = [note for note in prepare(network, *words, world_size=world_size).notes if "micro_batch_size" in note]
    assert len(notes) == (splits and len(effects) > 0)
    for note in notes:
        assert [effect for effect in ("batch norm", "dropout") if effect in note] == effects


def test_a_region_is_described_by_rows_and_columns():
    mask = torch.zeros(28, 28, dtype=torch.bool)
    mask[2:5] = mask[27] = mask[:, 0] = True
    assert describe_region(mask).startswith("rows 3 to 5, 28 and columns 1 (")
    mask[10, 10] = True
    assert "elsewhere" in describe_region(mask)
    assert describe_region(torch.eye(28, dtype=torch.bool)).startswith("scattered")


# --- networks that return more than logits ------------------------------------------------------------------------


class ReturnsAMapping(Flat):
    def forward(self, images):
        return {"hidden_states": images, "logits": super().forward(images)}


@dataclass
class Output:
    logits: Tensor
    loss: Tensor | None = None


class ReturnsAnObject(Flat):
    def forward(self, images):
        return Output(super().forward(images))


class ReturnsAMappingWithoutLogits(Flat):
    def forward(self, images):
        return {"output": super().forward(images)}


class ReturnsATuple(Flat):
    def forward(self, images):
        return super().forward(images), images


@pytest.mark.parametrize("network", [ReturnsAMapping, ReturnsAnObject])
def test_the_logits_of_a_mapping_or_an_object_are_used_everywhere(tmp_path, accelerator, network):
    train(recipe_of(network, "max_steps=4", "ema_decay=0.9"), tmp_path / "run")
    model = load_run(tmp_path / "run", allow_code=__name__).model
    assert model(torch.zeros(3, 1, 28, 28)).shape == (3, 10)
    assert list(model.state_dict()) == ["layer.weight", "layer.bias"]


@pytest.mark.parametrize("network", [ReturnsAMappingWithoutLogits, ReturnsATuple])
def test_a_network_without_logits_is_refused(network):
    with pytest.raises(RecipeError, match="logits") as error:
        prepare(network)
    assert [(each.key, each.kind) for each in error.value.problems] == [("model.name", "model")]


class ReturnsAuxiliaryLogits(Flat):
    def forward(self, images):
        output = super().forward(images)
        return {"logits": output, "aux_logits": output} if self.training else output


def test_auxiliary_logits_are_refused(refused):
    assert refused(lambda: prepare(ReturnsAuxiliaryLogits)) == [("model.name", "model")]


class EndsTheProcess(Flat):
    def __init__(self) -> None:
        super().__init__()
        raise SystemExit(0)


class EndsTheProcessInTraining(Flat):
    def forward(self, images):
        return sys.exit() if self.training else super().forward(images)


@pytest.mark.parametrize("network", [EndsTheProcess, EndsTheProcessInTraining])
def test_a_network_that_ends_the_process_is_refused(refused, network):
    assert refused(lambda: prepare(network)) == [("model.name", "model")]


def test_a_module_that_ends_the_process_is_refused(refused, tmp_path, monkeypatch):
    (tmp_path / "script.py").write_text("import sys\nsys.exit()\n")  # e.g. a script without a check of __name__
    monkeypatch.syspath_prepend(tmp_path)
    assert refused(lambda: load_recipe("debug", "model={name: script:Net}")) == [("model.name", "model")]


# --- networks that cannot be copied or loaded again ---------------------------------------------------------------


class HoldsALock(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class HasOldWeightNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.utils.weight_norm(nn.Linear(784, 10))

    def forward(self, images):
        return self.layer(images.flatten(1))


class CreatesALayerInItsFirstPass(Flat):
    def __init__(self) -> None:
        super().__init__()
        self.second = None

    def forward(self, images):
        if self.second is None:
            self.second = nn.Linear(10, 10)
        return self.second(super().forward(images))


class SetsTheDefaultType(Flat):
    def __init__(self) -> None:
        super().__init__()
        torch.set_default_dtype(torch.float64)


def scripted() -> nn.Module:
    """A network in TorchScript, which `copy.deepcopy` gives parameters that no optimizer takes."""
    return torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(784, 10)))


@pytest.mark.filterwarnings("ignore:.*deprecated:FutureWarning")
@pytest.mark.parametrize("network", [HoldsALock, HasOldWeightNorm, scripted])
def test_a_network_that_cannot_be_copied_trains_and_is_evaluated(tmp_path, accelerator, network):
    trained = train(recipe_of(network, "max_steps=4"), tmp_path / "run")
    run = load_run(tmp_path / "run", allow_code=__name__)
    before = [each.clone() for each in run.model.parameters()]
    assert evaluate(run)["accuracy"] == trained["eval.last.accuracy"]
    assert all(map(torch.equal, before, run.model.parameters()))


def test_averaged_weights_need_a_network_that_can_be_copied(refused):
    assert prepare(HoldsALock).notes == []
    assert refused(lambda: prepare(HoldsALock, "ema_decay=0.9")) == [("ema_decay", "model")]


def test_a_network_that_grows_in_its_first_pass_is_refused():
    with pytest.raises(RecipeError, match=r"second\.bias, second\.weight") as error:
        prepare(CreatesALayerInItsFirstPass)
    assert [(each.key, each.kind) for each in error.value.problems] == [("model.name", "model")]


def test_a_network_does_not_change_the_default_type_of_new_tensors(accelerator):
    assert prepare(SetsTheDefaultType).module.layer.weight.dtype == torch.float32
    assert torch.get_default_dtype() == torch.float32


# --- what a trial must not change ----------------------------------------------------------------------------------


class Stateful(nn.Module):
    """Draws random numbers from every source, and counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.out = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Linear(2704, 10)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images):
        self.calls += 1
        random.random(), np.random.rand(), torch.rand(())
        return self.out(F.dropout(self.norm(self.conv(images)), training=self.training).flatten(1))


class CannotBeCopied(Stateful):
    def __init__(self) -> None:
        super().__init__()
        self.lock = sys.stdout.buffer


def random_states() -> list[object]:
    return [random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()]


@pytest.mark.parametrize("network", [Stateful, CannotBeCopied])
def test_a_trial_changes_neither_random_numbers_nor_the_network(monkeypatch, network):
    built: list[object] = []

    class Watched(network):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            built.extend([random_states(), {name: value.clone() for name, value in self.state_dict().items()}])

    monkeypatch.setattr(sys.modules[__name__], network.__name__, Watched)
    module = prepare(network, world_size=2).module
    states, weights = built
    assert random_states() == states
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert all(each.grad is None and each.requires_grad and each.is_contiguous() for each in module.parameters())
    assert all(part.training for part in module.modules())


def test_a_trial_uses_few_images(monkeypatch):
    seen: list[int] = []
    monkeypatch.setattr(Flat, "forward", lambda self, x: (seen.append(len(x)), self.layer(x.flatten(1)))[1])
    prepare(Flat)
    assert sum(seen) <= 10
