"""The command `predict` classifies picture files and folders of them, and names the files that it cannot read."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFilter

from mnist_dist import load_recipe, load_run, train
from mnist_dist.data import load_dataset
from mnist_dist.engine.checkpoint import load_weights, save_weights
from mnist_dist.predict import _newest_run, main, predict_digit
from mnist_dist.run.prediction import predict
from tests.colour import CLASSES, CODE, write_pictures
from tests.data.test_pictures import disturbed


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    """A picture file of one synthetic image, dark on light."""
    path = tmp_path / "pictures" / "pattern.png"
    path.parent.mkdir()
    image = load_dataset("synthetic", limit_test=1).test.images[0, 0]
    Image.fromarray(255 - image.numpy()).resize((280, 280)).save(path)
    return path


def test_photos_of_mnist_digits_are_recognised(mnist_root, tmp_path, capsys):
    words = [f"data.root={mnist_root}", "data.limit_train=6000", "data.limit_test=100", "batch_size=64"]
    words += ["mixed_precision=no", "deterministic=true", "tracking.plots=false", "tracking.wandb.mode=disabled"]
    train(load_recipe("speed/mnist_99", *words), tmp_path / "run")
    test = load_dataset("mnist", root=mnist_root).test
    (tmp_path / "photos").mkdir()
    for position in range(100):
        large = Image.fromarray(255 - test.images[position, 0].numpy()).resize((200, 200), Image.Resampling.BICUBIC)
        sheet = Image.new("L", (640, 480), 255)
        sheet.paste(large, (3 * position, position))
        sheet.save(tmp_path / "photos" / f"{position:03}.png")
    capsys.readouterr()  # discards what the training printed
    assert main([str(tmp_path / "run"), str(tmp_path / "photos"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [set(each) for each in found] == [{"path", "class", "digit", "confidence", "top3", "unsure"}] * 100
    assert sum(each["digit"] == test.classes[label] for each, label in zip(found, test.labels[:100], strict=True)) >= 90
    digit, confidence = predict_digit(tmp_path / "photos" / "000.png", tmp_path / "run")
    assert (digit, confidence) == (found[0]["digit"], found[0]["confidence"])


RIGHT_OF_40 = {
    "plain": 36,
    "specks": 36,
    "side": 34,
    "corner": 34,
    "pencil": 32,
    "ten bits": 36,
    "float": 36,
    "thin": 32,
}
"""Disturbance of `disturbed` -> the number of 40 pages whose digit must be recognised. "thin" are small pictures."""


def test_digits_on_pages_under_bad_light_are_recognised(mnist_root, tmp_path, capsys):
    words = [f"data.root={mnist_root}", "data.limit_train=12000", "data.limit_test=100", "batch_size=64", "epochs=2"]
    words += ["optimizer.lr=0.003", "mixed_precision=no", "tracking.plots=false", "tracking.wandb.mode=disabled"]
    train(load_recipe("small_cnn", *words), tmp_path / "run")
    test, random = load_dataset("mnist", root=mnist_root).test, np.random.default_rng(1)
    (tmp_path / "pages").mkdir()
    for position in range(40):
        figure = Image.fromarray(test.images[position, 0].numpy()).resize((200, 200), Image.Resampling.BICUBIC)
        ink, top, left = np.zeros((420, 560)), random.integers(10, 210), random.integers(20, 340)
        ink[top : top + 200, left : left + 200] = np.asarray(figure) / 255
        for name in RIGHT_OF_40.keys() - {"thin"}:
            disturbed(name, ink).save(tmp_path / "pages" / f"{position:02}_{name}.tif")
        thin = figure.filter(ImageFilter.MinFilter(9)).resize((28, 28), Image.Resampling.BOX)
        thin.save(tmp_path / "pages" / f"{position:02}_thin.png")
    capsys.readouterr()
    assert main([str(tmp_path / "run"), str(tmp_path / "pages"), "--json"]) == 0
    right = dict.fromkeys(RIGHT_OF_40, 0)
    for found in json.loads(capsys.readouterr().out):
        position, name = Path(found["path"]).stem.split("_")
        right[name] += found["digit"] == test.classes[test.labels[int(position)]]
    print(right)  # shown by pytest -s, and if the test fails
    assert all(right[name] >= least for name, least in RIGHT_OF_40.items())
    assert right["ten bits"] == right["float"] == right["plain"]  # the depth of the file loses nothing


def test_bad_pictures_are_named_and_the_others_classified(debug_run, picture, capsys):
    (picture.parent / "text.png").write_text("a seven")
    paths = [str(picture.parent / name) for name in ("text.png", "absent.png", "pattern.png")]
    assert main([str(debug_run), *paths]) == 1
    output = capsys.readouterr()
    assert [path in line for path, line in zip(paths[:2], output.err.splitlines(), strict=True)] == [True, True]
    assert output.out.startswith(f"{picture}: ") and output.out.count("\n") == 1


def test_own_test_images_are_predicted_as_in_the_evaluation(tmp_path, capsys):
    pytest.importorskip("sklearn")
    words = ["epochs=2", "tracking.plots=false", "tracking.wandb.mode=disabled"]
    train(load_recipe("quickstart", *words), tmp_path / "run")
    run, test = load_run(tmp_path / "run", "last"), load_dataset("digits", limit_test=60).test
    (tmp_path / "own").mkdir()
    for position, image in enumerate(test.images):
        Image.fromarray(image[0].numpy()).save(tmp_path / "own" / f"{position:03}.png")
    capsys.readouterr()
    assert main([str(tmp_path / "run"), str(tmp_path / "own"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["digit"] for each in found] == [each["digit"] for each in predict(run, test.images)]


def test_two_figures_are_reported_in_the_line_and_in_json(debug_run, tmp_path, capsys):
    tensors, about = load_weights(debug_run / "last.safetensors")
    assert about["geometry"]["ground"] == "none"  # the debug run's images are patterns without a ground
    save_weights(debug_run / "last.safetensors", tensors, {k: v for k, v in about.items() if k != "geometry"})
    page = Image.new("L", (560, 420), 235)
    for left in (100, 400):
        page.paste(30, (left, 100, left + 20, 300))
    page.save(tmp_path / "two.png")
    assert main([str(debug_run), str(tmp_path / "two.png"), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["unsure"].startswith("two figures")
    assert main([str(debug_run), str(tmp_path / "two.png")]) == 0
    assert f"unsure: {found['unsure']}" in capsys.readouterr().out


def test_lines_and_json_agree(debug_run, picture, capsys):
    assert main([str(debug_run), str(picture)]) == 0
    line = capsys.readouterr().out
    assert main([str(debug_run), str(picture), "--json"]) == 0
    [found] = json.loads(capsys.readouterr().out)
    assert found["path"] == str(picture) and found["top3"][0] == {
        key: found[key] for key in ("class", "digit", "confidence")
    }
    for each in found["top3"]:
        assert f"{each['digit']} " in line and f"{100 * each['confidence']:.1f} %" in line


def test_pictures_in_colour_are_classified_by_the_names_of_the_classes(colour_run, colour_data, tmp_path, capsys):
    paths = write_pictures(tmp_path / "pictures", colour_data.test)
    large = tmp_path / "pictures" / "large.jpg"
    Image.open(paths[0]).resize((400, 240), Image.Resampling.NEAREST).save(large, quality=95)
    command = [str(colour_run.folder.path), str(tmp_path / "pictures"), "--allow-code", CODE]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [each["class"] for each in found] == [CLASSES[position % 3] for position in range(9)] + [CLASSES[0]]
    assert all({"path", "class", "confidence", "top3", "unsure"} == set(each) for each in found)
    for each, exact in zip(found, predict(colour_run, colour_data.test.images[:9]), strict=False):
        assert each["top3"] == exact["top3"], "a picture of the training set's shape is used unchanged"
    assert main(command) == 0
    assert f"{paths[0]}: {CLASSES[0]} " in capsys.readouterr().out


def test_an_empty_folder_is_named(debug_run, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / ".hidden").write_text("not shown")
    assert main([str(debug_run), str(tmp_path / "empty")]) == 1
    assert str(tmp_path / "empty") in capsys.readouterr().err


def test_files_whose_names_are_not_valid_text_are_classified(debug_run, picture, capsys):
    for name in (b"\xff.png", b"\xff.txt"):
        (picture.parent / os.fsdecode(name)).write_bytes(picture.read_bytes())
    (picture.parent / "text.txt").write_text("no picture")
    assert main([str(debug_run), str(picture.parent)]) == 1
    lines = capsys.readouterr().out.encode().splitlines()
    assert len(lines) == 3
    assert len({line.partition(b": ")[2] for line in lines}) == 1, "the same picture, but other predictions"


def test_a_folder_without_a_run_is_refused(refused, tmp_path, picture):
    assert refused(lambda: main([str(tmp_path), str(picture)])) == [(str(tmp_path), "missing")]


@pytest.mark.parametrize("folder", ["mine", "debug/20260101-120000", "sweeps/mine/lr=0.1"])
def test_the_newest_finished_run_is_found_in_any_folder_below_runs(tmp_path, monkeypatch, folder):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="runs"):
        predict_digit("x.png")
    for age, name in enumerate((folder, "older/1", "unfinished")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        (tmp_path / "runs" / name / "recipe.yaml").touch()
        if name != "unfinished":
            (tmp_path / "runs" / name / "summary.json").touch()
            os.utime(tmp_path / "runs" / name / "summary.json", (1e9 - age, 1e9 - age))
    assert _newest_run() == Path("runs", folder)
