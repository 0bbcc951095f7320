"""Flips, crops, colours, cutout, RandAugment and mixtures are torchvision's, for any channels and size."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2 as transforms
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode

from mnist_dist.data import Augmentation, Batches, Images, Loader, colours, mixing
from mnist_dist.data.augment import OTHERS, crop_and_flip, cut_out
from mnist_dist.data.batches import piece, uniform
from mnist_dist.data.randaugment import OPERATIONS, _between, apply_operation
from mnist_dist.data.warps import affine_matrices

COUNT, HEIGHT, WIDTH = 24, 20, 28
SIZE = (HEIGHT, WIDTH)
CHANNELS = [1, 3]
EVERYTHING = {
    "flip": True, "crop_padding": 4, "rotation": 10.0, "translation": 0.1, "elastic": 1.0, "brightness": 0.4,
    "contrast": 0.4, "saturation": 0.4, "randaugment": (2, 9), "cutout": 6, "mixup": 0.4, "cutmix": 1.0,
}  # fmt: skip


def noise(channels: int = 3, count: int = COUNT) -> Tensor:
    """uint8 (count, channels, HEIGHT, WIDTH), with a different range of levels in every image and channel."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, channels, HEIGHT, WIDTH), generator=generator)
    low, share = (torch.rand(count, channels, 1, 1, generator=generator) for _ in range(2))
    return (120 * low + images * share / 2).to(torch.uint8)


def drawn(augmentation: Augmentation, count: int = COUNT, size: tuple[int, int] = SIZE) -> Tensor:
    numbers = uniform(3, 1, torch.arange(count), augmentation.count_draws(size), augmentation.first_draw)
    return augmentation.changes(numbers, size)


# --- crop, flip, cutout -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("padding", [0, 4, HEIGHT - 1])
def test_crop_and_flip_are_torchvisions(channels, padding):
    images = noise(channels)
    generator = torch.Generator().manual_seed(1)
    rows, columns = torch.randint(0, 2 * padding + 1, (2, COUNT), generator=generator)
    rows[0], columns[0], rows[1], columns[1] = 0, 2 * padding, 2 * padding, 0
    flip = torch.rand(COUNT, generator=generator) < 0.5
    found = crop_and_flip(images, rows.float(), columns.float(), padding, flip)
    for number, image in enumerate(images):
        padded = TF.pad(image, [padding], padding_mode="reflect") if padding else image
        expected = TF.crop(padded, int(rows[number]), int(columns[number]), HEIGHT, WIDTH)
        assert torch.equal(found[number], TF.horizontal_flip(expected) if flip[number] else expected)


@pytest.mark.parametrize("fill", [0.0, 77.0, [10.0, 20.0, 30.0]])
def test_cutout_is_torchvisions_erase(fill):
    images = noise().float()
    top, left = torch.arange(COUNT).float() - 3, 2 * torch.arange(COUNT).float() - 4
    found = cut_out(images, torch.stack([top, left], dim=1), 6, fill)
    level = torch.tensor(fill).view(-1, 1, 1)
    for number, image in enumerate(images):
        first = [max(0, int(each[number])) for each in (top, left)]
        size = [max(0, int(each[number]) + 6 - start) for each, start in zip((top, left), first, strict=True)]
        assert torch.equal(found[number], TF.erase(image, *first, *size, level))


# --- colours ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation"])
def test_colours_are_torchvisions(channels, name):
    images, factors = noise(channels).float(), torch.linspace(0.0, 2.0, COUNT)
    found = getattr(colours, f"adjust_{name}")(images, factors)
    expected = [
        getattr(TF, f"adjust_{name}")(image / 255, float(factor)) for image, factor in zip(images, factors, strict=True)
    ]
    torch.testing.assert_close(found / 255, torch.stack(expected), rtol=0, atol=1e-5)
    assert (found - images).abs().max() > 20 or (name, channels) == ("saturation", 1)


def torchvision_operation(image: Tensor, name: str, magnitude: int, sign: float, fill: list[float]) -> Tensor:
    transform = transforms.RandAugment()
    values, signed = transform._AUGMENTATION_SPACE[name]
    table = values(31, HEIGHT, WIDTH)
    amount = 0.0 if table is None else float(table[magnitude]) * (sign if signed else 1)
    return transform._apply_image_or_video_transform(
        image, name, amount, interpolation=InterpolationMode.NEAREST, fill={torch.Tensor: fill}
    )


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("magnitude", [0, 9, 17, 30])
def test_every_operation_of_randaugment_is_torchvisions(name, channels, magnitude):
    images, number = noise(channels), OPERATIONS.index(name)
    images[0] = 9  # no contrast to stretch
    numbers, signs = torch.full((COUNT,), float(number)), torch.tensor([-1.0, 1.0]).repeat(COUNT // 2)
    fill = [40.0, 50.0, 60.0][:channels]
    found = apply_operation(images.float(), numbers, signs, magnitude, "nearest", fill)
    expected = torch.stack(
        [
            torchvision_operation(image, name, magnitude, float(sign), fill)
            for image, sign in zip(images, signs, strict=True)
        ]
    )
    difference = (found - expected.float()).abs()
    assert (difference > 1).double().mean() < 0.002, name  # a coordinate may be rounded to the other one of two pixels
    assert (difference > 0).double().mean() < 0.02, name  # a sum may be rounded to the other side of a whole level


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.3), (0.0, 0.9), (1.0, 0.0), (0.0, 150 / 331 * WIDTH)])
def test_magnitudes_are_those_of_torchvision(low, high):
    found = [_between(low, high, magnitude) for magnitude in range(31)]
    assert found == pytest.approx(torch.linspace(low, high, 31).tolist(), rel=1e-6)
    assert [int(each) for each in found] == [int(each) for each in torch.linspace(low, high, 31)]


def test_the_operations_are_those_of_torchvision():
    assert list(transforms.RandAugment._AUGMENTATION_SPACE) == list(OPERATIONS)


def test_each_image_has_its_own_operation():
    images = noise().float()
    numbers, signs = (torch.arange(COUNT) % len(OPERATIONS)).float(), torch.ones(COUNT)
    found = apply_operation(images, numbers, signs, 17, "nearest", 0.0)
    for each in range(COUNT):
        alone = slice(each, each + 1)
        expected = apply_operation(images[alone], numbers[alone], signs[alone], 17, "nearest", 0.0)
        assert torch.equal(found[alone], expected), OPERATIONS[int(numbers[each])]


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_operations_of_the_images_that_drew_them_equal_those_of_all_images(monkeypatch, channels, interpolation):
    images, computed = noise(channels, 300).float(), []
    numbers, signs = (torch.arange(300) * 5 % 13).float(), torch.tensor([-1.0, 1.0]).repeat(150)  # 13, Equalize, never
    equalize = colours.equalize
    monkeypatch.setattr(colours, "equalize", lambda images: computed.append(len(images)) or equalize(images))
    found = apply_operation(images, numbers, signs, 13, interpolation, 9.0)
    assert not computed
    monkeypatch.setattr("torch.compiler.is_compiling", lambda: True)
    assert torch.equal(apply_operation(images, numbers, signs, 13, interpolation, 9.0), found)
    assert computed == [300]


# --- warps of other sizes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
@pytest.mark.parametrize("fill", [0.0, [200.0, 100.0, 0.0]])
def test_warps_of_any_size_are_torchvisions(channels, interpolation, fill):
    images, generator = noise(channels).float(), torch.Generator().manual_seed(1)
    angle, zoom, shear = (torch.rand(COUNT, generator=generator) for _ in range(3))
    angle, zoom, shear = 50 * angle - 25, 0.7 + zoom, 30 * shear - 15
    shift = torch.randint(-5, 6, (COUNT, 2), generator=generator).float()
    warps = affine_matrices(angle.deg2rad(), shift, zoom, shear.deg2rad().tan(), SIZE)
    fill = fill[:channels] if isinstance(fill, list) else fill
    found = Augmentation(interpolation=interpolation, fill=fill).warp(images, warps)
    levels, margin = torch.tensor(fill).expand(channels).view(-1, 1, 1), 40
    for number, image in enumerate(images):
        # torchvision mixes the fill into the pixels at the border in another way: surround the image with it.
        wide = levels.expand(channels, HEIGHT + 2 * margin, WIDTH + 2 * margin).clone()
        wide[:, margin : margin + HEIGHT, margin : margin + WIDTH] = image
        expected = TF.affine(
            wide, float(angle[number]), shift[number].int().tolist(), float(zoom[number]), [float(shear[number]), 0.0],
            InterpolationMode(interpolation), fill=levels.flatten().tolist(),
        )[:, margin : margin + HEIGHT, margin : margin + WIDTH]  # fmt: skip
        difference = (found[number] - expected).abs()
        assert (difference > 0.02).double().mean() < 0.004, number


def test_shifts_and_elastic_displacements_are_in_pixels_along_both_sides():
    warps = drawn(Augmentation(translation=0.25), 4000).view(4000, 2, 3)
    pixels = -warps[:, :, 2] * torch.tensor([WIDTH / 2, HEIGHT / 2])
    assert [float(each) for each in pixels.abs().amax(dim=0).round()] == [0.25 * WIDTH, 0.25 * HEIGHT]
    knots = drawn(Augmentation(elastic=1.5), 4000).view(4000, 2, -1)[:, :, 3:]
    for axis, side in enumerate((WIDTH, HEIGHT)):
        assert float(knots[:, axis].std()) * side / 2 == pytest.approx(1.5, rel=0.02)


# --- mixtures -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.1, 0.2, 0.5, 1.0, 2.0, 8.0, 100.0])
def test_shares_have_the_beta_distribution(alpha):
    draws = (torch.arange(200_000) + 0.5) / 200_000
    found = mixing.beta_quantiles(draws, alpha).double()
    assert found.min() >= 0 and found.max() <= 1 and (found.diff() >= 0).all()
    # The mean, the variance and the fourth central moment of Beta(a, a).
    assert float(found.mean()) == pytest.approx(0.5, abs=1e-4)
    assert float(((found - 0.5) ** 2).mean()) == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=2e-3)
    fourth = 3 / (16 * (2 * alpha + 1) * (2 * alpha + 3))
    assert float(((found - 0.5) ** 4).mean()) == pytest.approx(fourth, rel=5e-3)
    edges = mixing.beta_quantiles(torch.tensor([0.0, 0.5, 1 - 2**-24]), alpha)
    assert edges.isfinite().all() and float(edges[1]) == pytest.approx(0.5)


def test_cutmix_is_torchvisions():
    images, labels = noise().float(), torch.arange(COUNT) % 7
    augmentation = Augmentation(cutmix=1.0)
    changes = drawn(augmentation)
    found = augmentation.mix(images, images.roll(1, 0), changes)
    targets = augmentation.mix_labels(labels, labels.roll(1, 0), changes, 7)
    transform = transforms.CutMix(num_classes=7)
    draws = uniform(3, 1, torch.arange(COUNT), 12, -12)
    shares, areas = mixing.beta_quantiles(draws[:, -9], 1.0), set()
    for number in range(COUNT):
        radius = 0.5 * math.sqrt(1 - float(shares[number]))
        x, y = int(draws[number, -11] * WIDTH), int(draws[number, -10] * HEIGHT)
        half = int(radius * WIDTH), int(radius * HEIGHT)
        box = (max(0, x - half[0]), max(0, y - half[1]), min(WIDTH, x + half[0]), min(HEIGHT, y + half[1]))
        area = (box[2] - box[0]) * (box[3] - box[1]) / (WIDTH * HEIGHT)
        parameters = {"box": box, "lam_adjusted": 1 - area, "labels": labels, "batch_size": COUNT}
        assert torch.equal(found[number], transform.transform(images, parameters)[number])
        torch.testing.assert_close(targets[number], transform.transform(labels, parameters)[number], rtol=0, atol=1e-6)
        areas.add(area)
    assert len(areas) > COUNT // 2


def test_mixup_is_torchvisions():
    images, labels = noise().float(), torch.arange(COUNT) % 7
    augmentation = Augmentation(mixup=0.7)
    changes = drawn(augmentation)
    found = augmentation.mix(images, images.roll(1, 0), changes)
    targets = augmentation.mix_labels(labels, labels.roll(1, 0), changes, 7)
    shares = mixing.beta_quantiles(uniform(3, 1, torch.arange(COUNT), 12, -12)[:, -9], 0.7)
    transform = transforms.MixUp(num_classes=7)
    for number in range(COUNT):
        parameters = {"lam": float(shares[number]), "labels": labels, "batch_size": COUNT}
        torch.testing.assert_close(found[number], transform.transform(images, parameters)[number], rtol=0, atol=1e-3)
        torch.testing.assert_close(targets[number], transform.transform(labels, parameters)[number], rtol=0, atol=1e-6)


def test_with_both_methods_each_image_gets_one():
    changes = drawn(Augmentation(mixup=1.0, cutmix=1.0), 2000)
    boxes = changes[:, Augmentation.SIMPLE :][:, 1:5].any(dim=1)
    assert 0.4 < float(boxes.double().mean()) < 0.6


def test_soft_targets_give_the_mean_of_both_losses():
    logits = torch.randn(COUNT, 7, generator=torch.Generator().manual_seed(0))
    labels, partners = torch.arange(COUNT) % 7, torch.arange(COUNT) * 3 % 7
    augmentation = Augmentation(mixup=1.0)
    changes = drawn(augmentation)
    weight = changes[:, Augmentation.SIMPLE + mixing.COLUMNS - 1]
    expected = weight * F.cross_entropy(logits, labels, reduction="none")
    expected += (1 - weight) * F.cross_entropy(logits, partners, reduction="none")
    found = F.cross_entropy(logits, augmentation.mix_labels(labels, partners, changes, 7), reduction="sum")
    torch.testing.assert_close(found, expected.sum())


# --- batches ------------------------------------------------------------------------------------------------------


def colour_set(count: int) -> Images:
    return Images(noise(3, count), torch.arange(count) % 5, tuple("abcde"), (0.5,) * 3, (0.3,) * 3)


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_batches_are_the_same_at_every_number_of_processes(world_size, ahead):
    data = colour_set(50)
    batches = Batches(50, 16, 3, data.shape, Augmentation(**EVERYTHING))
    loaders = [
        Loader(data, lambda size, rank=rank: piece(size, rank, world_size), ahead=ahead) for rank in range(world_size)
    ]
    for index in range(batches.steps_per_epoch):
        parts = [loader.load(batches, batches.plan(1), index) for loader in loaders]
        images = torch.cat([batches.augmented(part) for part in parts])
        targets = torch.cat([batches.targets(part, 5) for part in parts])
        whole = Loader(data, range).load(batches, batches.plan(1), index)
        changed = (images - batches.augmented(whole)).abs() > 0.02
        assert changed.double().mean() < 1e-3  # nearest neighbours of a coordinate half-way between two pixels
        assert torch.equal(targets, batches.targets(whole, 5))
        rows = batches.rows(batches.plan(1), index)
        assert torch.equal(whole.partner.images, data.images[rows.roll(1)])
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(len(rows)))


def test_a_partner_is_changed_once(monkeypatch):
    data, apply, counts = colour_set(50), Augmentation.apply, []
    batches = Batches(50, 16, 3, data.shape, Augmentation(**{**EVERYTHING, "rotation": 0.0, "elastic": 0.0}))
    batch = Loader(data, range).load(batches, batches.plan(1), 0)
    own, partners = (apply(batches.augmentation, each.images, each.changes) for each in (batch, batch.partner))
    monkeypatch.setattr(Augmentation, "apply", lambda *arguments: counts.append(len(arguments[1])) or apply(*arguments))
    found = batches.augmented(batch)
    assert counts == [17]
    assert torch.equal(found, batches.augmentation.mix(own, partners, batch.changes))
    pieces = torch.cat([batches.augmented(part) for part in batch.split(3)])
    assert torch.equal(pieces, found) and counts == [17, 7, 6, 6]
    empty = Loader(data, lambda size: range(size, size)).load(batches, batches.plan(1), 0)
    assert batches.augmented(empty).shape == (0, *data.shape) and batches.targets(empty, 5).shape == (0, 5)


def test_changes_of_one_key_do_not_depend_on_the_other_keys():
    rows = torch.arange(40)

    def changes(**words: object) -> Tensor:
        return Batches(40, 8, 3, (3, *SIZE), Augmentation(**words)).changes(0, rows)

    every = changes(**EVERYTHING)
    warp = changes(**{name: value for name, value in EVERYTHING.items() if name not in OTHERS})
    assert torch.equal(every[:, -warp.shape[1] :], warp)
    flip = changes(flip=True)
    assert torch.equal(every[:, 0], flip[:, 0]) and 10 < int(flip[:, 0].sum()) < 30
    same = (changes(cutmix=1.0, randaugment=(1, 3))[:, 9:14] == every[:, 9:14]).all(dim=1)
    assert 10 < int(same.sum()) < 30, "half of the images have cutmix, with the same boxes"


@pytest.mark.parametrize("name", [*OTHERS, "rotation", "translation", "elastic"])
def test_every_change_shows_and_stays_in_range(name):
    images = noise(3, 200)
    augmentation = Augmentation(**{name: EVERYTHING[name]}, interpolation="bilinear")
    batches = Batches(200, 200, 0, (3, *SIZE), augmentation)
    batch = Loader(Images(images, torch.zeros(200, dtype=torch.int64), ("a",)), range).load(batches, batches.plan(0), 0)
    found = batches.augmented(batch)
    assert found.dtype == torch.float32 and found.shape == images.shape
    changed = (found - batch.images).abs().amax(dim=(1, 2, 3)) > 0.5
    assert float(changed.double().mean()) > (0.4 if name == "flip" else 0.7)
    assert found.min() >= -0.01 and found.max() <= 255.01


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "words", "names"),
    [
        ((3, 20, 28), {"crop_padding": 19, "cutout": 20, "fill": [1.0, 2.0, 3.0]}, []),
        ((3, 20, 28), {"crop_padding": 20, "cutout": 21, "fill": [1.0, 2.0]}, ["fill", "crop_padding", "cutout"]),
        ((1, 28, 20), {"crop_padding": 20, "fill": [1.0, 2.0, 3.0]}, ["fill", "crop_padding"]),
        ((3, 8, 8), {"fill": 9.0}, []),
    ],
)
def test_values_that_do_not_fit_the_images_are_named(shape, words, names):
    assert [name for name, _ in Augmentation(**words).misfits(shape)] == names


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("crop_padding", -1), ("cutout", -1), ("brightness", 1.1), ("contrast", -0.1), ("saturation", math.nan),
        ("mixup", -1.0), ("cutmix", 101.0), ("randaugment", (0, 9)), ("randaugment", (2, 31)), ("fill", []),
        ("fill", [1.0, 256.0]),
    ],
)  # fmt: skip
def test_the_error_names_the_value_out_of_range(name, value):
    with pytest.raises(ValueError, match=name):
        Augmentation(**{name: value})
