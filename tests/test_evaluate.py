"""The command `evaluate` reproduces accuracy and loss of the training's last evaluation exactly."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image

from mnist_dist import load_recipe, load_run, train
from mnist_dist.data import DATASETS, Images
from mnist_dist.data.sources.request import Splits
from mnist_dist.errors import RecipeError
from mnist_dist.evaluate import evaluate, main, show
from mnist_dist.run.evaluation import (
    Split,
    calibration_error,
    class_averages,
    evaluate_run,
    load_evaluation_data,
)
from mnist_dist.run.prediction import predict_picture
from tests.colour import CLASSES

QUIET = ["tracking.plots=false", "tracking.wandb.mode=disabled"]


@pytest.fixture(scope="module")
def validated_run(tmp_path_factory) -> Path:
    # simple_cnn normalises by the evaluated batch, so other batches would give other figures.
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    words = ["data.dataset=synthetic", "data.limit_train=256", "data.limit_test=203", "data.validation=100"]
    train(load_recipe("simple_cnn", *words, *QUIET, "eval_batch_size=50"), folder)
    return folder


@pytest.mark.parametrize(("split", "prefix"), [("validation", "eval.last"), ("test", "test")])
def test_the_figures_equal_those_of_the_training(validated_run, split, prefix):
    found, summary = evaluate(load_run(validated_run, "last"), split=split), load_run(validated_run).summary
    assert found["accuracy"] == summary[f"{prefix}.accuracy"]
    assert found["loss"] == summary[f"{prefix}.loss"]
    assert found["images"] == {"validation": 100, "test": 203}[split]


@pytest.mark.parametrize("place", ["auto", "device", "host", "disk"])
def test_images_on_the_host_go_to_the_device_batch_by_batch(validated_run, monkeypatch, place):
    moved, move = [], Images.to
    monkeypatch.setattr(Images, "to", lambda images, device: moved.append(len(images)) or move(images, device))
    monkeypatch.setattr("mnist_dist.data.store.choose_place", lambda *arguments: ("host", ""))
    run = load_run(validated_run, "last")
    assert evaluate(run, f"data.place={place}")["loss"] == run.summary["test.loss"]
    assert moved == ([203] if place == "device" else [])


def test_evaluate_does_not_change_the_runs_network(debug_run):
    run = load_run(debug_run, "last")
    before = {name: (value.device, value.stride()) for name, value in run.model.state_dict().items()}
    evaluate(run)
    assert {name: (value.device, value.stride()) for name, value in run.model.state_dict().items()} == before


def test_the_figures_of_the_classes_add_up(validated_run):
    found = evaluate(load_run(validated_run, "last"))
    assert 20 < found["accuracy"] < 100, "too easy or too hard to test the sums"
    confusion = torch.tensor(found["confusion"])
    assert int(confusion.sum()) == found["images"] == sum(each["images"] for each in found["classes"].values())
    assert 100 * int(confusion.diagonal().sum()) / found["images"] == found["accuracy"]
    assert [each["correct"] for each in found["classes"].values()] == confusion.diagonal().tolist()


def test_calibration_error():
    labels = torch.tensor([0, 0, 1, 1])
    sure = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert calibration_error(sure, labels) == 0
    assert calibration_error(sure.flip(1), labels) == 1
    # A confidence of 0.9 and an accuracy of 0.5.
    assert calibration_error(torch.tensor([[0.9, 0.1]] * 4), labels) == pytest.approx(0.4)


def test_averages_over_the_classes_count_each_class_the_same():
    pytest.importorskip("sklearn")
    # Class a: 8 images, all right. Class b: 2 images, one taken for a. Class c: no image.
    labels = torch.tensor([0] * 8 + [1] * 2)
    probabilities = torch.tensor([[0.8, 0.1, 0.1]] * 8 + [[0.2, 0.7, 0.1], [0.6, 0.3, 0.1]])
    found = class_averages(probabilities, labels)
    assert found["balanced_accuracy"] == pytest.approx(75)
    assert found["macro_f1"] == pytest.approx((2 * 8 / 17 + 2 * 1 / 3) / 2)
    assert found["auroc"] == 1  # the images of b have the lowest probabilities of a
    probabilities[9, :2] = torch.tensor([0.85, 0.05])
    # Of 16 pairs of an image of a and one of b, 8 are in the wrong order, for either class.
    assert class_averages(probabilities, labels)["auroc"] == pytest.approx(0.5)
    assert class_averages(probabilities, torch.zeros(10, dtype=torch.int64))["auroc"] is None
    assert class_averages(probabilities * torch.nan, labels)["auroc"] is None


def test_averages_agree_with_the_report(validated_run, capsys):
    pytest.importorskip("sklearn")
    found = evaluate(load_run(validated_run, "last"))
    accuracies = [each["accuracy"] for each in found["classes"].values() if each["images"]]
    assert found["balanced_accuracy"] == pytest.approx(sum(accuracies) / len(accuracies))
    assert 0 < found["macro_f1"] < 1 and 0.5 < found["auroc"] <= 1
    show(found)
    printed = capsys.readouterr().out
    for figure in (f"{found['balanced_accuracy']:.2f} %", f"{found['macro_f1']:.4f}", f"{found['auroc']:.4f}"):
        assert figure in printed.splitlines()[1]


def test_without_scikit_learn_one_note_says_what_is_missing(validated_run, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    found = evaluate(load_run(validated_run, "last"))
    assert [found[key] for key in ("balanced_accuracy", "macro_f1", "auroc")] == [None] * 3
    [note] = found["notes"]
    assert "scikit-learn" in note
    show(found)
    assert "F1" not in capsys.readouterr().out.replace(note, "")


def result_of(classes: list[str]) -> dict:
    """A report in which every class has four images, of which the first class loses two to the second."""
    confusion = (4 * torch.eye(len(classes), dtype=torch.int64)).tolist()
    confusion[0][:2] = [2, 2]
    figures = {name: {"images": 4, "correct": 4, "accuracy": 100.0} for name in classes}
    figures[classes[0]] = {"images": 4, "correct": 2, "accuracy": 50.0}
    totals = {"accuracy": 90.0, "loss": 1.0, "images": 9, "calibration_error": 0.1, "dataset": "mine", "split": "test"}
    averages = {"balanced_accuracy": 90.0, "macro_f1": 0.9, "auroc": 0.9}
    return {**totals, **averages, "weights": "last", "notes": [], "classes": figures, "confusion": confusion}


@pytest.mark.parametrize("count", [3, 12, 20, 21, 100])
def test_many_classes_with_long_names_fit_into_the_printed_table(capsys, count):
    names = [f"class number {position} of a large collection" for position in range(count)]
    show(result_of(names))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 200
    [row] = [line for line in lines if names[0] in line and "50.00 %" in line]
    assert (names[1] in row) == (count > 20)
    assert sum("100.00 %" in line for line in lines) == min(count, 40) - 1


def test_colour_images_are_evaluated(colour_run):
    found = evaluate(colour_run)
    assert found["accuracy"] == colour_run.summary["eval.last.accuracy"]
    assert list(found["classes"]) == list(CLASSES)


def test_the_command_prints_the_figures_and_writes_json(validated_run, tmp_path, capsys):
    assert main([str(validated_run), "--json", str(tmp_path / "report.json"), "--weights", "best"]) == 0
    written, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    assert [written[key] for key in ("images", "dataset", "split", "weights")] == [203, "synthetic", "test", "best"]
    figures = f"{written['accuracy']:.2f} %", f"{written['loss']:.4f}", f"{written['calibration_error']:.4f}"
    for figure in (*figures, "203", "synthetic", "best"):
        assert figure in printed.splitlines()[0]
    assert "\x1b" not in printed


def test_flip_evaluates_the_mean_of_image_and_mirror_image(validated_run, tmp_path, capsys):
    assert main([str(validated_run), "--tta", "flip", "--json", str(tmp_path / "report.json")]) == 0
    written, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    plain, run = evaluate(load_run(validated_run, "last")), load_run(validated_run, "last")
    assert "tta" not in plain
    flipped = written.pop("tta")
    assert written == json.loads(json.dumps(plain)), "the plain figures must not change"

    recipe, data, _ = load_evaluation_data(run)
    mirrored = replace(data, images=data.images.flip(-1))
    straight, mirror = (evaluate_run(run, recipe, images).probabilities.double() for images in (data, mirrored))
    mean, labels = (straight + mirror) / 2, data.labels
    assert not torch.allclose(straight, mirror, atol=0.01)
    assert flipped["name"] == "flip"
    assert flipped["accuracy"] == pytest.approx(100 * float((mean.argmax(dim=1) == labels).double().mean()))
    assert flipped["loss"] == pytest.approx(float(-mean[range(len(labels)), labels].log().mean()), rel=1e-5)
    assert flipped["calibration_error"] == pytest.approx(calibration_error(mean.float(), labels), rel=1e-5)
    first, *others = printed.splitlines()
    assert f"{plain['accuracy']:.2f} %" in first and "flip" not in first
    [line] = [each for each in others if "flip" in each]
    assert f"{flipped['accuracy']:.2f} %" in line and f"{flipped['loss']:.4f}" in line


@pytest.mark.parametrize(
    ("words", "key", "kind"),
    [
        (["RUN", "--tta", "crop"], "--tta", "usage"),
        (["nowhere"], "nowhere", "missing"),
        (["RUN", "--data", "mnits"], "data.dataset", "unknown"),
        (["RUN", "--data", "emnist", "data.root=/nowhere"], "data.root", "missing"),
        (["RUN", "data.limit_tset=3"], "data.limit_tset", "unknown"),
        (["RUN", "--split", "validation"], "--split", "conflict"),
        (["RUN", "--json", "RUN/recipe.yaml/report.json"], "--json", "unwritable"),
    ],
)
def test_bad_input_is_refused(refused, debug_run, monkeypatch, words, key, kind):
    def no_network(*arguments, **keywords):
        raise OSError("no network")

    no_network.splits = torchvision.datasets.EMNIST.splits
    monkeypatch.setattr(torchvision.datasets, "EMNIST", no_network)
    words = [word.replace("RUN", str(debug_run)) for word in words]
    assert refused(lambda: main(words)) == [(key, kind)]


def test_data_with_another_number_of_classes_is_refused(refused, debug_run, monkeypatch):
    source = DATASETS["synthetic"]

    def eleven_classes(request):
        splits = source(request)
        return Splits(*(replace(part, classes=(*part.classes, "ten")) for part in splits.parts))

    monkeypatch.setitem(DATASETS, "synthetic", eleven_classes)
    assert refused(lambda: main([str(debug_run)])) == [("data.dataset", "conflict")]


def test_a_published_set_with_other_class_names_is_compared_by_position(debug_run, monkeypatch):
    before = evaluate(load_run(debug_run, "last"))
    source = DATASETS["synthetic"]

    def renamed(request):
        splits = source(request)
        return Splits(*(replace(part, classes=tuple("abcdefghij")) for part in splits.parts))

    monkeypatch.setitem(DATASETS, "synthetic", renamed)
    found = evaluate(load_run(debug_run, "last"))
    assert found["accuracy"] == before["accuracy"] and list(found["classes"]) == list("abcdefghij")
    assert [note for note in found["notes"] if "by position" in note]
    assert not [note for note in before["notes"] if "by position" in note]


def test_a_network_that_changed_after_the_training_is_refused(refused, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = (
        "from torch import nn\nnet = lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))\n"
    )
    (tmp_path / "net_of_old.py").write_text(source)
    words = ["data.limit_train=64", "data.limit_test=20", "model.name=net_of_old:net"]
    train(load_recipe("debug", *words, *QUIET), tmp_path / "run")
    (tmp_path / "net_of_old.py").write_text(source.replace("num_classes))", "99))"))
    monkeypatch.delitem(sys.modules, "net_of_old")
    importlib.invalidate_caches()
    words = [str(tmp_path / "run"), "--allow-code", "net_of_old"]
    assert refused(lambda: main(words)) == [(str(tmp_path / "run"), "damaged")]


def test_it_uses_the_kernels_of_the_recipe(debug_run):
    recipe = debug_run / "recipe.yaml"
    text = recipe.read_text()
    assert "tf32: convolutions\n" in text
    for switch in ("on", "off"):
        recipe.write_text(text.replace("tf32: convolutions\n", f"tf32: {switch}\n"))
        evaluate(load_run(debug_run, "last"))
        assert torch.backends.cuda.matmul.allow_tf32 == (switch == "on")


def test_damaged_weights_are_refused(refused, debug_run):
    (debug_run / "last.safetensors").write_bytes(b"nothing")
    assert refused(lambda: main([str(debug_run)])) == [(str(debug_run), "damaged")]


# --- the user's own images ----------------------------------------------------------------------------------------

CORNERS = {"ant": (0, 0), "bird": (8, 0), "cat": (0, 8), "dog": (8, 8)}
"""Class -> the left and upper pixel of the bright corner of its pictures."""


def write_classes(folder: Path, *names: str, mode: str = "RGB") -> Path:
    """Writes ten pictures of each class, with one bright corner, into folder/CLASS."""
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(10):
            picture = Image.new("L", (16, 16), 5 * number)
            picture.paste(250 - 5 * number, (*CORNERS[name], CORNERS[name][0] + 8, CORNERS[name][1] + 8))
            picture.convert(mode).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def animals_run(tmp_path_factory) -> Path:
    """A run on colour pictures of three classes, which its network never confuses."""
    folder = tmp_path_factory.mktemp("animals")
    root = write_classes(folder / "photos", "bird", "cat", "dog")
    words = ["model.name=lenet5", "data.dataset=folder", f"data.root={root}", "epochs=8", "batch_size=6"]
    words += ["data.augment={}", "data.limit_train=null", "data.limit_test=null", "schedule.max_lr=0.01"]
    train(load_recipe("debug", *words, *QUIET), folder / "run")
    assert evaluate(load_run(folder / "run", "last"), split="all")["accuracy"] == 100
    return folder / "run"


def test_a_run_whose_own_images_have_changed_gets_a_note(tmp_path):
    root = write_classes(tmp_path / "photos", "bird", "cat")
    words = ["model.name=lenet5", "data.dataset=folder", f"data.root={root}", "epochs=1", "batch_size=6"]
    train(load_recipe("debug", *words, "data.augment={}", "data.limit_train=null", *QUIET), tmp_path / "run")

    def noted() -> bool:
        return any("have changed" in note for note in evaluate(load_run(tmp_path / "run"))["notes"])

    assert not noted()
    (root / "cat" / "0.png").rename(root / "bird" / "10.png")
    assert noted()


def evaluate_folder(run: Path, root: Path, split: Split = "all") -> dict[str, Any]:
    """Evaluates the last weights of a run on a folder of pictures."""
    return evaluate(load_run(run, "last"), f"data.root={root}", split=split)


def test_every_image_of_a_new_folder_is_evaluated_on_request(animals_run, tmp_path):
    new = write_classes(tmp_path / "new", "bird", "cat", "dog")
    found = evaluate_folder(animals_run, new)
    assert (found["images"], found["split"], found["accuracy"]) == (30, "all", 100)
    assert not [note for note in found["notes"] if "--split all" in note]
    part = evaluate_folder(animals_run, new, split="test")
    assert part["images"] == 6 and [note for note in part["notes"] if "6 of the 30 images" in note]
    assert not [note for note in evaluate(load_run(animals_run))["notes"] if "--split all" in note]


def test_with_validation_images_all_means_each_image_once(validated_run):
    assert evaluate(load_run(validated_run, "last"), split="all")["images"] == 256 + 100 + 203


@pytest.mark.parametrize("names", [("dog", "bird"), ("cat", "dog")])
def test_own_classes_are_compared_by_name(animals_run, tmp_path, names):
    found = evaluate_folder(animals_run, write_classes(tmp_path / "new", *names))
    assert found["accuracy"] == 100 and list(found["classes"]) == ["bird", "cat", "dog"]
    assert {name for name, each in found["classes"].items() if each["images"]} == set(names)


def test_own_classes_that_the_network_does_not_know_are_refused_even_if_their_number_fits(animals_run, tmp_path):
    new = write_classes(tmp_path / "new", "ant", "bird", "cat")
    with pytest.raises(RecipeError, match=r"does not know ant; it knows 3: bird, cat, dog") as caught:
        evaluate_folder(animals_run, new)
    assert [(each.key, each.kind) for each in caught.value.problems] == [("data.dataset", "conflict")]


def test_grey_pictures_are_evaluated_by_a_network_for_colour_as_predict_does(animals_run, tmp_path):
    new = write_classes(tmp_path / "new", "bird", "cat", "dog", mode="L")
    assert evaluate_folder(animals_run, new)["accuracy"] == 100
    assert predict_picture(load_run(animals_run, "last"), new / "cat" / "3.png")["class"] == "cat"


def test_images_of_another_size_are_refused_with_the_keys_that_help(animals_run, tmp_path):
    new = write_classes(tmp_path / "new", "bird", "cat", "dog")
    with pytest.raises(RecipeError, match=r"add data.image_size=\[16,16\] data.channels=3$"):
        evaluate(load_run(animals_run, "last"), f"data.root={new}", "data.image_size=20")
