"""Data sets that need no files: scikit-learn's digits, and synthetic images."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from mnist_dist.data.images import SIDE, Images
from mnist_dist.data.sources.mnist import DIGITS


def make_digits() -> tuple[Images, Images]:
    """Returns scikit-learn's 1,797 handwritten digits of 8×8 pixels, enlarged to 28×28, as training and test set.

    Every fifth image of each class belongs to the test set (355 images).

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits come with scikit-learn: pip install "mnist_dist[demo]"') from error
    source = load_digits()
    images = torch.from_numpy(source.images).float()[:, None] * (255 / 16)  # the source has grey levels 0 to 16
    images = F.interpolate(images, size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    images, labels = images.round().to(torch.uint8), torch.from_numpy(source.target).long()
    is_test = torch.zeros(len(labels), dtype=torch.bool)
    for digit in range(10):
        is_test[(labels == digit).nonzero()[4::5]] = True
    train, test = (Images(images[chosen], labels[chosen], DIGITS) for chosen in (~is_test, is_test))
    return train, test


def make_synthetic() -> tuple[Images, Images]:
    """Returns ten fixed block patterns under noise: 4,096 training and 1,024 test images.

    A network can learn them, and their bytes are equal on every machine.
    """
    generator = torch.Generator().manual_seed(20_231)
    coarse = torch.randint(0, 256, (10, 1, 7, 7), generator=generator).float()
    patterns = coarse.repeat_interleave(4, dim=2).repeat_interleave(4, dim=3)

    def draw(count: int) -> Images:
        labels = torch.randint(0, 10, (count,), generator=generator)
        noise = torch.randint(-127, 128, (count, 1, SIDE, SIDE), generator=generator)
        return Images((patterns[labels] / 2 + noise + 64).clamp(0, 255).to(torch.uint8), labels, DIGITS)

    return draw(4096), draw(1024)
