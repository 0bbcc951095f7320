"""A training step equals a plain step on the global batch, also with micro-batches and with several processes."""

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from mnist_dist.data import Augmentation, Batches, EpochPlan, Images
from mnist_dist.engine.distillation import Distillation
from mnist_dist.engine.ema import MovingAverage
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.micro_batch_size import find_micro_batch_size
from mnist_dist.engine.optimizers import build_optimizer, fill_momentum
from mnist_dist.engine.train_step import NotFinite, StepSettings, TrainedNetwork, TrainStep
from mnist_dist.models import build_model
from mnist_dist.models.layers import Dropout
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.run.model_setup import _smallest_micro_batch

NUM_SAMPLES, BATCH_SIZE = 80, 32  # batches of 32, 32 and 16


def noise_images() -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_SAMPLES, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (NUM_SAMPLES,), generator=generator)
    return Images(images, labels, tuple("0123456789"), mean=(0.5,), std=(0.29,))


DATA = noise_images()


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return build_model("lenet5")


def noisy_linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), Dropout(0.1), nn.Linear(784, 10))


@dataclass
class FakeProcess:
    """Stands in for the Accelerator of one of several processes. Gradients are not reduced over the processes."""

    process_index: int
    num_processes: int
    device: ClassVar = torch.device("cpu")
    scaler: ClassVar = None

    def backward(self, loss: Tensor, **keywords: Any) -> None:
        loss.backward(**keywords)


def make_step(
    accelerator: Any,
    module: nn.Module,
    *,
    lr: float = 0.05,
    weight_decay: float = 0.0,
    seed: int = 4,
    batch_size: int = BATCH_SIZE,
    augmentation: Augmentation | None = None,
    average: MovingAverage | None = None,
    distillation: Distillation | None = None,
    optimizer_name: str = "sgd",
    **settings: Any,
) -> TrainStep:
    """Builds a training step, with momentum 0.9 for SGD, as `mnist_dist.run.build` does."""
    batches = Batches(NUM_SAMPLES, batch_size, seed, augmentation=augmentation)
    keywords = {"momentum": 0.9} if optimizer_name == "sgd" else {}
    optimizer = build_optimizer(module, optimizer_name, lr=lr, weight_decay=weight_decay, **keywords)
    fill_momentum(optimizer)
    if isinstance(accelerator, Accelerator):
        _, optimizer = accelerator.prepare(module.train(), optimizer)
    network = TrainedNetwork(module, optimizer, average)
    meter, step_settings = Meter(accelerator), StepSettings(**settings)
    return TrainStep(accelerator, network, batches, DATA, meter, step_settings, distillation=distillation)


def train(step: TrainStep, steps: int = 4) -> None:
    for number in range(steps):
        epoch, index = divmod(number, step.batches.steps_per_epoch)
        step(step.batches.plan(epoch), index, number)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# --- one process --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
def test_a_step_equals_the_plain_pytorch_step(accelerator, label_smoothing, clip_grad_norm):
    module, plain = lenet(), lenet()
    settings = {"label_smoothing": label_smoothing, "clip_grad_norm": clip_grad_norm}
    step = make_step(accelerator, module, weight_decay=0.01, **settings)
    train(step, steps=6)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    clipped = 0
    for number in range(6):
        epoch, index = divmod(number, 3)
        rows = step.batches.plan(epoch).order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        images = (DATA.images[rows].float() / 255 - 0.5) / 0.29
        loss = F.cross_entropy(plain(images), DATA.labels[rows], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if clip_grad_norm is not None:
            clipped += int(nn.utils.clip_grad_norm_(plain.parameters(), clip_grad_norm) > clip_grad_norm)
        optimizer.step()
    assert clipped > 0 or clip_grad_norm is None, "no gradient was clipped"
    assert_close(weights(module), weights(plain))
    assert not torch.equal(weights(module)["features.0.weight"], weights(lenet())["features.0.weight"])


CLASS_WEIGHTS = (0.2, 1.5, 1.0, 3.0, 0.7, 1.0, 2.0, 0.4, 1.0, 1.1)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_class_weights_give_the_weighted_mean_over_the_batch(accelerator, label_smoothing, micro_batch_size):
    module, plain = lenet(), lenet()
    settings = {"label_smoothing": label_smoothing, "micro_batch_size": micro_batch_size}
    step = make_step(accelerator, module, class_weights=CLASS_WEIGHTS, **settings)
    train(step, steps=6)
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9)
    for number in range(6):
        epoch, index = divmod(number, 3)
        rows = step.batches.plan(epoch).order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        optimizer.zero_grad()
        logits, weight = plain(DATA.normalize(DATA.images[rows])), torch.tensor(CLASS_WEIGHTS)
        F.cross_entropy(logits, DATA.labels[rows], weight=weight, label_smoothing=label_smoothing).backward()
        optimizer.step()
    assert_close(weights(module), weights(plain))


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_divisor_of_the_weighted_mean_is_that_of_the_global_batch(world_size):
    """Not of a process's own part: the mean of weighted means over unequal parts would be another number."""
    scales = []
    for rank in range(world_size):
        step = make_step(FakeProcess(rank, world_size), lenet(), class_weights=CLASS_WEIGHTS)
        plan = step.batches.plan(0)
        batch = step.load(plan, 0)
        assert len(batch.scale) == len(batch)
        scales.append(batch.scale.unique())
    used = torch.tensor(CLASS_WEIGHTS)[DATA.labels[plan.order[:BATCH_SIZE]]]
    torch.testing.assert_close(torch.cat(scales), (BATCH_SIZE / used.sum()).repeat(world_size))


@pytest.mark.parametrize("micro_batch_size", [1, 7, 32])
def test_micro_batches_do_not_change_the_update_without_batch_norm_and_dropout(accelerator, micro_batch_size):
    module, unsplit = lenet(), lenet()
    train(make_step(accelerator, unsplit, label_smoothing=0.1, clip_grad_norm=1.0))
    train(make_step(accelerator, module, label_smoothing=0.1, clip_grad_norm=1.0, micro_batch_size=micro_batch_size))
    assert_close(weights(module), weights(unsplit))


def normalised_linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.BatchNorm1d(784), nn.Linear(784, 10))


@pytest.mark.parametrize("build", [noisy_linear, normalised_linear])
def test_micro_batches_change_the_update_with_batch_norm_or_dropout(accelerator, build):
    module, unsplit = build(), build()
    train(make_step(accelerator, unsplit), steps=1)
    train(make_step(accelerator, module, micro_batch_size=16), steps=1)
    assert (gradient(module) - gradient(unsplit)).norm() > 0.01 * gradient(unsplit).norm()


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_the_loss_of_a_short_last_batch_is_the_mean_over_its_own_samples(accelerator, micro_batch_size):
    module, plain = lenet(), lenet()
    step = make_step(accelerator, module, micro_batch_size=micro_batch_size)
    plan = step.batches.plan(0)
    step(plan, 2, 2)
    rows = plan.order[64:]
    assert len(rows) == 16
    F.cross_entropy(plain(DATA.normalize(DATA.images[rows])), DATA.labels[rows]).backward()
    torch.testing.assert_close(gradient(module), gradient(plain), rtol=0, atol=1e-6)


def test_inputs_are_warped_sample_by_sample_then_normalised(accelerator):
    augmentation = Augmentation(rotation=20, translation=0.1, scale=(0.8, 1.2))
    step = make_step(accelerator, lenet(), augmentation=augmentation)
    plan = step.batches.plan(1)
    rows = step.batches.rows(plan, 1)
    changes = step.batches.changes(1, rows)
    images = DATA.images[rows].float()
    one_by_one = [augmentation.apply(images[[i]], changes[[i]]) for i in range(len(rows))]
    expected = (torch.cat(one_by_one) / 255 - 0.5) / 0.29
    found = step.inputs(step.load(plan, 1))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, DATA.normalize(DATA.images[rows]))


def test_the_meter_counts_every_sample_once(accelerator):
    module = lenet()
    step = make_step(accelerator, module, lr=0.0, micro_batch_size=5)
    train(step, steps=3)
    figures = step.meter.read()
    with torch.no_grad():
        logits = module(DATA.normalize(DATA.images))
    assert figures["train/loss"] == pytest.approx(F.cross_entropy(logits, DATA.labels).item(), rel=1e-6)
    correct = int((logits.argmax(dim=1) == DATA.labels).sum())
    assert figures["train/accuracy"] == pytest.approx(100 * correct / NUM_SAMPLES)
    assert step.meter.read_epoch()["train/epoch_loss"] == figures["train/loss"]


# --- several processes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world_size", "batch_size", "index"),
    [(2, 32, 0), (3, 32, 1), (5, 32, 2), (7, 32, 0), (7, 80, 0), (3, 39, 2), (7, 77, 1)],
)
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_the_mean_gradient_over_processes_is_that_of_the_global_batch(world_size, batch_size, index, micro_batch_size):
    alone = lenet()
    one_process = make_step(FakeProcess(0, 1), alone, batch_size=batch_size, label_smoothing=0.1)
    plan = one_process.batches.plan(0)
    one_process(plan, index, 0)
    expected, figures = gradient(alone), one_process.meter.sums

    total, sums = torch.zeros_like(expected), torch.zeros_like(figures)
    for rank in range(world_size):
        module, process = lenet(), FakeProcess(rank, world_size)
        settings = {"label_smoothing": 0.1, "micro_batch_size": micro_batch_size}
        step = make_step(process, module, batch_size=batch_size, **settings)
        step(plan, index, 0)
        total += gradient(module)
        sums += step.meter.sums
    torch.testing.assert_close(total / world_size, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(sums, figures, rtol=1e-6, atol=0)


MIXED = Augmentation(flip=True, crop_padding=2, contrast=0.3, cutout=5, mixup=0.5, cutmix=1.0)


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize(("world_size", "index"), [(2, 0), (3, 2), (7, 1)])
def test_the_loss_of_mixed_images_is_the_mean_over_the_global_batch(world_size, index, micro_batch_size):
    words = {"augmentation": MIXED, "batch_size": 39, "label_smoothing": 0.1}
    alone, plain = lenet(), lenet()
    one_process = make_step(FakeProcess(0, 1), alone, **words)
    plan = one_process.batches.plan(0)
    one_process(plan, index, 0)
    batch = one_process.load(plan, index)
    images, targets = one_process.inputs(batch), one_process.targets(batch)
    logits = plain(images)
    loss = F.cross_entropy(logits, targets, label_smoothing=0.1)
    loss.backward()
    torch.testing.assert_close(gradient(alone), gradient(plain), rtol=0, atol=1e-6)
    figures = one_process.meter.sums
    right = targets[torch.arange(len(targets)), logits.argmax(dim=1)].sum()
    expected = torch.tensor([float(loss) * len(batch), float(right), len(batch)])
    torch.testing.assert_close(figures, expected.double(), rtol=1e-5, atol=1e-5)

    total, sums = torch.zeros_like(gradient(alone)), torch.zeros_like(figures)
    for rank in range(world_size):
        module = lenet()
        step = make_step(FakeProcess(rank, world_size), module, micro_batch_size=micro_batch_size, **words)
        step(plan, index, 0)
        total += gradient(module)
        sums += step.meter.sums
    torch.testing.assert_close(total / world_size, gradient(alone), rtol=0, atol=1e-6)
    torch.testing.assert_close(sums, figures, rtol=1e-5, atol=1e-5)


def test_some_of_these_shares_are_unequal_or_empty():
    shares = {}
    for world_size, batch_size, index in [(3, 32, 1), (3, 39, 2), (7, 77, 1)]:
        batches = Batches(NUM_SAMPLES, batch_size, seed=4)
        rows = [batches.rows(batches.plan(0), index, rank=rank, world_size=world_size) for rank in range(world_size)]
        shares[world_size, batch_size] = sorted(map(len, rows))
    assert shares == {(3, 32): [10, 11, 11], (3, 39): [0, 1, 1], (7, 77): [0, 0, 0, 0, 1, 1, 1]}


@pytest.mark.parametrize("micro_batch_size", [None, 2, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [7, 13, 32])
def test_the_smallest_micro_batch_is_predicted(batch_size, world_size, micro_batch_size):
    smallest = BATCH_SIZE
    for rank in range(world_size):
        process = FakeProcess(rank, world_size)
        step = make_step(process, lenet(), batch_size=batch_size, micro_batch_size=micro_batch_size)
        for index in range(step.batches.steps_per_epoch):
            # A process without rows computes one sample with weight 0.
            largest = -(-step.batches.size(index) // world_size)
            micro_batches = step._micro_batches(step.load(step.batches.plan(0), index), largest)
            smallest = min(smallest, *map(len, micro_batches))
    words = f"batch_size={batch_size}", f"micro_batch_size={'null' if micro_batch_size is None else micro_batch_size}"
    assert _smallest_micro_batch(load_recipe("debug", *words), NUM_SAMPLES, world_size)[0] == smallest


# --- waits for the device ----------------------------------------------------------------------------------------


class CountReads(TorchDispatchMode):
    """Counts how often Python reads a value of a tensor. On a GPU each read waits for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.reads += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
@pytest.mark.parametrize("optimizer", ["sgd", "lion", "rmsprop"])
@pytest.mark.parametrize(("guard_is_on_device", "reads"), [(True, 0), (False, 1)])
def test_a_step_waits_for_the_device_at_most_once(monkeypatch, on_nonfinite, guard_is_on_device, reads, optimizer):
    monkeypatch.setattr(
        "mnist_dist.engine.train_step.guards_on_device", lambda optimizer, accelerator: guard_is_on_device
    )
    module = lenet()
    words = {"average": MovingAverage(module, 0.9), "micro_batch_size": 9, "on_nonfinite": on_nonfinite}
    step = make_step(FakeProcess(0, 1), module, optimizer_name=optimizer, **words)
    assert (step._update_guard is not None) == (guard_is_on_device and optimizer != "sgd")
    plan = step.batches.plan(0)
    step(plan, 0, 0)  # creates the optimizer's state, which the host looks at
    for index in range(1, 3):
        with CountReads() as counted:
            step(plan, index, index)
        assert counted.reads == reads


# --- averaged weights ---------------------------------------------------------------------------------------------


def test_averaged_weights_follow_the_moving_average(accelerator):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
    decay = 0.8
    average = MovingAverage(module, decay)
    step = make_step(accelerator, module, average=average)
    expected: dict[str, Tensor] = {}
    for number in range(5):
        epoch, index = divmod(number, 3)
        step(step.batches.plan(epoch), index, number)
        now = {name: value for name, value in weights(module).items() if value.is_floating_point()}
        assert "1.running_mean" in now
        expected = {name: decay * expected[name] + (1 - decay) * now[name] if expected else now[name] for name in now}
        found = weights(average.module)
        assert_close({name: found[name] for name in expected}, expected)
    assert not torch.allclose(expected["3.weight"], weights(module)["3.weight"], atol=1e-4)


def test_integer_tensors_are_copied_not_averaged():
    """0.9 × 7 + 0.1 × 7 is below 7 in floating point; it changed a quarter of the entries of Swin's position table."""
    module = nn.Linear(1, 1)
    module.register_buffer("table", torch.arange(1000))
    average = MovingAverage(module, 0.9)
    for _ in range(3):
        average.move(module, torch.tensor(False))
    assert torch.equal(average.module.table, torch.arange(1000))


# --- fp16 ---------------------------------------------------------------------------------------------------------


class ScaledProcess(FakeProcess):
    """Stands in for the Accelerator of a process in fp16. The loss is scaled, but computed in fp32."""

    def __init__(self):
        super().__init__(0, 1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)

    def backward(self, loss: Tensor, **keywords: Any) -> None:
        self.scaler.scale(loss).backward(**keywords)

    def unscale_gradients(self, optimizer: Any) -> None:
        self.scaler.unscale_(optimizer)

    def scale_steps_of(self, optimizer: Any) -> None:
        """Makes `optimizer.step` use the scaler, as Accelerate's wrapper of an optimizer does."""
        plain_step = optimizer.step

        def scaled_step() -> None:
            optimizer.step = plain_step
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.step = scaled_step

        optimizer.step = scaled_step


class Overflows(nn.Module):
    """A network with batch norm whose output overflows in the first `bad_calls` training passes."""

    def __init__(self, bad_calls: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out, self.bad_calls, self.calls = nn.BatchNorm2d(1), nn.Linear(784, 10), bad_calls, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        bad = self.training and self.calls <= self.bad_calls
        return self.out(self.norm(images * (float("inf") if bad else 1)).flatten(1))


def scaled_step(module: nn.Module, **settings: Any) -> TrainStep:
    process = ScaledProcess()
    step = make_step(process, module.train(), average=MovingAverage(module, 0.5), **settings)
    process.scale_steps_of(step.optimizer)
    return step


def test_a_step_skipped_by_the_scaler_changes_nothing():
    """Batch norm, counters and averaged weights are as before the step."""
    module = Overflows(bad_calls=1)
    step = scaled_step(module)
    before = weights(module)
    train(step, 1)
    assert_close(weights(module), before)
    assert step.skipped == 1 and not step.meter.sums.any() and not step.average.state_dict()["n_averaged"]
    train(step, 3)
    assert step.skipped == 1 and all(value.isfinite().all() for value in weights(step.average.module).values())
    step.check()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_fp16_stops_once_the_scale_is_below_1(on_nonfinite):
    module = Overflows(bad_calls=1000)
    step = scaled_step(module, on_nonfinite=on_nonfinite)
    before = weights(module)
    train(step, 20)
    step.check()  # the scale has been halved from 2^20 to 1: a smaller one might still help
    train(step, 1)
    if on_nonfinite == "skip":
        step.check()
    else:
        with pytest.raises(NotFinite):
            step.check()
        step.check()  # the checkpoint that is saved then must not fail
    assert_close(weights(module), before)


# --- norm, frozen parameters, dropout -----------------------------------------------------------------------------


@pytest.mark.parametrize("clip_grad_norm", [None, 0.01, 1e6])
def test_grad_norm_is_that_of_the_complete_gradient_before_clipping(accelerator, clip_grad_norm):
    module, plain = lenet(), lenet()
    module.features[0].weight.requires_grad_(False)
    plain.features[0].weight.requires_grad_(False)
    step = make_step(accelerator, module, clip_grad_norm=clip_grad_norm, micro_batch_size=9)
    plan = step.batches.plan(0)
    step(plan, 0, 0)

    rows = plan.order[:BATCH_SIZE]
    F.cross_entropy(plain(DATA.normalize(DATA.images[rows])), DATA.labels[rows]).backward()
    norm = float(gradient(plain).norm())
    assert norm > 0.02
    assert float(step.health()[0]) == pytest.approx(norm, rel=1e-5)
    clipped_norm = norm if clip_grad_norm is None else min(norm, clip_grad_norm)
    assert float(gradient(module).norm()) == pytest.approx(clipped_norm, rel=1e-3)


def test_frozen_parameters_stay_bit_identical(accelerator):
    module = lenet()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith("features."))
    before = weights(module)
    train(make_step(accelerator, module, weight_decay=0.1, clip_grad_norm=1.0, micro_batch_size=10))
    for name, value in weights(module).items():
        assert torch.equal(value, before[name]) is name.startswith("features."), name


def test_dropout_depends_on_seed_step_and_rank_only():
    # Both processes get the same rows, so their gradients differ only by dropout.
    plan = EpochPlan(0, torch.arange(16).repeat(2))

    def noise(*, seed: int = 4, step: int = 0, rank: int = 0, drawn_before: int = 0) -> Tensor:
        module = noisy_linear()
        train_step = make_step(FakeProcess(rank, 2), module, lr=0.0, seed=seed)
        torch.rand(drawn_before)
        train_step(plan, 0, step)
        return gradient(module)

    expected = noise()
    assert torch.equal(noise(drawn_before=5), expected)
    assert not torch.equal(noise(step=1), expected)
    assert not torch.equal(noise(seed=5), expected)
    assert not torch.equal(noise(rank=1), expected)


# --- micro-batch size ---------------------------------------------------------------------------------------------


class NeedsMemory(nn.Module):
    """A network with batch norm that runs out of memory on more than ten images."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.out, self.tried = nn.BatchNorm2d(1), nn.Linear(784, 10), []

    def forward(self, images: Tensor) -> Tensor:
        self.tried.append(len(images))
        output = self.out(self.norm(images).flatten(1))
        if len(images) > 10:
            raise RuntimeError("CUDA out of memory.")
        return output


def test_the_micro_batch_size_is_found_by_halving_and_leaves_no_trace(accelerator):
    module = NeedsMemory()
    step = make_step(accelerator, module)
    before = weights(module)
    assert find_micro_batch_size(step, step.batches.plan(0)) == 8
    assert module.tried == [32, 16, 8]
    assert_close(weights(module), before)
    assert all(parameter.grad is None for parameter in module.parameters())
