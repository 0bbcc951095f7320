"""Recipes with images of the user's own: bad data ends in one screen, code needs permission, keys reach the data."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from mnist_dist import load_recipe, train
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.errors import RecipeError
from mnist_dist.recipe.changes import describe_changes
from mnist_dist.run.build import build_components
from mnist_dist.run.data import load_data
from mnist_dist.run.evaluation import load_evaluation_data
from mnist_dist.run.model_setup import prepare_model
from mnist_dist.run.reader import load_run

QUIET = ("tracking.plots=false", "tracking.wandb.mode=disabled")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory and the user's cache are the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))


def write_folder(root: Path, size: tuple[int, int] = (8, 8)) -> Path:
    for part, count in (("train", 6), ("test", 3)):
        for name, level in (("cat", 40), ("dog", 200)):
            (root / part / name).mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", size, (level, number, 9)).save(root / part / name / f"{number}.png")
    return root


def archive(**arrays: object) -> Callable[[Path], list[str]]:
    """Returns what writes an archive: images 16×16 and two classes, with these arrays in their place."""
    values = {"images": np.zeros((20, 16, 16), np.uint8), "labels": np.arange(20) % 2} | arrays

    def write(root: Path) -> list[str]:
        root.mkdir()
        np.savez(root / "own.npz", **{name: each for name, each in values.items() if each is not None})
        return ["data.dataset=npz"]

    return write


def folder(change: Callable[[Path], object], *words: str) -> Callable[[Path], list[str]]:
    """Returns what writes a sound folder and then changes it."""

    def write(root: Path) -> list[str]:
        write_folder(root)
        change(root)
        return ["data.dataset=folder", *words]

    return write


def table(*lines: str, encoding: str = "utf-8") -> Callable[[Path], list[str]]:
    """Returns what writes a sound folder, and a table of these lines."""

    def write(root: Path) -> list[str]:
        write_folder(root)
        (root / "own.csv").write_text("\n".join(lines), encoding=encoding)
        return ["data.dataset=csv"]

    return write


ROWS = ["path,label", *(f"train/{name}/{number}.png,{name}" for name in ("cat", "dog") for number in range(6))]


def module(text: str) -> Callable[[Path], list[str]]:
    """Returns what writes a module with the function `load`."""

    def write(root: Path) -> list[str]:
        root.mkdir()
        sys.modules.pop("own_module", None)
        Path("own_module.py").write_text(f"import numpy as np\ndef load():\n    {text}\n")
        return ["data.dataset=own_module:load"]

    return write


BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    # folders
    "no such folder": (lambda root: ["data.dataset=folder"], "root", "missing"),
    "a file for a folder": (lambda root: (root.write_text("") and []) or ["data.dataset=folder"], "root", "conflict"),
    "an empty folder": (lambda root: root.mkdir() or ["data.dataset=folder"], "root", "missing"),
    "no training images": (folder(lambda root: shutil.rmtree(root / "train")), "root", "missing"),
    "no class folders": (
        folder(lambda root: [shutil.rmtree(root / f"train/{name}") for name in ("cat", "dog")]), "root", "missing",
    ),
    "one class": (
        folder(lambda root: [shutil.rmtree(root / f"{part}/dog") for part in ("train", "test")]), "root", "damaged",
    ),
    "an empty class": (
        folder(lambda root: [file.unlink() for file in (root / "train/cat").iterdir()]), "root", "missing",
    ),
    "a class without training images": (
        folder(lambda root: (root / "test/dog").rename(root / "test/owl")), "root", "damaged",
    ),
    "a damaged image": (
        folder(lambda root: (root / "train/cat/0.png").write_bytes(b"GIF89a")), "on_bad_image", "damaged",
    ),
    "a text among images": (
        folder(lambda root: (root / "test/cat/notes.txt").write_text("hello")), "on_bad_image", "damaged",
    ),
    "images of several sizes": (
        folder(lambda root: Image.new("L", (9, 9)).save(root / "train/cat/0.png")), "image_size", "missing",
    ),
    "no readable image": (
        folder(lambda root: [file.write_text("") for file in root.rglob("*.png")], "data.on_bad_image=skip"),
        "root", "damaged",
    ),
    "too many validation images": (folder(lambda root: None, "data.validation=12"), "validation", "conflict"),
    "one folder too high": (
        folder(lambda root: [(root / "inner").mkdir(), *((root / part).rename(root / "inner" / part)
                                                         for part in ("train", "test"))]), "root", "missing",
    ),
    "parts of other names": (
        folder(lambda root: [(root / part).rename(root / f"seg_{part}") for part in ("train", "test")]),
        "root", "missing",
    ),
    "a broken link": (
        folder(lambda root: (root / "train/cat/9.png").symlink_to(root / "nothing.png")), "on_bad_image", "damaged",
    ),
    "a named pipe": (folder(lambda root: os.mkfifo(root / "train/cat/9.png")), "on_bad_image", "damaged"),
    "a huge image": (
        folder(lambda root: Image.new("1", (20_000, 9_000)).save(root / "train/cat/9.png")), "on_bad_image", "damaged",
    ),
    "a name of two lines": (
        folder(lambda root: [(root / part / "dog").rename(root / part / "d\nog") for part in ("train", "test")]),
        "root", "damaged",
    ),
    "no space on the disk": (
        folder(lambda root: None, "data.image_size=4096", "data.on_bad_image=skip"), "root", "unwritable",
    ),
    "two folders of one part": (
        folder(lambda root: shutil.copytree(root / "test", root / "testing")), "root", "conflict",
    ),
    "a class with a long name": (
        folder(lambda root: [(root / part / "dog").rename(root / part / ("d" * 201)) for part in ("train", "test")]),
        "root", "damaged",
    ),
    "augmentation of more pixels than an image has": (
        folder(lambda root: None, "data.image_size=32", "data.augment.cutout=33"), "augment.cutout", "conflict",
    ),
    "one weight too many": (
        folder(lambda root: None, "data.image_size=32", "data.class_weights=[1, 2, 3]"), "class_weights", "conflict",
    ),
    # tables
    "no table": (lambda root: root.mkdir() or ["data.dataset=csv"], "root", "missing"),
    "a table without columns": (table("a.png,cat"), "root", "damaged"),
    "an empty table": (table(""), "root", "damaged"),
    "a table of missing files": (table(*ROWS, "train/cat/77.png,cat"), "root", "missing"),
    "a table with short rows": (table(*ROWS, "train/cat/0.png"), "root", "damaged"),
    "a table without a label": (table(*ROWS, "train/cat/0.png,"), "root", "damaged"),
    "a table of unknown parts": (table("path,label,split", "train/cat/0.png,cat,tran"), "root", "damaged"),
    "a table of other columns": (table("filename;class", "train/cat/0.png;cat"), "root", "damaged"),
    "a table in UTF-16": (table(*ROWS, encoding="utf-16"), "root", "damaged"),
    "a file with two labels": (table(*ROWS, "train/cat/0.png,dog"), "root", "conflict"),
    "a file in two parts": (
        table("path,label,split", *(f"{row},train" for row in ROWS[1:]), "train/cat/0.png,cat,test"),
        "root", "conflict",
    ),
    "a file twice in a table without a test set": (table(*ROWS, "train/../train/cat/0.png,cat"), "root", "conflict"),
    # arrays
    "no archive": (lambda root: root.mkdir() or ["data.dataset=npz"], "root", "missing"),
    "a damaged archive": (
        lambda root: root.mkdir() or ((root / "own.npz").write_text("no") and ["data.dataset=npz"]), "root", "damaged",
    ),
    "an archive without labels": (archive(labels=None), "root", "missing"),
    "fewer labels than images": (archive(labels=np.arange(19) % 2), "root", "damaged"),
    "several labels an image": (archive(labels=np.zeros((20, 3), int)), "root", "damaged"),
    "labels that are not whole": (archive(labels=np.linspace(0, 1, 20)), "root", "damaged"),
    "images of two channels": (archive(images=np.zeros((20, 16, 16, 2), np.uint8)), "root", "damaged"),
    "images below 0": (archive(images=np.full((20, 16, 16), -1.0)), "root", "damaged"),
    "images that are not numbers": (archive(images=np.full((20, 16, 16), np.nan)), "root", "damaged"),
    "pickled images": (archive(images=np.array([None] * 20, dtype=object)), "root", "type"),
    "a class of one image": (archive(labels=np.array([0] * 19 + [1])), "root", "damaged"),
    "complex images": (archive(images=np.zeros((20, 16, 16), complex)), "root", "damaged"),
    "levels with fractions": (archive(images=np.linspace(0, 255, 20 * 256).reshape(20, 16, 16)), "root", "damaged"),
    "images without a label": (archive(labels=np.arange(20) % 3 - 1), "root", "damaged"),
    "numbers that are no labels": (archive(labels=np.array([2**64 - 5, 1] * 10, np.uint64)), "root", "damaged"),
    "infinite labels": (archive(labels=np.array([0.0, np.inf] * 10)), "root", "damaged"),
    "labels that are Python objects": (archive(labels=np.array(["a", "b"] * 10, dtype=object)), "root", "type"),
    # code
    "a function that ends the program": (module("raise SystemExit('enough')"), "dataset", "model"),
    "images of several sizes in an array": (
        module("x = [np.zeros((8, 8)), np.zeros((9, 9))]; return (x, [0, 1]), (x, [0, 1])"), "dataset", "type",
    ),
    "a tensor that NumPy does not know": (
        module("import torch; x = torch.zeros(9, 8, 8).bfloat16(); return (x, [0] * 9), (x, [0] * 9)"),
        "dataset", "type",
    ),
    "a missing label": (
        module("x = np.zeros((4, 8, 8)); y = [None, 'a', 'b', 'b']; return (x, y), (x, y)"), "dataset", "damaged",
    ),
    "one class in a function": (
        module("x = np.zeros((4, 8, 8)); return (x, [1] * 4), (x, [1] * 4)"), "dataset", "damaged",
    ),
    "a function that fails": (module("return 1 / 0"), "dataset", "model"),
    "a function that returns a number": (module("return 3"), "dataset", "type"),
    "a function that returns wrong arrays": (
        module("return (np.zeros(3), np.zeros(3)), (np.zeros(3), np.zeros(3))"), "dataset", "damaged",
    ),
}  # fmt: skip
"""Name -> what writes the data and returns the overrides of the recipe, and the key below data and the kind."""


@pytest.mark.parametrize("name", BAD)
def test_bad_data_ends_in_one_screen(tmp_path, monkeypatch, refused, capsys, name):
    write, key, kind = BAD[name]
    free = 1e6 if "space" in name else 1e12
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    words = write(tmp_path / "own")

    def start() -> None:
        train(load_recipe("lenet5", *QUIET, f"data.root={tmp_path / 'own'}", *words), tmp_path / "run")

    assert refused(start) == [(f"data.{key}", kind)]
    assert not (tmp_path / "run").exists()
    with pytest.raises(RecipeError) as caught:
        start()
    assert len(str(caught.value).splitlines()) < 40


@pytest.mark.parametrize(
    ("word", "key", "kind"),
    [
        ("data.image_size=0", "data.image_size", "range"),
        ("data.image_size=big", "data.image_size", "type"),
        ("data.image_size=[28]", "data.image_size.1", "type"),
        ("data.image_size=[28, 28, 28]", "data.image_size", "type"),
        ("data.channels=2", "data.channels", "type"),
        ("data.channels=true", "data.channels", "type"),
        ("data.channels=3.0", "data.channels", "type"),
        ("data.resize=squash", "data.resize", "unknown"),
        ("data.class_weights=[1, 0]", "data.class_weights.1", "range"),
        ("data.dataset=mnst", "data.dataset", "unknown"),
        ("data.dataset=no_such_module:load", "data.dataset", "missing"),
        ("data.dataset=pathlib:Path", "data.dataset", "unknown"),
        ("model.in_channels=3", "model.in_channels", "conflict"),
        ("model.image_size=32", "model.image_size", "conflict"),
    ],
)
def test_wrong_values_of_the_new_keys(refused, word, key, kind):
    assert refused(lambda: load_recipe("lenet5", word)) == [(key, kind)]


def test_a_vision_transformer_needs_patches_that_divide_the_image(refused):
    pytest.importorskip("timm", reason="timm is not installed")
    words = ("model={name: timm/vit_tiny_patch16_224, patch_size: 8, depth: 1}", "optimizer.lr=0.1")
    assert refused(lambda: load_recipe("debug", *words)) == [("model.patch_size", "range")]
    assert load_recipe("debug", *words, "data.image_size=32")  # 8 divides 32
    assert load_recipe("debug", *words, "data.dataset=cifar10")


def test_a_key_of_the_data_that_changes_the_result_is_a_change():
    def changes(*words: str) -> list[str]:
        old, new = load_recipe("lenet5", "data.dataset=folder", "data.root=a"), load_recipe("lenet5", *words)
        return [line.partition(":")[0] for line in describe_changes(old, new)]

    assert changes("data.dataset=folder", "data.root=b") == ["data.root"]
    assert changes("data.dataset=folder", "data.root=a", "data.image_size=32") == ["data.image_size"]
    assert describe_changes(load_recipe("lenet5", "data.root=a"), load_recipe("lenet5", "data.root=b")) == []


# --- runs ---------------------------------------------------------------------------------------------------------


def test_a_colour_folder_is_trained_and_evaluated(tmp_path):
    root = write_folder(tmp_path / "own", (20, 12))
    recipe = load_recipe("lenet5", *QUIET, "data.dataset=folder", f"data.root={root}", "batch_size=4", "epochs=1")
    result = train(recipe, tmp_path / "run")
    assert result["eval.last.accuracy"] >= 0
    [shown] = [line for line in Path("run/console.log").read_text().splitlines() if line.startswith("data ")]
    assert "12×20" in shown and "2 classes" in shown
    run = load_run(tmp_path / "run", "last")
    assert run.shape == (3, 12, 20) and run.about["classes"] == ["cat", "dog"]
    assert run.model(torch.zeros(2, 3, 12, 20)).shape == (2, 2)
    _, data, _ = load_evaluation_data(run)
    assert data.shape == (3, 12, 20) and len(data) == 6
    with pytest.raises(RecipeError):
        load_evaluation_data(run, "data.image_size=10")


def test_class_weights_follow_the_counts_or_the_recipe(tmp_path, refused):
    archive(labels=np.array([0] * 12 + [1] * 4 + [2] * 4))(tmp_path / "own")
    words = (*QUIET, "data.dataset=npz", f"data.root={tmp_path / 'own'}", "batch_size=4", "data.limit_train=15")

    def weights(value: str) -> tuple[float, ...]:
        recipe = load_recipe("lenet5", *words, f"data.class_weights={value}")
        data = load_data(recipe, launched_world())
        module = prepare_model(recipe, data).module
        components = build_components(recipe, "no", data.train, module)
        return components.update._label_loss._weights

    counts = torch.bincount(load_data(load_recipe("lenet5", *words), launched_world()).train.labels).float()
    torch.testing.assert_close(weights("balanced") * counts, torch.full((3,), 5.0))
    found = weights("[2, 1, 4]")
    torch.testing.assert_close(found / found[1], torch.tensor([2.0, 1.0, 4.0]))
    torch.testing.assert_close((found * counts).sum(), torch.tensor(15.0))
    assert weights("none") is None
    assert refused(lambda: weights("[1, 2]")) == [("data.class_weights", "conflict")]


# --- code ---------------------------------------------------------------------------------------------------------

OWN_DATA = """
import numpy as np
from pathlib import Path
Path("imported").touch()

def load():
    images = np.zeros((40, 16, 16), np.uint8)
    images[::2] = 200
    labels = np.arange(40) % 2
    return (images[:30], labels[:30]), (images[30:], labels[30:])
"""


def test_a_run_folder_does_not_import_a_function_without_permission(tmp_path, refused):
    Path("my_own_data.py").write_text(OWN_DATA)
    recipe = load_recipe("lenet5", *QUIET, "data.dataset=my_own_data:load", "batch_size=10")
    train(recipe, tmp_path / "run")
    sys.modules.pop("my_own_data")
    Path("imported").unlink()
    run = load_run(tmp_path / "run", "last")
    assert refused(lambda: load_evaluation_data(run)) == [("--allow-code", "code")]
    assert not Path("imported").exists()
    _, data, _ = load_evaluation_data(load_run(tmp_path / "run", "last", allow_code="my_own_data"))
    assert len(data) == 10 and Path("imported").exists()
    _, data, _ = load_evaluation_data(run, "data.dataset=my_own_data:load")  # a person named it
    assert len(data) == 10
