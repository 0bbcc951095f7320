"""The loops of PyTorch, Accelerate and Lightning train like each other and augment like the trainer."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torchvision import transforms

from mnist_dist.benchmark import frameworks
from mnist_dist.benchmark.baselines import BenchmarkSetup

STEPS = 40
WORDS = ("clip_grad_norm=0.5", "label_smoothing=0.1")

_losses_of_pytorch: dict[str, list[float]] = {}
"""Precision -> losses of PyTorch's loop, trained once."""


@pytest.fixture(params=["no", "bf16"])
def trained(request, setup_of, losses_of) -> tuple[BenchmarkSetup, list[float]]:
    """A setup in each precision, and the losses of PyTorch's loop."""
    setup = setup_of(f"mixed_precision={request.param}", *WORDS)
    if request.param not in _losses_of_pytorch:
        _losses_of_pytorch[request.param] = losses_of(frameworks.plain_loader(setup, 0), STEPS)
    return setup, _losses_of_pytorch[request.param]


@pytest.fixture
def lightning_loader() -> Callable:
    pytest.importorskip("lightning", reason="Lightning is not installed: pip install -e '.[frameworks]'")
    return frameworks.lightning_loader


def test_pytorchs_loop_reduces_the_loss(trained):
    _, losses = trained
    assert np.mean(losses[-4:]) < losses[0] - 0.2


def test_accelerate_trains_like_pytorch(trained, losses_of):
    setup, expected = trained
    assert losses_of(frameworks.accelerate_loader(setup, 0), STEPS) == pytest.approx(expected, rel=1e-5)


def test_lightning_trains_like_pytorch(trained, losses_of, lightning_loader):
    setup, expected = trained
    assert losses_of(lightning_loader(setup, 0), STEPS) == pytest.approx(expected, rel=1e-5)


def test_an_error_in_lightnings_thread_is_raised_in_the_main_thread(lightning_loader, setup_of, monkeypatch):
    loop = lightning_loader(setup_of(), 0)
    monkeypatch.setattr(BenchmarkSetup, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.run(1)
    loop.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "lightning"]


@pytest.mark.parametrize("sigma", [3.0, 5.0])
def test_elastic_displacements_are_as_large_as_the_trainers(sigma, setup_of):
    setup = setup_of("data.augment.elastic=1.4", f"data.augment.elastic_sigma={sigma}")
    steps = frameworks._PerImage(setup.recipe, setup.dataset.train)._transform.transforms
    [elastic] = [step for step in steps if isinstance(step, transforms.ElasticTransform)]
    torch.manual_seed(0)
    moved = torch.stack([elastic.get_params(elastic.alpha, elastic.sigma, [28, 28]) for _ in range(150)])
    pixels = moved[:, :, 10:18, 10:18] * 14  # a grid from -1 to 1; noise is reflected near the edge
    assert float(pixels.std()) == pytest.approx(1.4, rel=0.15)


CHANGES = {
    "flip": (transforms.RandomHorizontalFlip, "true"),
    "crop_padding": (transforms.RandomCrop, "4"),
    "rotation": (transforms.RandomAffine, "20"),
    "brightness": (transforms.ColorJitter, "0.5"),
    "contrast": (transforms.ColorJitter, "0.5"),
    "randaugment": (transforms.RandAugment, "[2, 20]"),
    "cutout": (transforms.RandomErasing, "8"),
}
"""Key below data.augment -> torchvision's class, and a value."""

NO_WARP = ("data.augment.rotation=0", "data.augment.translation=0")
"""Removes what the recipe `debug` has."""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", CHANGES)
def test_single_images_are_changed_as_the_recipe_asks(name, channels, setup_of):
    kind, value = CHANGES[name]
    words = [*NO_WARP, "data.augment.fill=30", f"data.augment.{name}={value}", f"data.channels={channels}"]
    setup = setup_of(*words)
    data = frameworks._PerImage(setup.recipe, setup.dataset.train)
    assert [step for step in data._transform.transforms if isinstance(step, kind)]
    torch.manual_seed(0)
    plain = setup.dataset.train.normalize(setup.dataset.train.images[:40])
    changed = [float((data[number][0] - plain[number]).abs().max()) > 0.05 for number in range(40)]
    assert data[0][0].shape == plain[0].shape and sum(changed) > 10


def test_the_squares_of_cutout_are_as_large_as_the_trainers(setup_of):
    setup = setup_of(*NO_WARP, "data.augment.cutout=8", "data.augment.fill=30")
    data = frameworks._PerImage(setup.recipe, setup.dataset.train)
    plain, level = setup.dataset.train.images[0].float(), float(setup.dataset.train.normalize(torch.tensor([30.0]))[0])
    filled = (data[0][0] - level).abs() < 1e-3
    assert 64 <= int((filled | (plain == 30)).sum()) <= 64 + int((plain == 30).sum())


def test_the_loss_has_the_class_weights_of_the_recipe(setup_of):
    weights = [1.0, *[0.5] * 9]
    setup = setup_of(f"data.class_weights={weights}", "label_smoothing=0")
    logits, labels = torch.randn(20, 10), torch.arange(20) % 10
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    own = torch.tensor(weights)[labels]
    torch.testing.assert_close(setup.loss(logits, labels), (losses * own).sum() / own.sum())
    assert setup_of().class_weights is None
