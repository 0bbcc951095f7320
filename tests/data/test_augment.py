"""The warps of a batch equal torchvision's affine warps of each image, and their parameters stay in range."""

import math

import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

from mnist_dist.data import Augmentation
from mnist_dist.data.batches import uniform
from mnist_dist.data.warps import affine_grid, affine_matrices, elastic_shift

COUNT, SIDE = 40, 28
SIZE = (SIDE, SIDE)
INTERPOLATIONS = ["nearest", "bilinear"]


def grey_images(count: int = COUNT, *, seed: int = 0) -> Tensor:
    """Noise, (count, 1, SIDE, SIDE): a wrong source pixel shows everywhere."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 1, SIDE, SIDE), generator=generator).float()


def random_parameters(count: int = COUNT) -> dict[str, Tensor]:
    """Degrees, whole pixels, factors and degrees. Round angles would lie half-way between two nearest neighbours."""
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
    """Random parameters for the given kinds and identity for the others."""
    nothing = {
        "angle": torch.zeros(COUNT),
        "shift": torch.zeros(COUNT, 2),
        "zoom": torch.ones(COUNT),
        "shear": torch.zeros(COUNT),
    }
    return {**nothing, **{kind: value for kind, value in random_parameters().items() if kind in kinds}}


def warps_of(parameters: dict[str, Tensor]) -> Tensor:
    return affine_matrices(
        torch.deg2rad(parameters["angle"]),
        parameters["shift"],
        parameters["zoom"],
        torch.tan(torch.deg2rad(parameters["shear"])),
        SIZE,
    )


def torchvision_affine(images: Tensor, parameters: dict[str, Tensor], interpolation: str) -> Tensor:
    """Warps each image alone with torchvision."""
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


# --- geometry -----------------------------------------------------------------------------------------------------


def test_affine_grid_equals_pytorchs():
    warps = warps_of(random_parameters())
    expected = F.affine_grid(warps, [COUNT, 1, SIDE, SIDE], align_corners=False)
    torch.testing.assert_close(affine_grid(warps, SIZE), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
@pytest.mark.parametrize("kinds", [("angle",), ("shift",), ("zoom",), ("shear",), ("angle", "shift", "zoom", "shear")])
def test_warps_equal_torchvisions_affine(kinds, interpolation):
    images, parameters = grey_images(), only(*kinds)
    found = Augmentation(interpolation=interpolation).warp(images, warps_of(parameters))
    assert_same_images(found, torchvision_affine(images, parameters, interpolation), interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_angles_are_opposite_to_torchvisions_rotate(interpolation):
    images, parameters = grey_images(), only("angle")
    found = Augmentation(interpolation=interpolation).warp(images, warps_of(parameters))
    mode = InterpolationMode(interpolation)
    angles = parameters["angle"].tolist()
    expected = [TF.rotate(image, -angle, mode) for image, angle in zip(images, angles, strict=True)]
    assert_same_images(found, torch.stack(expected), interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_whole_pixel_translation_moves_pixels_right_and_down(interpolation):
    images = grey_images(1)
    parameters = {name: value[:1] for name, value in only().items()} | {"shift": torch.tensor([[3.0, -2.0]])}
    found = Augmentation(interpolation=interpolation).warp(images, warps_of(parameters))
    expected = torch.zeros_like(images)
    expected[..., :-2, 3:] = images[..., 2:, :-3]
    assert_same_images(found, expected, interpolation)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_pixels_from_outside_the_image_have_the_fill_level(interpolation):
    images, parameters, margin, fill = grey_images(), random_parameters(), 70, 200.0
    found = Augmentation(interpolation=interpolation, fill=fill).warp(images, warps_of(parameters))
    surrounded = F.pad(images, (margin,) * 4, value=fill)
    expected = torchvision_affine(surrounded, parameters, interpolation)
    expected = expected[..., margin : margin + SIDE, margin : margin + SIDE]
    assert (expected == fill).double().mean() > 0.05, "no pixel comes from outside the image"
    assert_same_images(found, expected, interpolation)


@pytest.mark.parametrize("fill", [0.0, 77.0])
def test_the_identity_changes_nothing(fill):
    images = grey_images()
    identity = warps_of(only())
    assert torch.equal(Augmentation(fill=fill).warp(images, identity), images)
    bilinear = Augmentation(interpolation="bilinear", fill=fill).warp(images, identity)
    assert_same_images(bilinear, images, "bilinear")


# --- from random numbers to warps ---------------------------------------------------------------------------------


def draws(count: int) -> Tensor:
    return uniform(0, 0, torch.arange(count), Augmentation.WARP_DRAWS)


@pytest.mark.parametrize("interpolation", INTERPOLATIONS)
def test_each_random_number_sets_one_parameter(interpolation):
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
    found = augmentation.warp(images, augmentation.warps(numbers, SIZE))
    assert_same_images(found, torchvision_affine(images, parameters, interpolation), interpolation)


@pytest.mark.parametrize("rotation", [7.0, 180.0])
def test_angles_cover_plus_minus_rotation(rotation):
    warps = Augmentation(rotation=rotation).warps(draws(20_000), SIZE)
    angles = torch.rad2deg(torch.atan2(warps[:, 0, 1], warps[:, 0, 0]))
    assert angles.abs().max() <= rotation + 1e-4
    assert angles.max() > 0.99 * rotation
    assert angles.min() < -0.99 * rotation
    assert abs(angles.mean()) < 5 * rotation / math.sqrt(3 * 20_000)


@pytest.mark.parametrize(("translation", "most"), [(0.1, 3), (0.05, 1), (0.25, 7), (1.0, 28)])
def test_translations_are_whole_pixels_within_their_range(translation, most):
    warps = Augmentation(translation=translation).warps(draws(20_000), SIZE)
    shifts = -warps[:, :, 2] * SIDE / 2
    assert (shifts - shifts.round()).abs().max() < 1e-4
    for axis in (0, 1):
        assert shifts[:, axis].round().unique().tolist() == list(range(-most, most + 1))
    assert abs(torch.corrcoef(shifts.T)[0, 1]) < 5 / math.sqrt(20_000), "the shifts along x and y are correlated"


def test_zooms_cover_the_scale():
    warps = Augmentation(scale=(0.8, 1.5)).warps(draws(20_000), SIZE)
    zooms = torch.linalg.det(warps[:, :, :2]).rsqrt()
    assert 0.8 - 1e-4 <= zooms.min() < 0.81
    assert 1.49 < zooms.max() <= 1.5 + 1e-4


def test_shears_cover_plus_minus_shear():
    warps = Augmentation(shear=15).warps(draws(20_000), SIZE)
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
        ({"elastic_sigma": 9.0}, True),
        ({"elastic": 0.1}, False),
    ],
)
def test_is_identity_if_and_only_if_no_warp_moves_a_pixel(keywords, identity):
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
        ("elastic", -1.0),
        ("elastic", math.inf),
        ("elastic_sigma", 2.9),
        ("elastic_sigma", math.nan),
    ],
)
def test_the_error_names_the_value_out_of_range(keyword, value):
    with pytest.raises(ValueError, match=keyword):
        Augmentation(**{keyword: value})


# --- elastic warps ------------------------------------------------------------------------------------------------

ELASTIC = Augmentation(elastic=1.4, elastic_sigma=4.0, interpolation="bilinear")


def elastic_draws(augmentation: Augmentation, count: int) -> Tensor:
    return uniform(0, 0, torch.arange(count), augmentation.count_draws(SIZE))


def elastic_shifts(augmentation: Augmentation, count: int) -> Tensor:
    """Displacements in pixels, (count, SIDE, SIDE, 2)."""
    knots = augmentation.warps(elastic_draws(augmentation, count), SIZE)[:, :, 3:]
    return elastic_shift(knots, SIZE, augmentation.elastic_sigma).double() * SIDE / 2


def test_displacements_have_the_given_deviation_and_correlate_between_neighbours():
    count = 4000
    for augmentation in (ELASTIC, Augmentation(elastic=0.5, elastic_sigma=7.0)):
        moved = elastic_shifts(augmentation, count)
        assert abs(moved.mean(dim=0)).max() < 6 * augmentation.elastic / math.sqrt(count)
        deviations = moved.std(dim=0) / augmentation.elastic
        assert (deviations - 1).abs().max() < 6 / math.sqrt(2 * count)
        # The correlation is the overlap of two Gaussians of width sigma, one at each pixel; x and y are independent.
        for distance in (2, 5, 9):
            along = torch.corrcoef(moved[:, 14, [9, 9 + distance], 0].T)[0, 1]
            assert along == pytest.approx(math.exp(-(distance**2) / (4 * augmentation.elastic_sigma**2)), abs=0.06)
        assert abs(torch.corrcoef(moved[:, 14, 14].T)[0, 1]) < 5 / math.sqrt(count)


def test_an_elastic_warp_moves_pixels_by_its_displacements():
    # On a ramp, a displacement along x is a change of grey level.
    ramp = torch.arange(SIDE).float().expand(1, 1, SIDE, SIDE)
    warps = ELASTIC.warps(elastic_draws(ELASTIC, 30), SIZE)
    found = ELASTIC.warp(ramp.expand(30, 1, SIDE, SIDE), warps)
    expected = ramp[0] + elastic_shifts(ELASTIC, 30)[..., 0]
    inside = (slice(None), 0, slice(7, -7), slice(7, -7))
    torch.testing.assert_close(found[inside].double(), expected[:, 7:-7, 7:-7], rtol=0, atol=1e-3)


def test_the_elastic_displacement_is_added_to_the_affine_warp():
    rotated = Augmentation(rotation=30, elastic=1e-6, interpolation="bilinear")
    numbers, images = elastic_draws(rotated, COUNT), grey_images()
    plain = Augmentation(rotation=30, interpolation="bilinear")
    expected = plain.warp(images, plain.warps(numbers[:, : plain.WARP_DRAWS], SIZE))
    assert_same_images(rotated.warp(images, rotated.warps(numbers, SIZE)), expected, "bilinear")


def test_the_elastic_warp_of_a_sample_is_the_same_in_any_batch():
    images, numbers = grey_images(), elastic_draws(ELASTIC, COUNT)
    at_once = ELASTIC.warp(images, ELASTIC.warps(numbers, SIZE))
    for size in (1, 7, 16):
        parts = zip(images.split(size), numbers.split(size), strict=True)
        found = torch.cat([ELASTIC.warp(part, ELASTIC.warps(draws, SIZE)) for part, draws in parts])
        torch.testing.assert_close(found, at_once, rtol=0, atol=0.01)
    assert (at_once - images).abs().mean() > 20


def test_affine_warps_do_not_depend_on_the_elastic_parameters():
    plain = Augmentation(rotation=10, shear=5)
    for other in (Augmentation(rotation=10, shear=5, elastic=0.0, elastic_sigma=9.0), plain):
        assert other.count_draws(SIZE) == Augmentation.WARP_DRAWS
        assert torch.equal(other.warps(draws(COUNT), SIZE), plain.warps(draws(COUNT), SIZE))
        assert other.warps(draws(COUNT), SIZE).shape == (COUNT, 2, 3)
    # The affine random numbers of a sample are the same with and without elastic ones after them.
    with_elastic = Augmentation(rotation=10, shear=5, elastic=1.0)
    assert torch.equal(
        with_elastic.warps(elastic_draws(with_elastic, COUNT), SIZE)[:, :, :3], plain.warps(draws(COUNT), SIZE)
    )
