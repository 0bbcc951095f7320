"""Normalisation of images and the statistics behind it."""

import pytest
import torch
import torchvision.transforms.functional as TF
from torch import Tensor

from mnist_dist.data import Images, load_dataset, normalize
from mnist_dist.data.images import level_statistics


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
    assert level_statistics(images) == ((0.75,), (0.433,))


def colour_images() -> Tensor:
    """Three channels of different brightness and contrast, not square, and a set that is counted in several chunks."""
    levels = torch.randint(0, 100, (300, 3, 6, 9), generator=torch.Generator().manual_seed(0))
    return (levels * torch.tensor([0.5, 1, 2]).view(3, 1, 1) + torch.tensor([90, 0, 40]).view(3, 1, 1)).to(torch.uint8)


def test_each_channel_has_its_own_statistics(monkeypatch):
    images = colour_images()
    fractions = images.double().transpose(0, 1).flatten(1) / 255
    found = fractions.mean(1), fractions.std(1, correction=0)
    expected = [tuple(round(float(each), 4) for each in channels) for channels in found]
    monkeypatch.setattr("mnist_dist.data.images.CHUNK", 1000)
    assert level_statistics(images) == tuple(expected)


def test_a_channel_of_one_level_does_not_divide_by_zero():
    images = torch.zeros(5, 3, 4, 4, dtype=torch.uint8)
    images[:, 0] = colour_images()[:5, 0, :4, :4]
    mean, std = level_statistics(images)
    assert std[1:] == (1.0, 1.0) and torch.isfinite(normalize(images, mean, std)).all()


def test_each_channel_is_normalised_as_torchvision_does():
    images = colour_images()
    data = Images(images, torch.zeros(300).long(), ("a",), *level_statistics(images))
    assert data.shape == (3, 6, 9)
    expected = TF.normalize(images.float() / 255, list(data.mean), list(data.std))
    torch.testing.assert_close(data.normalize(images), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(data.normalize(images[0]), expected[0], rtol=0, atol=2e-6)


def test_one_channel_is_normalised_with_the_same_bits_as_ever():
    images = grey_images(40)
    expected = (images - 255 * 0.1307) * (1 / (255 * 0.3081))
    for mean, std in ((0.1307, 0.3081), ((0.1307,), (0.3081,)), ([0.1307], [0.3081])):
        assert torch.equal(normalize(images, mean, std), expected)


def test_the_statistics_of_three_channels_can_be_traced():
    """While a program is traced, tensors may be fake; none of them may stay in the cache."""
    images = colour_images()[:2]
    mean, std = (0.2, 0.3, 0.4), (0.5, 0.6, 0.7)

    class Normalized(torch.nn.Module):
        def forward(self, levels: Tensor) -> Tensor:
            return normalize(levels, mean, std)

    batch = ({0: torch.export.Dim("batch")},)
    program = torch.export.export(Normalized(), (images,), dynamic_shapes=batch, strict=False)
    assert torch.equal(program.module()(images), normalize(images, mean, std))


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
