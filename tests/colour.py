"""Small colour images, and a run that is trained on them; see the fixtures `colour_data` and `colour_run`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from mnist_dist import load_recipe, train
from mnist_dist.data import DATASETS, Images
from mnist_dist.data.sources.request import Splits

CLASSES = ("red kite", "green woodpecker", "blue tit")
SHAPE = (3, 24, 40)
CODE = "tests.colour"


class ColourNet(nn.Sequential):
    """A small network for colour images of any size."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(
            nn.Conv2d(3, 12, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(12, 64, 3, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(256, num_classes),
        )


def make_images(count: int, seed: int, shape: tuple[int, int, int] = SHAPE) -> Images:
    """Returns noisy images with one bright rectangle, whose colour is the class."""
    generator = torch.Generator().manual_seed(seed)
    channels, height, width = shape
    labels = torch.arange(count) % len(CLASSES)
    images = torch.randint(0, 110, (count, channels, height, width), generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        top = int(torch.randint(0, height // 2, (), generator=generator))
        left = int(torch.randint(0, width // 2, (), generator=generator))
        image[label, top : top + height // 2, left : left + width // 2] += 90
    return Images(images.to(torch.uint8), labels, CLASSES)


@contextmanager
def as_synthetic() -> Iterator[None]:
    """Replaces the data set `synthetic` by the colour images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(DATASETS, "synthetic", lambda request: Splits(make_images(240, 0), make_images(90, 1)))
        yield


def train_on_colour(folder: Path, *overrides: str) -> None:
    """Trains a run on the colour images, with recipe keys overridden."""
    words = [f"model.name={CODE}:ColourNet", "epochs=3", "batch_size=20", "schedule.max_lr=0.01", "data.augment={}"]
    words += ["data.limit_train=null", "data.limit_test=null", "tracking.plots=false"]
    with as_synthetic():
        train(load_recipe("debug", *words, *overrides), folder)


def write_pictures(folder: Path, images: Images, count: int = 9) -> list[Path]:
    """Writes the first images as PNG files; returns their paths."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{position:03}.png" for position in range(min(count, len(images)))]
    for path, image in zip(paths, images.images, strict=False):
        levels = image.movedim(0, -1).numpy()
        Image.fromarray(levels if levels.shape[-1] == 3 else levels[..., 0]).save(path)
    return paths
