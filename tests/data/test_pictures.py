"""Pictures of any size, colour and file format become the same image in the format of MNIST."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_dist.data.pictures import read_picture


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
}
"""File name -> (function that writes the file, word of the error)."""


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BAD_PICTURES)
def test_the_error_names_what_is_wrong_with_a_file(tmp_path, name):
    write, word = BAD_PICTURES[name]
    write(tmp_path / name)
    with pytest.raises(ValueError, match=word):
        read_picture(tmp_path / name)
