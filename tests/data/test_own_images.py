"""Images of the user's own: folders, tables, archives, functions, torchvision's and the hub's sets; their cache."""

from __future__ import annotations

import csv
import json
import os
import pickle
import signal
import socket
import sys
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_dist.data import Dataset, load_dataset
from mnist_dist.data.cache import OLDEST_SECONDS, cache_folders, remove_unfinished, unfinished_path
from mnist_dist.data.form import DataError, Form, as_label_array, boxes, fit_images, fit_picture
from tests.processes import popen

COLOURS = {"amber": (250, 190, 10), "blue": (10, 20, 240), "green": (20, 200, 30)}
"""Class -> the colour of its images."""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The user's cache folder is below the test's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def picture(name: str, number: int, size: tuple[int, int] = (8, 8)) -> Image.Image:
    """An image in its class's colour, with its number as the level of red in the first pixel."""
    made = Image.new("RGB", size, COLOURS[name])
    made.putpixel((0, 0), (number, 0, 0))
    return made


def write_folder(root: Path, counts: dict[str, int], size: tuple[int, int] = (8, 8), ending: str = "png") -> Path:
    """Writes `count` images of each class below each part, e.g. {"train": 5}; part "" for one level only."""
    for part, count in counts.items():
        for name in COLOURS:
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                picture(name, number, size).save(root / part / name / f"{number}.{ending}")
    return root


def counts_of(dataset: Dataset) -> list[list[int]]:
    return [
        torch.bincount(part.labels, minlength=3).tolist() for part in (dataset.train, dataset.held_out, dataset.test)
    ]


def assert_labels_fit(dataset: Dataset) -> None:
    """Every image shows the colour of its class."""
    for part in (dataset.train, dataset.held_out, dataset.test):
        expected = torch.tensor([COLOURS[part.classes[label]] for label in part.labels.tolist()])
        assert torch.equal(part.images[:, :, 4, 4].int(), expected.int())


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_with_training_and_test_images(tmp_path):
    dataset = load_dataset("folder", root=write_folder(tmp_path / "own", {"train": 6, "test": 2}))
    assert dataset.train.classes == tuple(COLOURS) and dataset.train.shape == (3, 8, 8)
    assert counts_of(dataset) == [[6] * 3, [2] * 3, [2] * 3]
    assert_labels_fit(dataset)
    assert not dataset.has_validation


def test_a_folder_with_validation_images_instead_of_test_images(tmp_path):
    dataset = load_dataset("folder", root=write_folder(tmp_path / "own", {"Train": 6, "val": 2}))
    assert counts_of(dataset) == [[6] * 3, [2] * 3, [2] * 3] and not dataset.has_validation


def test_a_folder_with_validation_and_test_images(tmp_path):
    dataset = load_dataset("folder", root=write_folder(tmp_path / "own", {"train": 6, "val": 2, "test": 3}))
    assert counts_of(dataset) == [[6] * 3, [2] * 3, [3] * 3] and dataset.has_validation
    assert_labels_fit(dataset)


def test_folders_that_are_no_part_are_reported(tmp_path, capsys):
    root = write_folder(tmp_path / "own", {"train": 5, "extra": 1, "test": 2})
    assert counts_of(load_dataset("folder", root=root)) == [[5] * 3, [2] * 3, [2] * 3]
    assert "extra" in capsys.readouterr().err
    load_dataset("folder", root=root, download=False)  # the other processes of a node give no note
    assert "extra" not in capsys.readouterr().err


@pytest.mark.parametrize("part", ["", "train"])
def test_a_folder_without_test_images_is_divided_by_class_and_always_alike(tmp_path, part):
    root = write_folder(tmp_path / "own", {part: 10})
    dataset = load_dataset("folder", root=root)
    assert counts_of(dataset) == [[8] * 3, [2] * 3, [2] * 3]
    assert_labels_fit(dataset)
    seen = {(int(label), int(image[0, 0, 0])) for each in (dataset.train, dataset.test)
            for image, label in zip(each.images, each.labels, strict=True)}  # fmt: skip
    assert len(seen) == 30  # nothing is in both
    again = load_dataset("folder", root=root)
    assert torch.equal(again.test.images, dataset.test.images)


def test_validation_images_hold_every_class_and_are_shuffled(tmp_path):
    dataset = load_dataset("folder", root=write_folder(tmp_path / "own", {"train": 10, "test": 2}), validation=6)
    assert counts_of(dataset) == [[8] * 3, [2] * 3, [2] * 3] and dataset.has_validation
    assert dataset.train.labels[:9].unique().tolist() == [0, 1, 2]
    numbers = dataset.train.images[dataset.train.labels == 0][:, 0, 0, 0].tolist()
    assert numbers != sorted(numbers)
    limited = load_dataset("folder", root=tmp_path / "own", validation=6, limit_train=6, limit_test=3)
    assert counts_of(limited) == [[2] * 3, [2] * 3, [1] * 3]


@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "gif", "tiff", "webp", "ppm"])
def test_formats_that_pillow_reads(tmp_path, ending):
    write_folder(tmp_path / "own", {"train": 2, "test": 1}, ending=ending)
    dataset = load_dataset("folder", root=tmp_path / "own", channels=3)
    expected = torch.tensor([COLOURS[dataset.train.classes[label]] for label in dataset.train.labels.tolist()])
    found = dataset.train.images[:, :, 4, 4].int()
    assert (found - expected).abs().max() < 40


def test_grey_files_give_one_channel_and_one_colour_file_gives_three(tmp_path):
    for name, level in (("a", 10), ("b", 200)):
        for part in ("train", "test"):
            (tmp_path / "own" / part / name).mkdir(parents=True)
            for number in range(3):
                Image.new("L", (5, 4), level + number).save(tmp_path / "own" / part / name / f"{number}.png")
    dataset = load_dataset("folder", root=tmp_path / "own")
    assert dataset.train.shape == (1, 4, 5)
    assert load_dataset("folder", root=tmp_path / "own", channels=3).train.shape == (3, 4, 5)
    Image.new("RGB", (5, 4), (9, 0, 0)).save(tmp_path / "own/train/a/9.png")
    assert load_dataset("folder", root=tmp_path / "own").train.shape == (3, 4, 5)
    assert load_dataset("folder", root=tmp_path / "own", channels=1).train.shape == (1, 4, 5)


def test_16_bits_transparency_and_orientation(tmp_path):
    folder = tmp_path / "own" / "train"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
    Image.fromarray(np.full((4, 6), 65535 // 2, np.uint16)).save(folder / "a/deep.png")
    Image.new("RGBA", (6, 4), (200, 100, 50, 0)).save(folder / "a/clear.png")
    turned = Image.new("RGB", (4, 6), (1, 2, 3))
    turned.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    turned.save(folder / "b/turned.png", exif=exif)
    Image.new("RGB", (6, 4), (7, 7, 7)).save(folder / "b/plain.png")
    dataset = load_dataset("folder", root=tmp_path / "own")
    images = torch.cat([dataset.train.images, dataset.test.images])
    assert images.shape == (4, 3, 4, 6)
    middles = sorted(images[:, 0, 2, 3].tolist())
    assert middles == [0, 1, 7, 127]
    [of_turned] = [image for image in images if image[0, 2, 3] == 1]
    assert of_turned[0, 0, 5] == 255  # the first pixel of the file is at the top right


def test_links_are_followed_except_those_back_up(tmp_path):
    root = write_folder(tmp_path / "own", {"train": 4, "test": 2})
    (root / "train/blue").rename(tmp_path / "elsewhere")
    (root / "train/blue").symlink_to(tmp_path / "elsewhere")  # a class
    (tmp_path / "more").mkdir()
    picture("amber", 9).save(tmp_path / "more/9.png")
    (root / "train/amber/more").symlink_to(tmp_path / "more")  # a folder below a class
    (root / "train/green/loop").symlink_to(root / "train")
    (root / "train/green/self").symlink_to(root / "train/green")
    dataset = load_dataset("folder", root=root)
    assert counts_of(dataset)[0] == [5, 4, 4]
    assert_labels_fit(dataset)


def test_two_spellings_of_one_letter_are_one_class(tmp_path):
    root = write_folder(tmp_path / "own", {"train": 3, "test": 2})
    (root / "train/blue").rename(root / "train" / unicodedata.normalize("NFC", "blå"))
    (root / "test/blue").rename(root / "test" / unicodedata.normalize("NFD", "blå"))
    dataset = load_dataset("folder", root=root)
    assert dataset.train.classes == ("amber", unicodedata.normalize("NFC", "blå"), "green")
    assert counts_of(dataset) == [[3] * 3, [2] * 3, [2] * 3]


def test_a_class_may_have_the_name_of_a_part(tmp_path):
    root = write_folder(tmp_path / "own", {"": 5})
    (root / "blue").rename(root / "bullet_train")
    assert load_dataset("folder", root=root).train.classes == ("amber", "bullet_train", "green")


def test_pictures_of_unusual_modes(tmp_path):
    folder = tmp_path / "own" / "train"
    for name in ("a", "b"):
        (folder / name).mkdir(parents=True)
        Image.new("RGB", (6, 6), (1, 2, 3)).save(folder / name / "plain.png")
    frames = [Image.new("RGB", (6, 6), colour) for colour in ((90, 90, 90), (5, 5, 5))]
    frames[0].save(folder / "a/animated.gif", save_all=True, append_images=frames[1:])
    Image.new("CMYK", (6, 6), (0, 0, 0, 255 - 60)).save(folder / "a/print.tiff")
    Image.new("1", (6, 6), 1).save(folder / "b/bits.png")
    Image.new("LA", (6, 6), (70, 255)).save(folder / "b/grey_alpha.png")
    dataset = load_dataset("folder", root=tmp_path / "own")
    levels = torch.cat([dataset.train.images, dataset.test.images])[:, 0, 3, 3].tolist()
    assert sorted(levels) == [1, 1, 60, 70, 90, 255]


# --- size and channels --------------------------------------------------------------------------------------------


def test_images_of_several_sizes_need_a_size(tmp_path):
    root = write_folder(tmp_path / "own", {"train": 3, "test": 1})
    picture("blue", 0, (40, 20)).save(root / "train/blue/wide.png")
    for resize in ("crop", "stretch", "pad"):
        dataset = load_dataset("folder", root=root, image_size=(16, 12), resize=resize)
        assert dataset.train.shape == (3, 16, 12)


def test_boxes_of_the_three_ways():
    assert boxes((20, 40), (10, 10), "crop") == ((0, 10, 20, 20), (0, 0, 10, 10))
    assert boxes((20, 40), (10, 10), "stretch") == ((0, 0, 20, 40), (0, 0, 10, 10))
    assert boxes((20, 40), (10, 10), "pad") == ((0, 0, 20, 40), (2, 0, 5, 10))
    assert boxes((28, 28), (32, 32), "pad") == ((0, 0, 28, 28), (2, 2, 28, 28))  # a small image is not enlarged


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("size", [(8, 8), (5, 9), (20, 30), (16, 24), (40, 8)])
@pytest.mark.parametrize("channels", [1, 3])
def test_arrays_and_files_get_the_same_form(resize, size, channels):
    levels = torch.randint(0, 256, (3, 16, 24), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    shown = Image.fromarray(levels.permute(1, 2, 0).numpy())
    of_file = torch.from_numpy(np.array(fit_picture(shown, size, channels, resize)))
    of_array = fit_images(levels[None], Form(size, channels, resize))[0]
    assert of_file.shape == of_array.shape == (channels, *size)
    assert (of_file.int() - of_array.int()).abs().max() <= 2  # Pillow rounds between the two directions


def test_a_published_set_gets_another_size_by_padding(mnist_root):
    plain = load_dataset("mnist", root=mnist_root, limit_train=20, limit_test=20)
    padded = load_dataset("mnist", root=mnist_root, limit_train=20, limit_test=20, image_size=32, resize="pad")
    assert padded.train.shape == (1, 32, 32)
    assert torch.equal(padded.train.images[:, :, 2:30, 2:30], plain.train.images)
    assert padded.train.images[:, :, :2].sum() == 0 and torch.equal(padded.train.labels, plain.train.labels)


def test_grey_images_become_colour_and_back():
    dataset = load_dataset("synthetic", limit_train=5, limit_test=5)
    colour = fit_images(dataset.train.images, Form(channels=3))
    assert colour.shape == (5, 3, 28, 28) and torch.equal(colour[:, 1:2], dataset.train.images)
    assert torch.equal(fit_images(colour, Form(channels=1)), dataset.train.images)


# --- tables, archives, functions ----------------------------------------------------------------------------------


def write_table(path: Path, rows: list[list[str]]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    return path


def test_a_table_of_paths_and_labels(tmp_path):
    root = write_folder(tmp_path / "own", {"train": 5})
    files = sorted(root.rglob("*.png"))
    rows = [[str(file.relative_to(root)), file.parent.name] for file in files]
    dataset = load_dataset("csv", root=write_table(root / "images.csv", [["path", "label"], *rows]))
    assert counts_of(dataset) == [[4] * 3, [1] * 3, [1] * 3]
    assert_labels_fit(dataset)
    split = ["train", "train", "train", "val", "test"] * 3
    rows = [["split", "label", "path"], *([part, label, path] for part, (path, label) in zip(split, rows, strict=True))]
    dataset = load_dataset("csv", root=write_table(tmp_path / "own/images.csv", rows))
    assert counts_of(dataset) == [[3] * 3, [1] * 3, [1] * 3] and dataset.has_validation
    assert_labels_fit(dataset)


def test_a_table_from_a_spreadsheet(tmp_path):
    root = write_folder(tmp_path / "own", {"train": 5})
    files = sorted(root.rglob("*.png"))
    (root / "train/blue/0.png").rename(root / "train/blue/0, cut.png")
    lines = [' Label ,"Path"', "", " , ", *(f'{file.parent.name},"{file}"' for file in files)]
    text = "\r\n".join(lines).replace("blue/0.png", "blue/0, cut.png")
    (root / "images.csv").write_text("\ufeff" + text, newline="")
    dataset = load_dataset("csv", root=root)
    assert counts_of(dataset) == [[4] * 3, [1] * 3, [1] * 3]
    assert_labels_fit(dataset)


def test_all_parts_of_an_archive_have_one_scale(tmp_path):
    labels = np.arange(8) % 2
    dark = {"test_images": np.ones((8, 4, 4), np.float32), "test_labels": labels}
    np.savez(tmp_path / "own.npz", train_images=np.full((8, 4, 4), 200.0), train_labels=labels, **dark)
    dataset = load_dataset("npz", root=tmp_path)
    assert dataset.train.images.unique().tolist() == [200] and dataset.test.images.unique().tolist() == [1]
    np.savez(tmp_path / "own.npz", train_images=np.full((8, 4, 4), 0.2), train_labels=labels, **dark)
    dataset = load_dataset("npz", root=tmp_path)
    assert dataset.train.images.unique().tolist() == [51] and dataset.test.images.unique().tolist() == [255]


def test_labels_that_are_bytes_or_objects(tmp_path, monkeypatch):
    np.savez(tmp_path / "own.npz", images=np.zeros((8, 4, 4)), labels=np.array(["blå".encode(), b"red"] * 4))
    assert load_dataset("npz", root=tmp_path).train.classes == ("blå", "red")
    assert as_label_array(np.array([np.int64(3), "a"], dtype=object), 2, "labels").tolist() == ["3", "a"]


def arrays(count: int, channels: int = 3, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, 7, 6[, C]) whose first level is ten times the label, and labels."""
    generator = np.random.default_rng(seed)
    images = generator.integers(0, 256, (count, 7, 6, channels)[: 4 if channels > 1 else 3], np.uint8)
    labels = np.arange(count) % 4
    images[(slice(None), 0, 0, 0)[: images.ndim]] = 10 * labels
    return images, labels


def test_an_archive_in_the_layout_of_medmnist(tmp_path):
    parts = {name: arrays(count, seed=count) for name, count in (("train", 40), ("val", 8), ("test", 12))}
    values = {f"{name}_images": images for name, (images, _) in parts.items()}
    values |= {f"{name}_labels": labels[:, None] for name, (_, labels) in parts.items()}
    np.savez_compressed(tmp_path / "own.npz", **values)
    dataset = load_dataset("npz", root=tmp_path / "own.npz")
    assert [len(part) for part in (dataset.train, dataset.held_out, dataset.test)] == [40, 8, 12]
    assert dataset.train.shape == (3, 7, 6) and dataset.train.classes == ("0", "1", "2", "3")
    for part in (dataset.train, dataset.held_out, dataset.test):
        assert torch.equal(part.images[:, 0, 0, 0].long(), 10 * part.labels)


@pytest.mark.parametrize("channels", [1, 3])
def test_an_archive_of_images_and_labels_is_divided(tmp_path, channels):
    images, labels = arrays(40, channels)
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    dataset = load_dataset("npz", root=tmp_path)
    assert dataset.train.shape == (channels, 7, 6) and (len(dataset.train), len(dataset.test)) == (32, 8)
    for part in (dataset.train, dataset.test):
        assert torch.equal(part.images[:, 0, 0, 0].long(), 10 * part.labels)


OWN_MODULE = """
import numpy as np

def load():
    images = np.arange(40 * 25, dtype=np.float32).reshape(40, 5, 5) % 256 / 255
    labels = np.array(["no", "yes"] * 20)
    return (images[:30], labels[:30]), (images[30:], labels[30:])

def wrong():
    return 3
"""


def test_a_function_of_the_users_own(tmp_path, monkeypatch):
    (tmp_path / "own_images_of_mine.py").write_text(OWN_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    dataset = load_dataset("own_images_of_mine:load")
    assert dataset.train.shape == (1, 5, 5) and dataset.train.classes == ("no", "yes")
    assert (len(dataset.train), len(dataset.test)) == (30, 10)
    with pytest.raises(ValueError, match="expected"):
        load_dataset("own_images_of_mine:wrong")


def test_classes_with_numbers_are_in_the_order_of_the_numbers(tmp_path):
    np.savez(tmp_path / "own.npz", images=np.zeros((24, 4, 4), np.uint8), labels=[f"c{n % 12}" for n in range(24)])
    assert load_dataset("npz", root=tmp_path).train.classes == tuple(f"c{number}" for number in range(12))


# --- published sets in colour -------------------------------------------------------------------------------------


def test_torchvisions_cifar10(tmp_path, monkeypatch):
    from torchvision import datasets

    folder = tmp_path / datasets.CIFAR10.base_folder
    folder.mkdir()
    for name, _ in (*datasets.CIFAR10.train_list, *datasets.CIFAR10.test_list):
        images, labels = np.zeros((20, 3, 32, 32), np.uint8), list(range(10)) * 2
        images[:, 1, 0, 0] = labels
        (folder / name).write_bytes(pickle.dumps({"data": images.reshape(20, -1), "labels": labels}))
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": [f"class {n}" for n in range(10)]}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *arguments: True)
    dataset = load_dataset("cifar10", root=tmp_path, download=False)
    assert (len(dataset.train), len(dataset.test), dataset.train.shape) == (100, 20, (3, 32, 32))
    assert dataset.train.classes == tuple(f"class {n}" for n in range(10))
    assert torch.equal(dataset.train.images[:, 1, 0, 0].long(), dataset.train.labels)


def test_torchvisions_svhn_and_stl10(tmp_path, monkeypatch):
    scipy = pytest.importorskip("scipy.io", reason="scipy, with which torchvision reads SVHN, is not installed")
    for part, count in (("train", 20), ("test", 10)):
        labels = np.arange(count) % 10
        images = np.zeros((32, 32, 3, count), np.uint8)
        images[0, 0, 2] = labels
        # SVHN has the label 10 for the digit 0.
        scipy.savemat(tmp_path / f"{part}_32x32.mat", {"X": images, "y": np.where(labels, labels, 10)[:, None]})
        (tmp_path / "stl10_binary").mkdir(exist_ok=True)
        of_stl = np.zeros((count, 3, 96, 96), np.uint8)
        of_stl[:, 0, 0, 0] = labels
        of_stl.tofile(tmp_path / f"stl10_binary/{part}_X.bin")
        (labels + 1).astype(np.uint8).tofile(tmp_path / f"stl10_binary/{part}_y.bin")
    (tmp_path / "stl10_binary/class_names.txt").write_text("\n".join(f"class {n}" for n in range(10)))
    monkeypatch.setattr("torchvision.datasets.svhn.check_integrity", lambda *arguments: True)
    monkeypatch.setattr("torchvision.datasets.stl10.check_integrity", lambda *arguments: True)
    svhn = load_dataset("svhn", root=tmp_path, download=False)
    assert (len(svhn.train), len(svhn.test), svhn.train.shape) == (20, 10, (3, 32, 32))
    assert torch.equal(svhn.train.images[:, 2, 0, 0].long(), svhn.train.labels)
    stl10 = load_dataset("stl10", root=tmp_path, download=False)
    assert (len(stl10.train), len(stl10.test), stl10.train.shape) == (20, 10, (3, 96, 96))
    assert torch.equal(stl10.train.images[:, 0, 0, 0].long(), stl10.train.labels)
    assert stl10.train.classes == tuple(f"class {n}" for n in range(10))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Hugging Face's `datasets` without a network, with its cache below the test's folder."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = pytest.importorskip("datasets", reason="Hugging Face's datasets is not installed")
    monkeypatch.setattr(found.config, "HF_DATASETS_CACHE", tmp_path / "hub_cache")
    found.disable_progress_bars()
    return found


def hub_part(hub, count: int, labels: list[int] | None = None, mode: str = "RGB"):
    """A split of `count` pictures in their class's colour."""
    features = hub.Features({"picture": hub.Image(), "label": hub.ClassLabel(names=list(COLOURS))})
    shown = [picture(list(COLOURS)[number % 3], number).convert(mode) for number in range(count)]
    values = {"picture": shown, "label": labels or [number % 3 for number in range(count)]}
    return hub.Dataset.from_dict(values, features=features)


@pytest.mark.parametrize(
    ("parts", "counts"),
    [
        ({"train": 12, "test": 6}, [[4] * 3, [2] * 3, [2] * 3]),
        ({"train": 15}, [[4] * 3, [1] * 3, [1] * 3]),
        ({"train": 12, "valid": 6}, [[4] * 3, [2] * 3, [2] * 3]),
        ({"test": 6, "validation": 3, "train": 12}, [[4] * 3, [1] * 3, [2] * 3]),
    ],
)
def test_a_local_data_set_of_the_hub(tmp_path, hub, parts, counts):
    hub.DatasetDict({name: hub_part(hub, count) for name, count in parts.items()}).save_to_disk(tmp_path / "own")
    dataset = load_dataset(f"hub:{tmp_path / 'own'}", download=False)
    assert counts_of(dataset) == counts
    assert_labels_fit(dataset)


def test_folders_that_the_hubs_library_reads(tmp_path, hub):
    (tmp_path / "tables").mkdir()
    for name, count in (("train", 12), ("test", 6)):
        hub_part(hub, count, mode="L").to_parquet(tmp_path / f"tables/{name}-0.parquet")
    dataset = load_dataset(f"hub:{tmp_path / 'tables'}")
    assert counts_of(dataset) == [[4] * 3, [2] * 3, [2] * 3] and dataset.train.shape == (1, 8, 8)
    dataset = load_dataset(f"hub:{write_folder(tmp_path / 'files', {'train': 4, 'test': 2})}")
    assert counts_of(dataset) == [[4] * 3, [2] * 3, [2] * 3]
    assert_labels_fit(dataset)


def test_data_sets_of_the_hub_that_cannot_be_used(tmp_path, hub, capsys):
    whole = hub_part(hub, 12)
    hub.DatasetDict({"train": whole, "test": hub_part(hub, 3, [-1] * 3)}).save_to_disk(tmp_path / "unlabelled")
    assert counts_of(load_dataset(f"hub:{tmp_path / 'unlabelled'}")) == [[3] * 3, [1] * 3, [1] * 3]
    assert "test" in capsys.readouterr().err
    hub.DatasetDict({"train": hub_part(hub, 12, [None, *[0, 1] * 5, 2])}).save_to_disk(tmp_path / "no_label")
    hub.DatasetDict({"test": whole}).save_to_disk(tmp_path / "no_training")
    hub.DatasetDict({"train": whole.remove_columns("label")}).save_to_disk(tmp_path / "no_classes")
    hub.DatasetDict({"train": hub_part(hub, 12, [0] * 12)}).save_to_disk(tmp_path / "damaged")
    next((tmp_path / "damaged").rglob("*.arrow")).write_bytes(b"x")
    for name, kind in {
        "no_label": "damaged", "no_training": "missing", "no_classes": "conflict", "damaged": "missing", "": "missing",
    }.items():  # fmt: skip
        with pytest.raises(DataError) as caught:
            load_dataset(f"hub:{tmp_path / 'none' if not name else tmp_path / name}")
        assert (caught.value.key, caught.value.kind) == ("dataset", kind), name


# --- the cache ----------------------------------------------------------------------------------------------------


def caches(root: Path) -> list[Path]:
    return [each for folder in cache_folders(root) if folder.is_dir() for each in folder.iterdir()]


def test_files_are_decoded_once_and_again_after_a_change(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "own", {"train": 4, "test": 2})
    first = load_dataset("folder", root=root)
    [cache] = caches(root)
    assert cache.parent == root / ".decoded"
    decoded = []
    original = Image.Image.load
    monkeypatch.setattr(Image.Image, "load", lambda self: decoded.append(1) or original(self))
    again = load_dataset("folder", root=root)
    assert not decoded and torch.equal(first.train.images, again.train.images)
    assert again.train.mean == first.train.mean
    picture("blue", 77).save(root / "train/blue/0.png")
    changed = load_dataset("folder", root=root)
    assert decoded and not torch.equal(first.train.images, changed.train.images)
    assert len(caches(root)) == 2
    load_dataset("folder", root=root, image_size=4)
    assert len(caches(root)) == 3


def test_images_are_mapped_from_the_file(tmp_path):
    root = write_folder(tmp_path / "own", {"train": 4, "test": 2})
    dataset = load_dataset("folder", root=root, validation=3)
    [cache] = caches(root)
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list the memory maps of a process")
    assert str(cache / "images.bin") in maps.read_text()
    addresses = [part.images.data_ptr() for part in (dataset.train, dataset.held_out, dataset.test)]
    spans = [line.split()[0].split("-") for line in maps.read_text().splitlines() if line.endswith("images.bin")]
    for address in addresses:  # parts are views of the file, not copies
        assert any(int(low, 16) <= address < int(high, 16) for low, high in spans)


@pytest.mark.parametrize("damage", ["images.bin", "about.json", "kept.npy"])
def test_a_damaged_cache_is_made_again(tmp_path, damage):
    root = write_folder(tmp_path / "own", {"train": 4, "test": 2})
    first = load_dataset("folder", root=root)
    expected = first.train.images.clone()
    [cache] = caches(root)
    path = cache / damage
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[: len(content) // 2])
    assert torch.equal(load_dataset("folder", root=root).train.images, expected)
    assert torch.equal(load_dataset("folder", root=root).train.images, expected)
    assert len(caches(root)) == 1


def test_a_folder_that_cannot_be_written_has_its_cache_in_the_users_folder(tmp_path, monkeypatch):
    root = write_folder(tmp_path / "own", {"train": 4, "test": 2})
    (root / ".decoded").write_text("")  # also for root, who may write everywhere
    assert len(load_dataset("folder", root=root).train) == 12
    assert len(list((tmp_path / "cache/mnist_dist/decoded").iterdir())) == 1


def test_a_killed_decoding_leaves_no_cache_and_begins_again(tmp_path):
    root = write_folder(tmp_path / "own", {"train": 30, "test": 2})
    code = (
        "import sys, time, mnist_dist.data.decoding as decoding\n"
        "fit = decoding.fit_picture\n"
        "decoding.fit_picture = lambda *arguments: time.sleep(0.2) or fit(*arguments)\n"
        "from mnist_dist.data import load_dataset\n"
        f"load_dataset('folder', root={str(root)!r})\n"
    )
    process = popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not (root / ".decoded").is_dir() or not any((root / ".decoded").glob("*.part/images.bin")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [each.suffix for each in caches(root)] == [".part"]
    dataset = load_dataset("folder", root=root)
    assert_labels_fit(dataset)
    assert [each.suffix for each in caches(root)] == [""]  # what the killed process left is gone


def test_a_new_cache_is_described_with_the_others(tmp_path, capsys):
    root = write_folder(tmp_path / "own", {"train": 4, "test": 2}, (20, 20))
    load_dataset("folder", root=root)
    [note] = capsys.readouterr().err.splitlines()
    assert str(caches(root)[0]) in note and "18 images" in note
    load_dataset("folder", root=root)
    assert capsys.readouterr().err == ""
    unfinished = root / ".decoded" / "0123.another.machine.17.part"  # it may not be deleted, so it is not counted
    unfinished.mkdir()
    (unfinished / "images.bin").write_bytes(b"x")
    load_dataset("folder", root=root, image_size=4)
    [note] = capsys.readouterr().err.splitlines()
    assert "1 other cache" in note


def test_only_what_nobody_writes_any_more_is_removed(tmp_path):
    key, host = "0123", socket.gethostname()
    left = tmp_path / f"{key}.{host}.{2**22 + 1}.part"  # no process has this number
    own = unfinished_path(tmp_path / key)
    elsewhere, old = tmp_path / f"{key}.other.node.17.part", tmp_path / f"{key}.other.node.18.part"
    for folder in (left, own, elsewhere, old):
        folder.mkdir()
        (folder / "images.bin").write_bytes(b"x")
    file_left = tmp_path / f"{key}.bin.{host}.{2**22 + 1}.part"
    file_left.write_bytes(b"x")
    for path in (old / "images.bin", old):
        os.utime(path, (time.time() - 2 * OLDEST_SECONDS,) * 2)
    remove_unfinished(tmp_path)
    assert set(tmp_path.iterdir()) == {own, elsewhere}


# --- damaged images -----------------------------------------------------------------------------------------------


def damage(root: Path) -> list[Path]:
    """Damages four images in four ways."""
    files = [root / "train" / name for name in ("amber/0.png", "blue/1.png", "green/2.png", "green/3.png")]
    files[0].write_bytes(b"")
    files[1].write_bytes(files[1].read_bytes()[:60])
    files[2].write_text("no image")
    content = bytearray(files[3].read_bytes())
    content[-30:-12] = bytes(18)
    files[3].write_bytes(content)
    return files


def test_all_damaged_images_are_named_at_once(tmp_path):
    root = write_folder(tmp_path / "own", {"train": 5, "test": 2}, (30, 30))
    files = damage(root)
    with pytest.raises(ValueError, match="4 of 21") as caught:
        load_dataset("folder", root=root, image_size=8)
    assert all(str(file) in str(caught.value) for file in files)
    assert caught.value.key == "on_bad_image"
    assert caches(root) == []


def test_damaged_images_are_left_out(tmp_path, capsys):
    root = write_folder(tmp_path / "own", {"train": 5, "test": 2}, (30, 30))
    files = damage(root)
    dataset = load_dataset("folder", root=root, on_bad_image="skip")
    assert counts_of(dataset) == [[4, 4, 3], [2] * 3, [2] * 3]
    assert_labels_fit(dataset)
    assert all(str(file) in capsys.readouterr().err for file in files[:1])
    [cache] = caches(root)
    assert sorted(json.loads((cache / "about.json").read_text())["skipped"]) == sorted(map(str, files))
    again = load_dataset("folder", root=root, on_bad_image="skip")
    assert torch.equal(again.train.images, dataset.train.images)
