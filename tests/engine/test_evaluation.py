"""Evaluation counts every image once and gives the same bits at any world size."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mnist_dist.data import Images
from mnist_dist.engine.evaluation import Evaluation, Interrupted, evaluate
from mnist_dist.models import build_model

COUNT = 75


def noise_images(count: int = COUNT) -> Images:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 1, 28, 28), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 10, (count,), generator=generator)
    return Images(images, labels, tuple("0123456789"), mean=(0.5,), std=(0.29,))


DATA = noise_images()


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name)


@dataclass
class FakeProcess:
    """Stands in for the Accelerator of one of several processes.

    `reduce` appends a process's table to `tables` and returns the sum of all tables so far.
    """

    process_index: int
    num_processes: int
    tables: list[Tensor] = field(default_factory=list)
    device: ClassVar = torch.device("cpu")

    def autocast(self) -> AbstractContextManager[None]:
        return nullcontext()

    def reduce(self, table: Tensor, reduction: str) -> Tensor:
        assert reduction == "sum"
        self.tables.append(table.clone())
        return torch.stack(self.tables).sum(dim=0)


def are_equal(one: Evaluation, other: Evaluation) -> bool:
    equal = (one.accuracy, one.loss) == (other.accuracy, other.loss)
    return equal and torch.equal(one.probabilities, other.probabilities)


@torch.no_grad()
def plain_logits(module: nn.Module, batch_size: int) -> Tensor:
    images = (DATA.images.float() / 255 - 0.5) / 0.29
    return torch.cat([module.eval()(batch) for batch in images.split(batch_size)])


@pytest.mark.parametrize("name", ["lenet5", "simple_cnn", "mnistnet"])
@pytest.mark.parametrize("batch_size", [1, 32, 75, 500])
def test_figures_equal_those_of_a_plain_loop(accelerator, name, batch_size):
    module = build(name)
    found = evaluate(accelerator, module.train(), DATA, batch_size=batch_size)
    logits = plain_logits(module, batch_size)
    assert found.accuracy == 100 * int((logits.argmax(dim=1) == DATA.labels).sum()) / COUNT
    assert found.loss == pytest.approx(F.cross_entropy(logits, DATA.labels).item(), rel=1e-5)
    assert found.probabilities.dtype == torch.float32
    torch.testing.assert_close(found.probabilities, logits.softmax(dim=1), rtol=0, atol=1e-5)


def test_every_correct_prediction_counts_once_also_in_the_short_last_batch(accelerator):
    class ReadsTheClass(nn.Module):
        """Predicts the class that is written into an image's first pixel."""

        def forward(self, images: Tensor) -> Tensor:
            levels = (images[:, 0, 0, 0] * 0.29 + 0.5) * 255
            return 20 * F.one_hot(levels.round().long(), 10).float()

    images = torch.zeros(COUNT, 1, 28, 28, dtype=torch.uint8)
    images[:, 0, 0, 0] = DATA.labels
    wrong = [0, 31, 32, 64, COUNT - 1]  # with the first and last images of batches of 32
    for row in wrong:
        images[row] = (DATA.labels[row] + 1) % 10
        data = Images(images, DATA.labels, DATA.classes, DATA.mean, DATA.std)
        found = evaluate(accelerator, ReadsTheClass(), data, batch_size=32)
        expected = COUNT - 1 - wrong.index(row)
        assert found.accuracy == 100 * expected / COUNT
    assert found.loss == pytest.approx(20 * len(wrong) / COUNT, rel=1e-4)


@pytest.mark.parametrize("name", ["lenet5", "simple_cnn"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_figures_have_the_same_bits_at_any_world_size(accelerator, name, world_size):
    # 75 images in batches of 20 are four batches, so one of five processes has none.
    module = build(name)
    expected = evaluate(accelerator, module, DATA, batch_size=20)
    tables: list[Tensor] = []
    for rank in range(world_size):
        found = evaluate(FakeProcess(rank, world_size, tables), module, DATA, batch_size=20)
    assert are_equal(found, expected)
    written = torch.stack([table.any(dim=1) for table in tables]).sum(dim=0)
    assert written.tolist() == [1] * COUNT


def test_batch_size_matters_to_a_network_that_normalises_by_the_batch(accelerator):
    module = build("simple_cnn")
    found, other = (evaluate(accelerator, module, DATA, batch_size=size) for size in (32, 33))
    assert not torch.allclose(found.probabilities, other.probabilities, atol=1e-4)


def test_an_evaluation_waits_for_the_device_once(accelerator, monkeypatch):
    calls: list[str] = []
    for name in ("cpu", "item", "tolist", "numpy", "__bool__", "__float__", "__int__"):
        method = getattr(Tensor, name)

        def spied(self, *arguments, name=name, method=method):
            calls.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(Tensor, name, spied)
    # From then on all tensors are on the CPU.
    monkeypatch.setattr("mnist_dist.engine.evaluation.score", lambda table, labels: calls.append("score"))
    evaluate(accelerator, build("lenet5"), DATA, batch_size=20)
    assert calls == ["cpu", "score"]


def test_training_modes_and_weights_do_not_change(accelerator):
    module = build("mnistnet").train()
    module.convblock1.eval()  # frozen
    modes = {name: part.training for name, part in module.named_modules()}
    assert set(modes.values()) == {True, False}
    before = {name: value.clone() for name, value in module.state_dict().items()}
    evaluate(accelerator, module, DATA, batch_size=32)
    assert {name: part.training for name, part in module.named_modules()} == modes
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_interrupted_evaluation_stops_between_batches_and_restores_training_mode(accelerator):
    module, answers = build("lenet5").train(), iter([False, False, True])
    with pytest.raises(Interrupted):
        evaluate(accelerator, module, DATA, batch_size=20, interrupted=lambda: next(answers))
    assert next(answers, None) is None
    assert module.training
