"""Several runs as one: the mean of their probabilities, judged as a single run is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mnist_dist import load_recipe, load_run, train
from mnist_dist.compare import __main__ as compare
from mnist_dist.data import images as datasets
from mnist_dist.engine.evaluation import score
from mnist_dist.ensemble import main, mean_of
from mnist_dist.errors import RecipeError
from mnist_dist.evaluate import evaluate

WORDS = ["data.limit_train=512", "data.limit_test=203", "epochs=2"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble")
    for name in ("lenet5", "simple_cnn"):
        train(load_recipe("debug", *WORDS, f"model.name={name}"), folder / name)
    train(load_recipe("debug", "data.limit_train=64", "data.limit_test=50"), folder / "short=1")
    return folder


def test_members_are_what_they_are_alone_and_the_whole_is_their_mean(runs, tmp_path, capsys):
    paths = [str(runs / name) for name in ("lenet5", "simple_cnn")]
    assert main([*paths, "data.limit_test=200", "--json", str(tmp_path / "report.json")]) == 0
    found, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    for path, member in zip(paths, found["members"], strict=True):
        alone = evaluate(load_run(path, "last"), "data.limit_test=200")
        assert member == {"run": path} | {key: alone[key] for key in ("accuracy", "loss", "calibration_error")}
    assert found["images"] == sum(map(sum, found["confusion"])) == 200
    # The logarithm is concave: the mean of probabilities never loses more than the members do on average.
    assert found["loss"] < sum(member["loss"] for member in found["members"]) / 2
    assert "mean of 2  " in printed and f"the members disagree on {found['disagreements']}" in printed
    assert "\x1b" not in printed


def test_an_ensemble_is_kept_as_a_row_of_the_table(tmp_path):
    folders = []
    for seed in (3, 4):
        folders.append(str(tmp_path / str(seed)))
        train(load_recipe("debug", "data.limit_train=64", "data.limit_test=50", f"seed={seed}"), folders[-1])
    kept, report = tmp_path / "kept.jsonl", tmp_path / "report.json"
    assert main([*folders, "--keep", str(kept), "--json", str(report)]) == 0
    [row] = compare.group(compare.Comparison([kept]).read())
    own = [json.loads((Path(folder) / "summary.json").read_text()) for folder in folders]
    cells = {column: text for column, (text, _) in row.cells().items()}
    assert cells["recipe"] == "mean of 2 × debug" and cells["n"] == "1"
    assert cells["parameters"] == f"{2 * own[0]['parameters']:,}"
    assert cells["last epoch"] == f"{json.loads(report.read_text())['accuracy']:.2f}"
    assert cells["ran on"] == own[0]["device"] and cells["verdict"] == ""
    with pytest.raises(RecipeError, match="own test set"):
        main([*folders, "--keep", str(kept), "data.limit_test=20"])
    assert len(kept.read_text().splitlines()) == 1
    with pytest.raises(RecipeError, match="--keep needs a file"):
        main([*folders, "--keep", str(tmp_path)])


def test_the_mean_of_probabilities():
    labels = torch.tensor([0, 0, 1])
    tables = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [1.0, 0.0]], [[0.5, 0.5], [0.6, 0.4], [1.0, 0.0]]])
    found = mean_of([score(table.log(), labels) for table in tables], labels)
    torch.testing.assert_close(found.probabilities, torch.tensor([[0.7, 0.3], [0.4, 0.6], [1.0, 0.0]]))
    assert found.accuracy == pytest.approx(100 / 3)
    smallest = torch.finfo(torch.float32).tiny
    expected = -(torch.tensor([0.7, 0.4, smallest], dtype=torch.float64).log().mean())
    assert found.loss == pytest.approx(float(expected), rel=1e-6)


def test_disagreements_are_counted_by_image(runs, monkeypatch, tmp_path):
    first, second = torch.eye(10)[torch.zeros(203, dtype=torch.long)], torch.eye(10)[torch.zeros(203, dtype=torch.long)]
    second[:7] = torch.eye(10)[3]
    answers, labels = iter([first, second]), torch.zeros(203, dtype=torch.long)
    monkeypatch.setattr("mnist_dist.ensemble.evaluate_run", lambda *arguments: score(next(answers).log(), labels))
    assert main([str(runs / "lenet5"), str(runs / "simple_cnn"), "--json", str(tmp_path / "report.json")]) == 0
    assert json.loads((tmp_path / "report.json").read_text())["disagreements"] == 7


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "RUN"),
        (["data.root=/data"], "name at least two run folders"),
        (["lenet5"], "one run is no ensemble; name at least two"),
        (["lenet5", "nowhere"], "nowhere is not a run folder"),
        (["lenet5", "simple_cnn", "lenet5/../lenet5"], "the same run as lenet5: it would have two votes"),
        (["lenet5", "short=1"], "short=1\n *has another test set than lenet5; name one for all"),
        (["lenet5", "simple_cnn", "data.limit_tset=3"], "did you mean 'limit_test'"),
        (["lenet5", "simple_cnn", "--data", "mnits"], "did you mean 'mnist'"),
        (["lenet5", "simple_cnn", "--json", "nowhere/report.json"], "--json\n *nowhere/report.json cannot be written"),
    ],
)
def test_bad_input_is_refused(runs, monkeypatch, words, expected):
    monkeypatch.chdir(runs)
    with pytest.raises(RecipeError, match=expected):
        main(words)


def test_runs_of_other_classes_are_refused(runs, monkeypatch):
    monkeypatch.chdir(runs)
    synthetic = datasets.DATASETS["synthetic"]

    def load(root, split, download):
        return [replace(part, classes=tuple("abcdefghij")) for part in synthetic(root, split, download)]

    monkeypatch.setitem(datasets.DATASETS, "synthetic", load)
    train(load_recipe("debug", *WORDS), runs / "other")
    with pytest.raises(RecipeError, match=r"other\n *knows other classes than lenet5"):
        main(["lenet5", "other"])
