"""Normalisation of images and the statistics behind it."""

import pytest
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from mnist_dist.data import load_dataset, normalize
from mnist_dist.data.images import grey_level_statistics


def grey_images(count: int) -> Tensor:
    return torch.randint(0, 256, (count, 1, 28, 28), generator=torch.Generator().manual_seed(0)).float()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_gives_mean_0_and_deviation_1_on_its_own_data(dtype):
    images = (grey_images(200) * 0.4).round()
    mean, std = float(images.mean() / 255), float(images.std(correction=0) / 255)
    found = normalize(images.to(dtype), mean, std)
    assert found.dtype == torch.float32
    assert abs(found.double().mean()) < 1e-5
    assert abs(found.double().std(correction=0) - 1) < 1e-5


def test_normalize_equals_torchvisions_to_tensor_and_normalize():
    images = grey_images(40).to(torch.uint8)
    expected = TF.normalize(images.float() / 255, [0.1307], [0.3081])
    torch.testing.assert_close(normalize(images, 0.1307, 0.3081), expected, rtol=0, atol=2e-6)


def test_statistics_of_known_images():
    images = torch.tensor([0, 255, 255, 255], dtype=torch.uint8).view(1, 1, 2, 2)
    assert grey_level_statistics(images) == (0.75, 0.433)


def test_a_data_set_normalises_with_its_own_statistics():
    train = load_dataset("synthetic").train
    normalised = train.normalize(train.images)
    assert normalised.dtype == torch.float32
    assert abs(normalised.double().mean()) < 1e-3  # the statistics are rounded to four decimals
    assert abs(normalised.double().std() - 1) < 1e-3


def test_slicing_and_moving_keep_classes_and_statistics():
    test = load_dataset("synthetic", limit_test=20).test
    part = test[5:9].to("meta")
    assert len(part) == 4 and part.images.device.type == part.labels.device.type == "meta"
    assert (part.classes, part.mean, part.std) == (test.classes, test.mean, test.std)
