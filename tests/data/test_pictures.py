"""Pictures of a figure in any size, colour and file format give the same image in the format of MNIST."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_dist.data import load_dataset
from mnist_dist.data.geometry import Geometry, measure_geometry, read_geometry
from mnist_dist.data.pictures import prepare_picture, read_picture


@pytest.fixture(scope="module")
def seven() -> np.ndarray:
    """The digit 7, uint8 (28, 28), bright on dark as in MNIST."""
    image = np.zeros((28, 28), dtype=np.uint8)
    image[5:8, 6:22] = 255
    for row in range(8, 25):
        column = 20 - (row - 8) // 2
        image[row, column - 3 : column] = 255
    return image


def variants(figure: np.ndarray) -> Iterator[tuple[str, Image.Image]]:
    """The same figure in other sizes, colours, positions and pixel formats."""
    large = Image.fromarray(figure).resize((280, 280), Image.Resampling.BICUBIC)
    paper = Image.fromarray(255 - np.asarray(large))
    yield "large", large
    yield "dark on light", paper
    yield "off centre", on_sheet(paper, (700, 500), (30, 200))
    yield "wide", on_sheet(paper, (900, 300), (600, 10))
    blue = np.where(np.asarray(paper)[..., None] > 127, [250, 240, 200], [20, 30, 120])
    yield "blue on yellow", Image.fromarray(blue.astype(np.uint8))
    yield "faint", Image.fromarray((200 - np.asarray(large, dtype=np.float32) * 0.3).astype(np.uint8))
    clear = np.zeros((280, 280, 4), dtype=np.uint8)
    clear[..., 3] = np.asarray(large)
    yield "black on transparent", Image.fromarray(clear)
    clear = clear.copy()
    clear[..., :3] = 255
    yield "white on transparent", Image.fromarray(clear)
    yield "palette", paper.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    yield "one bit", paper.convert("1")
    yield "sixteen bits", Image.fromarray(np.asarray(paper).astype(np.uint16) * 257)


def on_sheet(picture: Image.Image, size: tuple[int, int], position: tuple[int, int]) -> Image.Image:
    sheet = Image.new("L", size, 255)
    sheet.paste(picture, position)
    return sheet


NAMES = ["large", "dark on light", "off centre", "wide", "blue on yellow", "faint", "black on transparent"]
NAMES += ["white on transparent", "palette", "one bit", "sixteen bits"]


@pytest.mark.parametrize("name", NAMES)
def test_every_variant_of_a_figure_gives_the_same_image(tmp_path, seven, name):
    Image.fromarray(seven).save(tmp_path / "plain.png")
    dict(variants(seven))[name].save(tmp_path / "variant.png")
    plain, variant = (read_picture(tmp_path / f"{each}.png").float() for each in ("plain", "variant"))
    assert variant.shape == (1, 28, 28)
    assert torch.corrcoef(torch.stack([plain.flatten(), variant.flatten()]))[0, 1] > 0.93


def test_the_orientation_in_a_photos_exif_data_is_applied(tmp_path, seven):
    upright = Image.fromarray(255 - np.kron(seven, np.ones((10, 10), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotate by 90 degrees clockwise for display
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright.save(tmp_path / "upright.jpg", quality=95)
    turned, plain = (read_picture(tmp_path / f"{name}.jpg").float() for name in ("turned", "upright"))
    assert torch.corrcoef(torch.stack([plain.flatten(), turned.flatten()]))[0, 1] > 0.99


def test_the_figure_fills_20_pixels_and_its_mass_is_centred(tmp_path, seven):
    Image.fromarray(seven).save(tmp_path / "seven.png")
    image = read_picture(tmp_path / "seven.png")[0].double()
    rows, columns = (image.sum(dim=axis).nonzero() for axis in (1, 0))
    assert max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 == 20
    for axis in (0, 1):
        mass = image.sum(dim=1 - axis)
        assert abs(float((mass * torch.arange(28)).sum() / mass.sum()) - 13.5) <= 0.6


def save_cut(path: Path) -> None:
    Image.new("L", (300, 300), 9).save(path)
    path.write_bytes(path.read_bytes()[:60])


def save_huge(path: Path, width: int, height: int) -> None:
    """Writes a PNG whose header states a size; a reader has to refuse it before it reads the pixels."""
    Image.new("1", (8, 8)).save(path)
    content = path.read_bytes()
    header = b"IHDR" + struct.pack(">II", width, height) + content[24:29]  # after signature and length: 16 bytes
    path.write_bytes(content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:])


def save_specks(path: Path) -> None:
    picture = Image.new("L", (1000, 1000), 255)
    picture.putpixel((5, 5), 0)
    picture.putpixel((990, 990), 0)
    picture.save(path)


def noise_page() -> np.ndarray:
    return np.random.default_rng(0).normal(200, 8, (300, 400)).clip(0, 255).astype(np.uint8)


BAD_PICTURES = {
    "empty.png": (lambda path: path.write_bytes(b""), "damaged"),
    "text.png": (lambda path: path.write_text("a seven"), "damaged"),
    "cut.png": (save_cut, "damaged"),
    "bad_exif.png": (lambda path: Image.new("L", (30, 30), 9).save(path, exif=b"II*\0\b"), "damaged"),
    "blank.png": (lambda path: Image.new("L", (50, 50), 255).save(path), "blank"),
    "large.png": (lambda path: save_huge(path, 11_000, 10_000), "11,000×10,000.*100,000,000"),
    "huge.png": (lambda path: save_huge(path, 20_000, 20_000), "100,000,000"),  # Pillow itself refuses this one
    "absent.png": (lambda path: None, "No such file"),
    "folder.png": (lambda path: path.mkdir(), "directory"),
    "specks.png": (save_specks, "specks"),
    "photo.heic": (lambda path: path.write_bytes(b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(99)), "HEIC.*JPEG"),
    "scan.pdf": (lambda path: path.write_bytes(b"%PDF-1.7\n"), "PDF.*JPEG"),
    "figure.svg": (lambda path: path.write_text("<svg></svg>"), "SVG"),
    "noise.png": (lambda path: Image.fromarray(noise_page()).save(path), "blank"),
}
"""File name -> (function that writes the file, pattern of the error)."""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_the_error_names_what_is_wrong_with_a_file(tmp_path, name):
    write, word = BAD_PICTURES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=word):
        read_picture(tmp_path / name)


# --- pictures from cameras and scanners -----------------------------------------------------------------------------


def disturbed(name: str, ink: np.ndarray) -> Image.Image:
    """A page of 420×560 with a figure, ink 0 to 1, under one disturbance."""
    y, x = np.meshgrid(np.linspace(0, 1, 420), np.linspace(0, 1, 560), indexing="ij")
    noise = np.random.default_rng(0).normal(0, 1, ink.shape)
    page = 235 - 205 * ink
    if name == "specks":
        for top, left in ((5, 5), (400, 540), (30, 500)):
            page[top : top + 4, left : left + 4] = 30
    page = {
        "side": lambda: page * (1 - 0.35 * x),
        "corner": lambda: page * (1 - 0.35 * x * y),
        "vignette": lambda: page * (1 - ((x - 0.5) ** 2 + (y - 0.5) ** 2)),
        "shadow": lambda: page * np.where(x + 0.2 * y > 0.8, 0.7, 1),
        "pencil": lambda: 230 - 70 * ink + 5 * noise,
        "noise": lambda: page + 15 * noise,
        "chalk": lambda: 60 + 60 * x + 120 * ink + 4 * noise,
    }.get(name, lambda: page)()
    if name in ("ten bits", "twelve bits"):
        return Image.fromarray((page / 255 * (1023 if name == "ten bits" else 4095)).astype(np.uint16))
    if name == "float":
        return Image.fromarray((page / 255).astype(np.float32))
    if name == "int32":
        return Image.fromarray(page.astype(np.int32))
    return Image.fromarray(page.clip(0, 255).astype(np.uint8))


DISTURBANCES = ["plain", "specks", "side", "corner", "vignette", "shadow", "pencil", "noise", "chalk"]
DISTURBANCES += ["ten bits", "twelve bits", "int32", "float"]


@pytest.mark.parametrize("name", DISTURBANCES)
def test_light_noise_specks_and_bit_depth_change_little(tmp_path, seven, name):
    ink = np.zeros((420, 560))
    ink[100:300, 150:350] = np.asarray(Image.fromarray(seven).resize((200, 200), Image.Resampling.BICUBIC)) / 255
    Image.fromarray(seven).save(tmp_path / "plain.png")
    disturbed(name, ink).save(tmp_path / "page.tif")
    prepared = prepare_picture(tmp_path / "page.tif")
    images = torch.stack([read_picture(tmp_path / "plain.png"), prepared.image]).flatten(1).float()
    assert torch.corrcoef(images)[0, 1] > 0.9
    assert prepared.doubts == ()


@pytest.mark.parametrize(
    ("boxes", "doubts"),
    [
        ([(150, 100, 170, 300)], ()),
        ([(150, 140, 170, 300), (150, 100, 170, 120)], ()),  # an i
        ([(150, 100, 170, 190), (150, 200, 170, 300)], ()),  # a broken stroke
        ([(150, 100, 170, 300), (300, 100, 320, 300)], ("two figures",)),
    ],
)
def test_parts_of_a_figure_are_kept_and_a_second_figure_is_doubtful(tmp_path, boxes, doubts):
    page = Image.new("L", (560, 420), 235)
    for box in boxes:
        page.paste(30, box)
    page.save(tmp_path / "page.png")
    prepared = prepare_picture(tmp_path / "page.png")
    assert prepared.doubts == doubts
    rows, columns = prepared.image[0].amax(dim=1).nonzero(), prepared.image[0].amax(dim=0).nonzero()
    assert rows[-1] - rows[0] == 19 and columns[-1] - columns[0] <= 2  # 20 pixels high: all parts of the first figure


@pytest.mark.parametrize("size", [(1, 1), (300, 300), (3000, 20)])
def test_a_blank_picture_is_refused_without_a_warning(tmp_path, size):
    Image.new("L", size, 255).save(tmp_path / "page.png")
    with warnings.catch_warnings(action="error"), pytest.raises(ValueError, match="blank"):
        prepare_picture(tmp_path / "page.png")


def test_a_faint_figure_is_doubtful(tmp_path, seven):
    Image.fromarray(200 - np.kron(seven, np.ones((10, 10), np.uint8)) // 10).save(tmp_path / "page.png")
    assert prepare_picture(tmp_path / "page.png").doubts == ("little contrast",)


# --- the geometry of a training set ---------------------------------------------------------------------------------


def framed(seven: np.ndarray, ground: str) -> torch.Tensor:
    """Images whose figures fill the frame."""
    figure = np.asarray(Image.fromarray(seven[5:25, 6:22]).resize((22, 28)))
    image = np.pad(figure, ((0, 0), (3, 3)))
    return torch.from_numpy(255 - image if ground == "light" else image).expand(5, 1, 28, 28)


@pytest.mark.parametrize("ground", ["dark", "light"])
def test_the_geometry_of_a_set_whose_figures_fill_the_frame(tmp_path, seven, ground):
    images = framed(seven, ground)
    geometry = measure_geometry(images)
    assert (geometry.ground, geometry.figure, geometry.centre) == (ground, 28, "box")
    Image.fromarray(images[0, 0].numpy()).save(tmp_path / "own.png")
    assert torch.equal(read_picture(tmp_path / "own.png", geometry), images[0])
    Image.fromarray(255 - images[0, 0].numpy()).save(tmp_path / "inverted.png")
    difference = read_picture(tmp_path / "inverted.png", geometry).int() - images[0].int()
    assert difference.abs().float().mean() < 8


def test_a_set_without_a_ground_keeps_its_images(tmp_path):
    images = load_dataset("synthetic", limit_test=5).test.images
    geometry = measure_geometry(images)
    assert geometry.ground == "none"
    Image.fromarray(images[0, 0].numpy()).save(tmp_path / "own.png")
    assert torch.equal(read_picture(tmp_path / "own.png", geometry), images[0])


@pytest.mark.parametrize(("height", "ground"), [(28, "none"), (20, "dark")])
def test_own_grey_images_with_dark_corners_are_figures_only_at_a_distance_from_the_edges(tmp_path, height, ground):
    # An X-ray fills the frame between dark corners; a drawn figure does not.
    image = np.zeros((28, 28), dtype=np.uint8)
    image[14 - height // 2 : 14 + height // 2, 6:22] = 200
    images = torch.from_numpy(image).expand(5, 1, 28, 28)
    geometry = measure_geometry(images, "stretch")
    assert (geometry.ground, geometry.resize) == (ground, "stretch")
    assert measure_geometry(images).ground == "dark"
    # A larger picture is prepared as the training images were, with or without a ground.
    large = Image.fromarray(np.kron(image, np.ones((9, 9), dtype=np.uint8))).rotate(1)
    large.save(tmp_path / "large.png")
    expected = np.asarray(large.resize((28, 28), Image.Resampling.BILINEAR))
    assert np.array_equal(read_picture(tmp_path / "large.png", geometry)[0].numpy(), expected)


def test_mnists_geometry_is_the_default_and_its_images_are_used_unchanged(tmp_path, mnist_root):
    images = load_dataset("mnist", root=mnist_root, limit_test=20)
    geometry = measure_geometry(images.train.images)
    assert (geometry.ground, geometry.figure, geometry.centre) == ("dark", 20, "mass")
    for image in images.test.images:
        Image.fromarray(image[0].numpy()).save(tmp_path / "own.png")
        assert torch.equal(read_picture(tmp_path / "own.png"), image)


@pytest.mark.parametrize(
    "stored", [None, 5, "mnist", {"figure": 10**9}, {"figure": 20.5}, {"ground": "x"}, {"resize": 3}, {"x": 1}]
)
def test_a_damaged_geometry_is_refused(stored):
    with pytest.raises(ValueError, match="geometry"):
        read_geometry({"geometry": stored})
    assert read_geometry({}) == Geometry()
