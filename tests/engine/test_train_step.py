"""An update is the one the whole global batch asks for: however it is cut into micro-batches or shared by processes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from mnist_dist.data import Augmentation, Batches, EpochPlan, Images
from mnist_dist.engine.ema import MovingAverage
from mnist_dist.engine.metrics import Meter
from mnist_dist.engine.optimizers import build_optimizer, fill_momentum
from mnist_dist.engine.train_step import NotFinite, Update
from mnist_dist.models import build_model
from mnist_dist.models.layers import Dropout
from mnist_dist.recipe.loading import load_recipe
from mnist_dist.run.model_setup import _smallest_piece

NUM_SAMPLES, BATCH_SIZE = 80, 32  # batches of 32, 32 and 16


def noise_images() -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (NUM_SAMPLES, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (NUM_SAMPLES,), generator=generator)
    return Images(images, labels, tuple("0123456789"), mean=0.5, std=0.29)


DATA = noise_images()


def lenet() -> nn.Module:
    torch.manual_seed(0)
    return build_model("lenet5")


def noisy_linear() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), Dropout(0.1), nn.Linear(784, 10))


@dataclass
class PretendedProcess:
    """What an update asks of Accelerate, for one process of a world that is not there: its gradients stay its own."""

    process_index: int
    num_processes: int
    device: ClassVar = torch.device("cpu")
    scaler: ClassVar = None

    def no_sync(self, model: nn.Module) -> AbstractContextManager[None]:
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        loss.backward()


def make_update(
    accelerator: Any,
    module: nn.Module,
    *,
    lr: float = 0.05,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    seed: int = 4,
    batch_size: int = BATCH_SIZE,
    augmentation: Augmentation | None = None,
    **keywords: Any,
) -> Update:
    """The parts of an update, put together as `mnist_dist.run.build` does."""
    batches = Batches(NUM_SAMPLES, batch_size, seed, augmentation=augmentation)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = build_optimizer(trained, "sgd", lr=lr, momentum=momentum, weight_decay=weight_decay)
    fill_momentum(optimizer)
    model = module
    if isinstance(accelerator, Accelerator):
        model, optimizer = accelerator.prepare(module.train(), optimizer)
    meter = Meter(accelerator)
    return Update(accelerator, model, module, optimizer, batches, DATA, meter=meter, **keywords)


def train(update: Update, steps: int = 4) -> None:
    for step in range(steps):
        epoch, index = divmod(step, update.batches.steps_per_epoch)
        update(update.batches.plan(epoch), index, step)


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def gradient(module: nn.Module) -> Tensor:
    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}")


# The whole batch


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("clip_grad_norm", [None, 0.1])
def test_an_update_is_the_plain_pytorch_step(accelerator, label_smoothing, clip_grad_norm):
    module, plain = lenet(), lenet()
    keywords = {"label_smoothing": label_smoothing, "clip_grad_norm": clip_grad_norm}
    update = make_update(accelerator, module, weight_decay=0.01, **keywords)
    train(update, steps=6)

    optimizer = torch.optim.SGD(plain.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    clipped = 0
    for step in range(6):
        epoch, index = divmod(step, 3)
        rows = update.batches.plan(epoch).order[index * BATCH_SIZE : (index + 1) * BATCH_SIZE]
        images = (DATA.images[rows].float() / 255 - 0.5) / 0.29
        loss = F.cross_entropy(plain(images), DATA.labels[rows], label_smoothing=label_smoothing)
        optimizer.zero_grad()
        loss.backward()
        if clip_grad_norm is not None:
            clipped += int(nn.utils.clip_grad_norm_(plain.parameters(), clip_grad_norm) > clip_grad_norm)
        optimizer.step()
    assert clipped > 0 or clip_grad_norm is None, "nothing was clipped"
    assert_close(weights(module), weights(plain))
    assert not torch.equal(weights(module)["features.0.weight"], weights(lenet())["features.0.weight"])


@pytest.mark.parametrize("micro_batch_size", [1, 7, 32])
def test_micro_batches_make_the_same_update(accelerator, micro_batch_size):
    module, whole = lenet(), lenet()
    train(make_update(accelerator, whole, label_smoothing=0.1, clip_grad_norm=1.0))
    train(make_update(accelerator, module, label_smoothing=0.1, clip_grad_norm=1.0, micro_batch_size=micro_batch_size))
    assert_close(weights(module), weights(whole))


@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_a_short_last_batch_weighs_its_own_size(accelerator, micro_batch_size):
    module, plain = lenet(), lenet()
    update = make_update(accelerator, module, micro_batch_size=micro_batch_size)
    plan = update.batches.plan(0)
    update(plan, 2, 2)
    rows = plan.order[64:]
    assert len(rows) == 16
    F.cross_entropy(plain(DATA.normalize(DATA.images[rows])), DATA.labels[rows]).backward()
    torch.testing.assert_close(gradient(module), gradient(plain), rtol=0, atol=1e-6)


def test_inputs_are_the_samples_own_warps_then_normalised(accelerator):
    augmentation = Augmentation(rotation=20, translation=0.1, scale=(0.8, 1.2))
    update = make_update(accelerator, lenet(), augmentation=augmentation)
    plan = update.batches.plan(1)
    rows = torch.tensor([70, 3, 3, 11])
    one_by_one = [augmentation.apply(DATA.images[[row]].float(), plan.warps[[row]]) for row in rows.tolist()]
    expected = (torch.cat(one_by_one) / 255 - 0.5) / 0.29
    found = update.inputs(plan, rows)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, DATA.normalize(DATA.images[rows]))


def test_the_meter_hears_of_every_sample_once(accelerator):
    module = lenet()
    update = make_update(accelerator, module, lr=0.0, micro_batch_size=5)
    train(update, steps=3)
    figures = update.meter.read()
    with torch.no_grad():
        logits = module(DATA.normalize(DATA.images))
    assert figures["train/loss"] == pytest.approx(F.cross_entropy(logits, DATA.labels).item(), rel=1e-6)
    correct = int((logits.argmax(dim=1) == DATA.labels).sum())
    assert figures["train/accuracy"] == pytest.approx(100 * correct / NUM_SAMPLES)
    assert update.meter.read_epoch()["train/epoch_loss"] == figures["train/loss"]


# Shared by processes


@pytest.mark.parametrize(
    ("world_size", "batch_size", "index"),
    [(2, 32, 0), (3, 32, 1), (5, 32, 2), (7, 32, 0), (7, 80, 0), (3, 39, 2), (7, 77, 1)],
)
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_the_mean_of_the_processes_gradients_is_the_whole_batchs(world_size, batch_size, index, micro_batch_size):
    alone = lenet()
    whole = make_update(PretendedProcess(0, 1), alone, batch_size=batch_size, label_smoothing=0.1)
    plan = whole.batches.plan(0)
    whole(plan, index, 0)
    expected, figures = gradient(alone), whole.meter._sums

    total, sums = torch.zeros_like(expected), torch.zeros_like(figures)
    for rank in range(world_size):
        module = lenet()
        process = PretendedProcess(rank, world_size)
        keywords = {"label_smoothing": 0.1, "micro_batch_size": micro_batch_size}
        update = make_update(process, module, batch_size=batch_size, **keywords)
        update(plan, index, 0)
        total += gradient(module)
        sums += update.meter._sums
    torch.testing.assert_close(total / world_size, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(sums, figures, rtol=1e-6, atol=0)


def test_some_of_those_shares_are_uneven_and_empty():
    shares = {}
    for world_size, batch_size, index in [(3, 32, 1), (3, 39, 2), (7, 77, 1)]:
        batches = Batches(NUM_SAMPLES, batch_size, seed=4)
        rows = [batches.rows(batches.plan(0), index, rank=rank, world_size=world_size) for rank in range(world_size)]
        shares[world_size, batch_size] = sorted(map(len, rows))
    assert shares == {(3, 32): [10, 11, 11], (3, 39): [0, 1, 1], (7, 77): [0, 0, 0, 0, 1, 1, 1]}


# Averaged weights, norms, frozen parameters


def test_averaged_weights_follow_the_moving_average(accelerator):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 26 * 26, 10))
    decay = 0.8
    average = MovingAverage(module, decay)
    update = make_update(accelerator, module, average=average)
    expected: dict[str, Tensor] = {}
    for step in range(5):
        epoch, index = divmod(step, 3)
        update(update.batches.plan(epoch), index, step)
        now = {name: value for name, value in weights(module).items() if value.is_floating_point()}
        assert "1.running_mean" in now
        expected = {name: decay * expected[name] + (1 - decay) * now[name] if expected else now[name] for name in now}
        found = weights(average.module)
        assert_close({name: found[name] for name in expected}, expected)
    assert not torch.allclose(expected["3.weight"], weights(module)["3.weight"], atol=1e-4)


def test_whole_numbers_have_no_mean(accelerator):
    """A table of positions (Swin) lost one in a quarter of its entries by 0.9 × 7 + 0.1 × 7."""
    module = nn.Linear(1, 1)
    module.register_buffer("table", torch.arange(1000))
    average = MovingAverage(module, 0.9)
    for _ in range(3):
        average.move(module, torch.tensor(False))
    assert torch.equal(average.module.table, torch.arange(1000))


@pytest.mark.parametrize("micro_batch_size", [None, 2, 3, 5])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("batch_size", [7, 13, 32])
def test_the_smallest_piece_is_the_one_that_a_step_will_make(batch_size, world_size, micro_batch_size):
    smallest = BATCH_SIZE
    for rank in range(world_size):
        process = PretendedProcess(rank, world_size)
        update = make_update(process, lenet(), batch_size=batch_size, micro_batch_size=micro_batch_size)
        for index in range(update.batches.steps_per_epoch):
            rows, largest = update.rows(update.batches.plan(0), index), -(-update.batches.size(index) // world_size)
            pieces = update._pieces(rows, largest) if len(rows) else [[0]]  # a stand-in
            smallest = min(smallest, *map(len, pieces))
    words = f"batch_size={batch_size}", f"micro_batch_size={'null' if micro_batch_size is None else micro_batch_size}"
    assert _smallest_piece(load_recipe("debug", *words), NUM_SAMPLES, world_size)[0] == smallest


class Scaled(PretendedProcess):
    """A process in fp16, but for the sixteen bits: the loss is scaled."""

    def __init__(self):
        super().__init__(0, 1)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def unscale_gradients(self, optimizer: Any) -> None:
        self.scaler.unscale_(optimizer)

    def make_step_of(self, optimizer: Any) -> None:
        step = optimizer.step

        def scaled() -> None:
            optimizer.step = step
            self.scaler.step(optimizer)
            self.scaler.update()
            optimizer.step = scaled

        optimizer.step = scaled


class Overflows(nn.Module):
    """Batch norm and a loss that is too much for fp16, as long as `until` says."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.out, self.until, self.calls = nn.BatchNorm2d(1), nn.Linear(784, 10), 0, 0

    def forward(self, images: Tensor) -> Tensor:
        self.calls += self.training
        bad = self.training and self.calls <= self.until
        return self.out(self.norm(images * (float("inf") if bad else 1)).flatten(1))


def scaled_update(module: nn.Module, **keywords: Any) -> Update:
    process = Scaled()
    update = make_update(process, module.train(), average=MovingAverage(module, 0.5), **keywords)
    process.make_step_of(update.optimizer)
    return update


def test_a_step_that_fp16_passes_over_leaves_no_trace():
    """The first overflows: batch norm, counters and averages are as if it had never been."""
    module = Overflows()
    module.until = 1
    update = scaled_update(module)
    before = weights(module)
    train(update, 1)
    assert_close(weights(module), before)
    assert update.skipped == 1 and not update.meter._sums.any() and not update.average.n_averaged
    train(update, 3)
    assert update.skipped == 1 and all(value.isfinite().all() for value in weights(update.average.module).values())
    update.check()


@pytest.mark.parametrize("on_nonfinite", ["stop", "skip"])
def test_fp16_stops_where_no_scale_helps(on_nonfinite):
    module = Overflows()
    module.until = 1000
    update = scaled_update(module, on_nonfinite=on_nonfinite)
    before = weights(module)
    train(update, 20)
    update.check()  # 2^20 has been halved to 1: that may still have been the scale
    train(update, 1)
    if on_nonfinite == "skip":
        update.check()
    else:
        with pytest.raises(NotFinite):
            update.check()
        update.check()  # as the checkpoint asks that is saved then
    assert_close(weights(module), before)


@pytest.mark.parametrize("clip_grad_norm", [None, 0.01, 1e6])
def test_grad_norm_is_that_of_the_whole_gradient_before_clipping(accelerator, clip_grad_norm):
    module, plain = lenet(), lenet()
    module.features[0].weight.requires_grad_(False)
    plain.features[0].weight.requires_grad_(False)
    update = make_update(accelerator, module, clip_grad_norm=clip_grad_norm, micro_batch_size=9)
    plan = update.batches.plan(0)
    update(plan, 0, 0)

    rows = plan.order[:BATCH_SIZE]
    F.cross_entropy(plain(DATA.normalize(DATA.images[rows])), DATA.labels[rows]).backward()
    norm = float(gradient(plain).norm())
    assert norm > 0.02
    assert update.grad_norm() == pytest.approx(norm, rel=1e-5)
    stepped_with = norm if clip_grad_norm is None else min(norm, clip_grad_norm)
    assert float(gradient(module).norm()) == pytest.approx(stepped_with, rel=1e-3)


def test_frozen_parameters_stay_bit_identical(accelerator):
    module = lenet()
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(not name.startswith("features."))
    before = weights(module)
    train(make_update(accelerator, module, weight_decay=0.1, clip_grad_norm=1.0, micro_batch_size=10))
    for name, value in weights(module).items():
        assert torch.equal(value, before[name]) is name.startswith("features."), name


# Dropout


def test_dropouts_noise_follows_from_seed_step_and_rank_alone():
    # Both processes of this world are given the same rows: what differs is the noise.
    plan = EpochPlan(0, torch.arange(16).repeat(2), None)

    def noise(*, seed: int = 4, step: int = 0, rank: int = 0, disturbed: int = 0) -> Tensor:
        module = noisy_linear()
        update = make_update(PretendedProcess(rank, 2), module, lr=0.0, seed=seed)
        torch.rand(disturbed)
        update(plan, 0, step)
        return gradient(module)

    expected = noise()
    assert torch.equal(noise(disturbed=5), expected)
    assert not torch.equal(noise(step=1), expected)
    assert not torch.equal(noise(seed=5), expected)
    assert not torch.equal(noise(rank=1), expected)
