"""The door from a run folder to numbers: those of the training's last evaluation, to the image."""

import json

import pytest
import torch
from torch import nn

from mnist_dist import load_recipe, load_run, train
from mnist_dist.errors import RecipeError
from mnist_dist.evaluate import evaluate, main
from mnist_dist.run.evaluation import calibration_error

WORDS = ["data.limit_train=640", "data.limit_test=203", "epochs=2", "tracking.wandb.mode=disabled"]


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    # simple_cnn normalises by the evaluated batch: other batches would give other numbers.
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    recipe = load_recipe("simple_cnn", *WORDS, "data.dataset=synthetic", "data.validation=100", "eval_batch_size=50")
    train(recipe, folder)
    return folder


@pytest.mark.parametrize(("split", "prefix"), [("validation", "eval.last"), ("test", "test")])
def test_the_numbers_are_the_training_s_own(run_dir, split, prefix):
    found, summary = evaluate(load_run(run_dir, "last"), split=split), load_run(run_dir).summary
    assert found["accuracy"] == summary[f"{prefix}.accuracy"]
    assert found["loss"] == summary[f"{prefix}.loss"]
    assert found["images"] == {"validation": 100, "test": 203}[split]


def test_the_run_s_own_network_stays_where_and_as_it_was(run_dir):
    run = load_run(run_dir, "last")
    before = {name: (value.device, value.stride()) for name, value in run.model.state_dict().items()}
    evaluate(run)
    assert {name: (value.device, value.stride()) for name, value in run.model.state_dict().items()} == before


def test_classes_and_confusions_add_up(run_dir):
    found = evaluate(load_run(run_dir, "last"))
    confusion = torch.tensor(found["confusion"])
    assert int(confusion.sum()) == found["images"] == sum(each["images"] for each in found["classes"].values())
    assert 100 * int(confusion.diagonal().sum()) / found["images"] == found["accuracy"]
    assert [each["correct"] for each in found["classes"].values()] == confusion.diagonal().tolist()


def test_calibration_error():
    labels = torch.tensor([0, 0, 1, 1])
    sure = torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    assert calibration_error(sure, labels) == 0
    assert calibration_error(sure.flip(1), labels) == 1
    # Nine tenths sure, and right in half of the cases.
    assert calibration_error(torch.tensor([[0.9, 0.1]] * 4), labels) == pytest.approx(0.4)


def test_the_door_prints_and_writes(run_dir, tmp_path, capsys):
    assert main([str(run_dir), "--json", str(tmp_path / "report.json"), "--weights", "best"]) == 0
    written, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    assert f"{written['accuracy']:.2f} % of 203 images (synthetic, test)" in printed
    assert "best weights" in printed and "\x1b" not in printed


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["nowhere"], "not a run folder"),
        (["RUN", "--data", "mnits"], "did you mean 'mnist'?"),
        (["RUN", "--data", "emnist", "data.root=/nowhere"], "data.root"),
        (["RUN", "data.limit_tset=3"], "limit_test"),
    ],
)
def test_bad_input_is_refused(run_dir, words, expected):
    with pytest.raises(RecipeError, match=expected):
        main([str(run_dir) if word == "RUN" else word for word in words])


def test_a_network_that_has_changed_since_is_refused(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = (
        "from torch import nn\nnet = lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(784, num_classes))\n"
    )
    (tmp_path / "net_of_old.py").write_text(source)
    train(load_recipe("debug", *WORDS, "data.dataset=synthetic", "model.name=net_of_old:net"), tmp_path / "run")
    monkeypatch.setattr("net_of_old.net", lambda num_classes: nn.Sequential(nn.Flatten(), nn.Linear(784, 99)))
    with pytest.raises(RecipeError, match=r"net_of_old:net cannot be built with its weights: .*size mismatch"):
        main([str(tmp_path / "run")])


def test_it_computes_with_the_kernels_of_the_run(tmp_path, monkeypatch):
    for switch in ("on", "off"):
        words = ["data.dataset=synthetic", f"engine.tf32={switch}"]
        train(load_recipe("debug", *WORDS, *words), tmp_path / switch)
    for switch in ("on", "off"):
        evaluate(load_run(tmp_path / switch, "last"))
        assert torch.backends.cuda.matmul.allow_tf32 == (switch == "on")


def test_damaged_weights_are_refused(run_dir, tmp_path):
    (tmp_path / "recipe.yaml").write_text((run_dir / "recipe.yaml").read_text())
    (tmp_path / "last.safetensors").write_bytes(b"nothing")
    with pytest.raises(RecipeError, match="not a whole weights file"):
        main([str(tmp_path)])
