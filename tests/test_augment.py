"""A batch of warps has torchvision's geometry image by image, stays in its ranges, and leaves alone what it should."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

from mnist_dist.data import Augmentation, normalize
from mnist_dist.data.augment import affine_grid, affine_matrices
from mnist_dist.data.batches import uniform

COUNT, SIDE = 40, 28
INTERPOLATIONS = ["nearest", "bilinear"]


def grey_images(count: int = COUNT, *, seed: int = 0) -> Tensor:
    """Noise: where a pixel comes from shows everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, SIDE, SIDE), generator=generator).float()


def random_parameters(count: int = COUNT) -> dict[str, Tensor]:
    """Degrees, whole pixels, factors and degrees; no round values, which would put nearest neighbours in a tie."""
    generator = torch.Generator().manual_seed(1)

    def between(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    return {
        "angle": between(-180, 180),
        "shift": between(-6, 6, 2).round(),
        "zoom": between(0.6, 1.7),
        "shear": between(-40, 40),
    }


def only(*kinds: str) -> dict[str, Tensor]:
    """Random parameters of the kinds given; the others do nothing."""
    nothing = {
        "angle": torch.zeros(COUNT),
        "shift": torch.zeros(COUNT, 2),
        "zoom": torch.ones(COUNT),
        "shear": torch.zeros(COUNT),
    }
    return {**nothing, **{kind: value for kind, value in random_parameters().items() if kind in kinds}}


def test_the_grid_is_pytorch_s():
    warps = warps_of(random_parameters())
    theirs = F.affine_grid(warps, [COUNT, 1, SIDE, SIDE], align_corners=False)
    torch.testing.assert_close(affine_grid(warps, SIDE), theirs, rtol=0, atol=2e-6)


def warps_of(parameters: dict[str, Tensor]) -> Tensor:
    return affine_matrices(
        torch.deg2rad(parameters["angle"]),
        parameters["shift"],
        parameters["zoom"],
        torch.tan(torch.deg2rad(parameters["shear"])),
        SIDE,
    )


def torchvision_affine(images: Tensor, parameters: dict[str, Tensor], interpolation: str) -> Tensor:
    """Each image on its own through torchvision."""
    warped = [
        TF.affine(
            image,
            angle=float(parameters["angle"][i]),
            translate=[int(shift) for shift in parameters["shift"][i]],
            scale=float(parameters["zoom"][i]),
            shear=[float(parameters["shear"][i]), 0.0],
            interpolation=InterpolationMode(interpolation),
        )
        for i, image in enumerate(images)
    ]
    return torch.stack(warped)


def assert_same_images(found: Tensor, expected: Tensor, interpolation: str) -> None:
    assert found.shape == expected.shape
    difference = (found - expected).abs()
    if interpolation == "nearest":  # a coordinate half-way between two pixels may round either way
        assert (difference > 0).double().mean() < 0.001
    else:  # a coordinate's rounding, about 1e-5 pixels, times the contrast of noise
        assert difference.max() < 0.01


# Geometry


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kinds", [("angle",), ("shift",), ("zoom",), ("shear",), ("angle", "shift", "zoom", "shear")])
def test_warps_are_torchvisions_affine(kinds, interpolation):
    images, parameters = grey_images(), only(*kinds)
    found = Augmentation(interpolation=interpolation).apply(images, warps_of(parameters))
    assert_same_images(found, torchvision_affine(images, parameters, interpolation), interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_angles_run_against_torchvisions_rotate(interpolation):
    images, parameters = grey_images(), only("angle")
    found = Augmentation(interpolation=interpolation).apply(images, warps_of(parameters))
    mode = InterpolationMode(interpolation)
    angles = parameters["angle"].tolist()
    expected = [TF.rotate(image, -angle, mode) for image, angle in zip(images, angles, strict=True)]
    assert_same_images(found, torch.stack(expected), interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_whole_pixel_translation_moves_pixels_right_and_down(interpolation):
    images = grey_images(1)
    parameters = {name: value[:1] for name, value in only().items()} | {"shift": torch.tensor([[3.0, -2.0]])}
    found = Augmentation(interpolation=interpolation).apply(images, warps_of(parameters))
    expected = torch.zeros_like(images)
    expected[..., :-2, 3:] = images[..., 2:, :-3]
    assert_same_images(found, expected, interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_fill_is_what_lies_around_the_image(interpolation):
    images, parameters, margin, fill = grey_images(), random_parameters(), 70, 200.0
    found = Augmentation(interpolation=interpolation, fill=fill).apply(images, warps_of(parameters))
    surrounded = F.pad(images, (margin,) * 4, value=fill)
    expected = torchvision_affine(surrounded, parameters, interpolation)
    expected = expected[..., margin : margin + SIDE, margin : margin + SIDE]
    assert (expected == fill).double().mean() > 0.05, "nothing came in from outside"
    assert_same_images(found, expected, interpolation)


@pytest.mark.parametrize("fill", [0.0, 77.0])
def test_identity_is_exact(fill):
    images = grey_images()
    identity = warps_of(only())
    assert torch.equal(Augmentation(fill=fill).apply(images, identity), images)
    bilinear = Augmentation(interpolation="bilinear", fill=fill).apply(images, identity)
    assert_same_images(bilinear, images, "bilinear")


# From random numbers to warps


def draws(count: int) -> Tensor:
    return uniform(0, 0, torch.arange(count), Augmentation.DRAWS)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_each_number_drawn_sets_one_parameter(interpolation):
    numbers = draws(COUNT)
    augmentation = Augmentation(rotation=30, translation=0.2, scale=(0.7, 1.4), shear=20, interpolation=interpolation)
    signed = 2 * numbers - 1
    parameters = {
        "angle": 30 * signed[:, 0],
        "shift": (0.2 * SIDE * signed[:, 1:3]).round(),
        "zoom": 0.7 + 0.7 * numbers[:, 3],
        "shear": 20 * signed[:, 4],
    }
    images = grey_images()
    found = augmentation.apply(images, augmentation.warps(numbers, SIDE))
    assert_same_images(found, torchvision_affine(images, parameters, interpolation), interpolation)


@pytest.mark.parametrize("rotation", [7.0, 180.0])
def test_angles_fill_plus_minus_rotation(rotation):
    warps = Augmentation(rotation=rotation).warps(draws(20_000), SIDE)
    angles = torch.rad2deg(torch.atan2(warps[:, 0, 1], warps[:, 0, 0]))
    assert angles.abs().max() <= rotation + 1e-4
    assert angles.max() > 0.99 * rotation
    assert angles.min() < -0.99 * rotation
    assert abs(angles.mean()) < 5 * rotation / math.sqrt(3 * 20_000)


@pytest.mark.parametrize(("translation", "most"), [(0.1, 3), (0.05, 1), (0.25, 7), (1.0, 28)])
def test_translations_are_whole_pixels_within_bounds(translation, most):
    warps = Augmentation(translation=translation).warps(draws(20_000), SIDE)
    shifts = -warps[:, :, 2] * SIDE / 2
    assert (shifts - shifts.round()).abs().max() < 1e-4
    for axis in (0, 1):
        assert shifts[:, axis].round().unique().tolist() == list(range(-most, most + 1))
    assert abs(torch.corrcoef(shifts.T)[0, 1]) < 5 / math.sqrt(20_000), "x and y move together"


def test_zooms_fill_the_scale():
    warps = Augmentation(scale=(0.8, 1.5)).warps(draws(20_000), SIDE)
    zooms = torch.linalg.det(warps[:, :, :2]).rsqrt()
    assert 0.8 - 1e-4 <= zooms.min() < 0.81
    assert 1.49 < zooms.max() <= 1.5 + 1e-4


def test_shears_fill_plus_minus_shear():
    warps = Augmentation(shear=15).warps(draws(20_000), SIDE)
    shears = torch.rad2deg(torch.atan(warps[:, 0, 1]))
    assert shears.abs().max() <= 15 + 1e-4
    assert shears.max() > 14.85
    assert shears.min() < -14.85


@pytest.mark.parametrize(
    ("keywords", "identity"),
    [
        ({}, True),
        ({"scale": (1.0, 1.0)}, True),
        ({"fill": 255.0, "interpolation": "bilinear"}, True),
        ({"rotation": 1.0}, False),
        ({"translation": 0.1}, False),
        ({"scale": (0.9, 1.0)}, False),
        ({"shear": 1.0}, False),
    ],
)
def test_is_identity_only_if_no_warp_moves_a_pixel(keywords, identity):
    assert Augmentation(**keywords).is_identity is identity


@pytest.mark.parametrize(
    ("keyword", "value"),
    [
        ("rotation", -1.0),
        ("rotation", 180.5),
        ("rotation", math.nan),
        ("translation", -0.1),
        ("translation", 1.1),
        ("scale", (0.0, 1.0)),
        ("scale", (1.2, 0.8)),
        ("shear", -1.0),
        ("shear", 90.0),
        ("interpolation", "bicubic"),
        ("fill", -1.0),
        ("fill", 256.0),
    ],
)
def test_a_value_out_of_range_is_named(keyword, value):
    with pytest.raises(ValueError, match=keyword):
        Augmentation(**{keyword: value})


# Normalisation


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_normalize_gives_mean_0_and_deviation_1_on_its_own_data(dtype):
    images = (grey_images(200) * 0.4).round()
    mean, std = float(images.mean() / 255), float(images.std(correction=0) / 255)
    found = normalize(images.to(dtype), mean, std)
    assert found.dtype == torch.float32
    assert abs(found.double().mean()) < 1e-5
    assert abs(found.double().std(correction=0) - 1) < 1e-5


def test_normalize_is_totensor_and_normalize_of_torchvision():
    images = grey_images().to(torch.uint8)
    expected = TF.normalize(images.float() / 255, [0.1307], [0.3081])
    torch.testing.assert_close(normalize(images, 0.1307, 0.3081), expected, rtol=0, atol=2e-6)
