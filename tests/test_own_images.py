"""README's section "Your own images": its six lines, from a folder of pictures to an exported page."""

from __future__ import annotations

import importlib
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from mnist_dist import load_recipe, load_run
from mnist_dist.cli import run_command
from mnist_dist.data import load_dataset
from mnist_dist.data.pictures import read_picture
from mnist_dist.export import exporter
from mnist_dist.run.components import training_geometry
from tests.colour import make_images

ROOT = Path(__file__).parent.parent
SIZES = ((40, 56), (70, 50), (64, 64))
"""Height and width of the pictures, which are of several sizes as photos are."""


@pytest.fixture
def photos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder `photos` of the section in an empty working folder, and the picture `new.jpg`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for part, count, seed in (("train", 8, 0), ("test", 4, 1)):
        for number, size in zip(range(count), SIZES * count, strict=False):
            made = make_images(2, 10 * number + seed, (3, *size))
            for image, name in zip(made.images, ("cat", "dog"), strict=True):
                path = tmp_path / "photos" / part / name / f"{number}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image.movedim(0, -1).numpy()).save(path, quality=95)
    Image.open(tmp_path / "photos" / "test" / "dog" / "1.jpg").save(tmp_path / "new.jpg", quality=95)
    return tmp_path / "photos"


def run_line(line: str) -> None:
    """Runs a line `mnist-dist COMMAND …` in this process."""
    program, command, *words = shlex.split(line, comments=True)
    assert program == "mnist-dist"
    for name in (f"mnist_dist.{command}.__main__", f"mnist_dist.{command}"):
        try:
            main: Callable[[list[str]], int] = importlib.import_module(name).main
            break
        except ModuleNotFoundError as error:
            assert error.name in name
    assert run_command(lambda: main(words)) == 0, line


def test_the_six_lines_lead_from_a_folder_of_pictures_to_a_prediction(photos, monkeypatch, capsys):
    pytest.importorskip("onnxscript")
    monkeypatch.setattr(exporter, "load_runtime", lambda archive: {"script": b"", "wasm": b""})
    section = (ROOT / "README.md").read_text().partition("## Your own images\n")[2].partition("\n## ")[0]
    [block] = re.findall(r"```bash\n(.*?)```", section, re.DOTALL)
    listing, *lines = block.replace("\\\n", "").splitlines()
    assert listing.startswith("ls photos ") and len(lines) == 5
    for line in lines:
        run_line(line.replace("--recipe resnet18", "--recipe lenet5 epochs=1"))  # the export of a ResNet takes 20 s
    output = capsys.readouterr().out
    for name in ("cat", "dog"):
        assert name in output
    assert re.search(r"^new\.jpg: (cat|dog)  \d", output, re.MULTILINE)
    run = load_run("runs/photos", "last")
    assert run.shape == (3, 64, 64) and run.about["classes"] == ["cat", "dog"] and run.geometry.resize == "crop"
    assert (run.folder.path / "plots" / "explain_new.png").is_file()
    page = (run.folder.path / "export" / "last.html").read_text()
    assert "drop a picture" in page and json.dumps(["cat", "dog"]) in page


@pytest.mark.parametrize("resize", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("channels", [1, 3])
def test_predict_prepares_a_file_as_the_training_did(photos, resize, channels):
    words = ["data.dataset=folder", f"data.resize={resize}", "data.image_size=[24,40]", f"data.channels={channels}"]
    recipe = load_recipe("debug", *words, f"data.root={photos}", "data.limit_train=null", "data.limit_test=null")
    dataset = load_dataset("folder", root=photos, image_size=(24, 40), channels=channels, resize=resize)
    geometry = training_geometry(recipe, dataset.train)
    known = {image.numpy().tobytes() for image in dataset.test.images}
    files = sorted((photos / "test").rglob("*.jpg"))
    assert len(files) == len(known) == 8
    for path in files:
        image = read_picture(path, geometry)
        assert image.dtype == torch.uint8 and image.numpy().tobytes() in known, path
