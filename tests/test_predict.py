"""Pictures as people have them, read like the digits that the network knows."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_dist import load_recipe, train
from mnist_dist.data.pictures import read_picture
from mnist_dist.predict import _newest_run, main, predict_digit


@pytest.fixture(scope="module")
def ink():
    """A seven, 28×28, bright on dark, as MNIST would draw it."""
    image = np.zeros((28, 28), dtype=np.uint8)
    image[5:8, 6:22] = 255
    for row in range(8, 25):
        column = 20 - (row - 8) // 2
        image[row, column - 3 : column] = 255
    return image


def variants(ink):
    """The same figure as other people would bring it."""
    large = Image.fromarray(ink).resize((280, 280), Image.Resampling.BICUBIC)
    paper = Image.fromarray(255 - np.asarray(large))
    yield "large", large
    yield "dark on light", paper
    yield "off centre", on_paper(paper, (700, 500), (30, 200))
    yield "wide", on_paper(paper, (900, 300), (600, 10))
    blue = np.where(np.asarray(paper)[..., None] > 127, [250, 240, 200], [20, 30, 120])
    yield "blue on yellow", Image.fromarray(blue.astype(np.uint8))
    yield "faint", Image.fromarray((200 - np.asarray(large, dtype=np.float32) * 0.3).astype(np.uint8))
    clear = np.zeros((280, 280, 4), dtype=np.uint8)
    clear[..., 3] = np.asarray(large)
    yield "black on nothing", Image.fromarray(clear)
    clear = clear.copy()
    clear[..., :3] = 255
    yield "white on nothing", Image.fromarray(clear)
    yield "palette", paper.convert("RGB").convert("P", palette=Image.Palette.ADAPTIVE)
    yield "one bit", paper.convert("1")
    yield "sixteen bits", Image.fromarray(np.asarray(paper).astype(np.uint16) * 257)


def on_paper(picture, size, place):
    sheet = Image.new("L", size, 255)
    sheet.paste(picture, place)
    return sheet


NAMES = ["large", "dark on light", "off centre", "wide", "blue on yellow", "faint", "black on nothing"]
NAMES += ["white on nothing", "palette", "one bit", "sixteen bits"]


@pytest.mark.parametrize("name", NAMES)
def test_the_same_figure_is_the_same_picture_however_it_was_taken(tmp_path, ink, name):
    Image.fromarray(ink).save(tmp_path / "plain.png")
    dict(variants(ink))[name].save(tmp_path / "variant.png")
    plain, variant = (read_picture(tmp_path / f"{each}.png").float() for each in ("plain", "variant"))
    assert variant.shape == (1, 28, 28)
    assert torch.corrcoef(torch.stack([plain.flatten(), variant.flatten()]))[0, 1] > 0.93


def test_a_photo_that_lies_on_its_side_says_so(tmp_path, ink):
    upright = Image.fromarray(255 - np.kron(ink, np.ones((10, 10), np.uint8)))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    upright.rotate(90, expand=True).save(tmp_path / "turned.jpg", exif=exif, quality=95)
    upright.save(tmp_path / "upright.jpg", quality=95)
    turned, plain = (read_picture(tmp_path / f"{name}.jpg").float() for name in ("turned", "upright"))
    assert torch.corrcoef(torch.stack([plain.flatten(), turned.flatten()]))[0, 1] > 0.99


def test_the_figure_fills_20_pixels_and_its_mass_is_in_the_middle(tmp_path, ink):
    Image.fromarray(ink).save(tmp_path / "seven.png")
    image = read_picture(tmp_path / "seven.png")[0].double()
    rows, columns = (image.sum(dim=axis).nonzero() for axis in (1, 0))
    assert max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 == 20
    for axis in (0, 1):
        mass = image.sum(dim=1 - axis)
        assert abs(float((mass * torch.arange(28)).sum() / mass.sum()) - 13.5) <= 0.6


BAD = {
    "empty.png": lambda path: path.write_bytes(b""),
    "text.png": lambda path: path.write_text("a seven"),
    "cut.png": lambda path: (Image.new("L", (300, 300), 9).save(path), path.write_bytes(path.read_bytes()[:60])),
    "blank.png": lambda path: Image.new("L", (50, 50), 255).save(path),
    "huge.png": lambda path: Image.new("1", (20_000, 20_000)).save(path),
    "absent.png": lambda path: None,
    "specks.png": lambda path: specks(path),
    "tag.png": lambda path: Image.new("L", (30, 30), 9).save(path, exif=b"II*\0\b"),
}


def specks(path):
    picture = Image.new("L", (1000, 1000), 255)
    picture.putpixel((5, 5), 0)
    picture.putpixel((990, 990), 0)
    picture.save(path)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, request):
    mnist_root = request.getfixturevalue("mnist_root")
    folder = tmp_path_factory.mktemp("predict") / "run"
    words = ["data.limit_train=12000", "data.limit_test=500", f"data.root={mnist_root}", "tracking.wandb.mode=disabled"]
    train(load_recipe("model_v1_onecycle", *words, "epochs=2"), folder)
    return folder


def test_real_digits_as_photos_are_read_right(run_dir, mnist_root, tmp_path, capsys):
    from mnist_dist.data import load_dataset

    test = load_dataset("mnist", root=mnist_root).test
    for place in range(100):
        large = Image.fromarray(255 - test.images[place, 0].numpy()).resize((200, 200), Image.Resampling.BICUBIC)
        on_paper(large, (640, 480), (3 * place, place)).save(tmp_path / f"{place:03}.png")
    assert main([str(run_dir), str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(each) for each in found] == [{"path", "digit", "confidence", "top3"}] * 100
    assert sum(each["digit"] == test.classes[label] for each, label in zip(found, test.labels[:100], strict=True)) >= 90
    digit, confidence = predict_digit(tmp_path / "000.png", run_dir)
    assert (digit, confidence) == (found[0]["digit"], found[0]["confidence"])


def test_a_bad_picture_is_named_and_the_rest_go_on(run_dir, tmp_path, capsys, ink):
    for name, make in BAD.items():
        make(tmp_path / name)
    Image.fromarray(ink).save(tmp_path / "seven.png")
    assert main([str(run_dir), *(str(tmp_path / name) for name in BAD), str(tmp_path / "seven.png")]) == 1
    output = capsys.readouterr()
    for name, expected in {
        "empty.png": "not a picture, or a damaged one",
        "text.png": "not a picture, or a damaged one",
        "cut.png": "not a picture, or a damaged one",
        "blank.png": "the picture is blank",
        "huge.png": "too many",
        "absent.png": "No such file",
        "specks.png": "only specks",
        "tag.png": "not a picture, or a damaged one",
    }.items():
        [line] = [line for line in output.err.splitlines() if name in line]
        assert expected in line
    assert output.out.count("\n") == 1 and "seven.png: " in output.out


def test_a_name_that_is_no_text_costs_no_answer(run_dir, tmp_path, capsys, ink):
    Image.fromarray(ink).save(tmp_path / "seven.png")
    for name in (b"\xff.png", b"\xff.txt"):
        (tmp_path / os.fsdecode(name)).write_bytes((tmp_path / "seven.png").read_bytes())
    (tmp_path / "text.txt").write_text("no picture")
    assert main([str(run_dir), str(tmp_path)]) == 1
    assert capsys.readouterr().out.encode().count(b": 7") == 3


@pytest.mark.parametrize("place", ["mine", "debug/20260101-120000", "sweeps/mine/lr=0.1"])
def test_the_newest_finished_run_is_found_wherever_it_lies(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no finished run"):
        predict_digit("x.png")
    for age, name in enumerate((place, "older/1", "unfinished")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").touch()
        if name != "unfinished":
            (tmp_path / "runs" / name / "summary.json").touch()
            os.utime(tmp_path / "runs" / name / "summary.json", (1e9 - age, 1e9 - age))
    assert _newest_run() == Path("runs", place)
