"""The command `ensemble` evaluates the mean of the probabilities of several runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from mnist_dist import load_recipe, load_run, train
from mnist_dist.compare.__main__ import main as compare
from mnist_dist.engine.checkpoint import load_weights, save_weights
from mnist_dist.engine.evaluation import evaluate_mean, score
from mnist_dist.ensemble import main
from mnist_dist.evaluate import evaluate
from tests.colour import CLASSES, CODE


@pytest.fixture(scope="module")
def runs(_finished_debug_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the runs lenet5 and simple_cnn, and copies of lenet5: other test set, other classes."""
    folder = tmp_path_factory.mktemp("ensemble")
    shutil.copytree(_finished_debug_run, folder / "lenet5")
    words = ["model.name=simple_cnn", "data.limit_train=128", "tracking.plots=false", "tracking.wandb.mode=disabled"]
    train(load_recipe("debug", *words), folder / "simple_cnn")

    short = shutil.copytree(folder / "lenet5", folder / "short=1")
    text = (short / "recipe.yaml").read_text()
    assert "limit_test: 256\n" in text
    (short / "recipe.yaml").write_text(text.replace("limit_test: 256\n", "limit_test: 50\n"))

    letters = shutil.copytree(folder / "lenet5", folder / "letters")
    tensors, about = load_weights(letters / "last.safetensors")
    save_weights(letters / "last.safetensors", tensors, about | {"classes": list("abcdefghij")})
    return folder


def test_each_member_has_its_own_figures_and_the_ensemble_those_of_the_mean(runs, tmp_path, capsys):
    paths = [str(runs / name) for name in ("lenet5", "simple_cnn")]
    assert main([*paths, "data.limit_test=200", "--json", str(tmp_path / "report.json")]) == 0
    found, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    figures = ("accuracy", "loss", "calibration_error", "precision", "balanced_accuracy", "macro_f1", "auroc")
    for path, member in zip(paths, found["members"], strict=True):
        alone = evaluate(load_run(path, "last"), "data.limit_test=200")
        assert member == {"run": path} | {key: alone[key] for key in figures}
    assert found["images"] == sum(map(sum, found["confusion"])) == 200
    # The logarithm is concave: the loss of the mean is at most the mean of the losses.
    assert found["loss"] < sum(member["loss"] for member in found["members"]) / 2
    mean_row = next(line for line in printed.splitlines() if "mean of 2 " in line)
    for name, digits in (("accuracy", 2), ("loss", 4), ("calibration_error", 4)):
        assert f"{found[name]:.{digits}f}" in mean_row
    assert str(found["disagreements"]) in printed.splitlines()[-1]
    assert "\x1b" not in printed


def test_keep_writes_a_line_that_compare_shows_as_a_row(refused, runs, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(runs)
    kept, report = tmp_path / "kept.jsonl", tmp_path / "report.json"
    assert main(["lenet5", "simple_cnn", "--keep", str(kept), "--json", str(report)]) == 0
    found = json.loads(kept.read_text())
    members = [json.loads((runs / name / "summary.json").read_text()) for name in ("lenet5", "simple_cnn")]
    assert found["recipe"] == "mean of 2 × debug" and found["seed"] == members[0]["seed"]
    for key in ("parameters", "train_seconds"):
        assert found[key] == sum(each[key] for each in members)
    assert found["eval.last.accuracy"] == json.loads(report.read_text())["accuracy"]
    assert found["device"] == members[0]["device"]

    capsys.readouterr()
    assert compare([str(kept), "--no-html"]) == 0
    [row] = [line for line in capsys.readouterr().out.splitlines() if "mean of 2 × debug" in line]
    assert f"{found['parameters']:,}" in row and f"{found['eval.last.accuracy']:.2f}" in row

    assert refused(lambda: main(["lenet5", "simple_cnn", "--keep", str(kept), "data.limit_test=20"])) == [
        ("--keep", "conflict")
    ]
    assert len(kept.read_text().splitlines()) == 1
    assert refused(lambda: main(["lenet5", "simple_cnn", "--keep", str(tmp_path)])) == [("--keep", "unwritable")]


def test_a_precision_that_the_device_lacks_is_named_and_not_kept(refused, runs, tmp_path, capsys):
    half = shutil.copytree(runs / "lenet5", tmp_path / "half")
    text = (half / "recipe.yaml").read_text()
    (half / "recipe.yaml").write_text(text.replace("mixed_precision: 'no'", "mixed_precision: fp16"))
    words, report = [str(half), str(runs / "simple_cnn")], tmp_path / "report.json"
    assert main([*words, "--json", str(report)]) == 0
    found = json.loads(report.read_text())
    [note] = found["notes"]
    assert "fp32" in note and "fp16" in note and note in capsys.readouterr().out.splitlines()
    assert [each["precision"] for each in found["members"]] == ["fp32", "fp32"]
    assert refused(lambda: main([*words, "--keep", str(tmp_path / "kept.jsonl")])) == [("--keep", "unsupported")]
    assert not (tmp_path / "kept.jsonl").exists()


def test_keep_needs_the_summaries_of_the_members(refused, runs, tmp_path):
    unfinished = shutil.copytree(runs / "lenet5", tmp_path / "unfinished")
    (unfinished / "summary.json").unlink()
    words = [str(unfinished), str(runs / "simple_cnn"), "--keep", str(tmp_path / "kept.jsonl")]
    assert refused(lambda: main(words)) == [("--keep", "missing")]
    for damaged in ("{", "[1]", '{"recipe": "debug"}', '{"recipe": {}}'):
        (unfinished / "summary.json").write_text(damaged)
        assert refused(lambda: main(words)) == [("--keep", "damaged")]
    assert not (tmp_path / "kept.jsonl").exists()


def test_the_mean_of_probabilities():
    labels = torch.tensor([0, 0, 1])
    tables = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [1.0, 0.0]], [[0.5, 0.5], [0.6, 0.4], [1.0, 0.0]]])
    found = evaluate_mean([score(table.log(), labels) for table in tables], labels)
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.7, 0.3], [0.4, 0.6], [1.0, 0.0]]))
    assert found.accuracy == pytest.approx(100 / 3)
    smallest = torch.finfo(torch.float32).tiny
    expected = -(torch.tensor([0.7, 0.4, smallest], dtype=torch.float64).log().mean())
    assert found.loss == pytest.approx(float(expected), rel=1e-6)


def test_disagreements_are_counted_by_image(runs, monkeypatch, tmp_path):
    first, second = (torch.eye(10)[torch.zeros(256, dtype=torch.long)] for _ in range(2))
    second[:7] = torch.eye(10)[3]
    answers, labels = iter([first, second]), torch.zeros(256, dtype=torch.long)
    monkeypatch.setattr("mnist_dist.ensemble.evaluate_run", lambda *arguments: score(next(answers).log(), labels))
    assert main([str(runs / "lenet5"), str(runs / "simple_cnn"), "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["disagreements"] == 7


@pytest.mark.parametrize(
    ("words", "key", "kind"),
    [
        ([], "RUN|key=value", "usage"),
        (["data.root=/data"], "RUN", "usage"),
        (["lenet5"], "lenet5", "usage"),
        (["lenet5", "nowhere"], "nowhere", "missing"),
        (["lenet5", "simple_cnn", "lenet5/../lenet5"], "lenet5/../lenet5", "conflict"),
        (["lenet5", "short=1"], "short=1", "conflict"),
        (["lenet5", "letters"], "letters", "conflict"),
        (["lenet5", "simple_cnn", "data.limit_tset=3"], "data.limit_tset", "unknown"),
        (["lenet5", "simple_cnn", "--data", "mnits"], "data.dataset", "unknown"),
        (["lenet5", "simple_cnn", "--json", "nowhere/report.json"], "--json", "unwritable"),
    ],
)
def test_bad_input_is_refused(refused, runs, monkeypatch, words, key, kind):
    monkeypatch.chdir(runs)
    assert refused(lambda: main(words)) == [(key, kind)]


def test_networks_of_colour_images_are_averaged(colour_run, tmp_path, capsys):
    twin = shutil.copytree(colour_run.folder.path, tmp_path / "twin")
    assert main([str(colour_run.folder.path), str(twin), "--allow-code", CODE, "--json", str(tmp_path / "a.json")]) == 0
    found = json.loads((tmp_path / "a.json").read_text())
    assert found["accuracy"] == colour_run.summary["eval.last.accuracy"] and found["disagreements"] == 0
    assert list(found["classes"]) == list(CLASSES)
    assert f"{found['macro_f1']:.4f}" in capsys.readouterr().out
