"""A record's seeds are the runs that `train` makes, though they share one network's memory; all are told of."""

from types import SimpleNamespace

import pytest

from mnist_dist import load_recipe, train
from mnist_dist.benchmark import __main__ as benchmark
from mnist_dist.benchmark import time_to_accuracy as record
from mnist_dist.cli import run_command
from mnist_dist.errors import RecipeError
from mnist_dist.recipe.file import bundled_recipes

WORDS = ("data.dataset=synthetic", "data.limit_train=700", "data.limit_test=200", "mixed_precision=no", "epochs=2")


@pytest.fixture
def small_reference(monkeypatch):
    """The reference over a few steps: its epoch of 60,000 images is not what these tests are about."""
    whole = record._reference
    monkeypatch.setattr(record, "_reference", lambda train, test, seed, steps=None: whole(train, test, seed, 2))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("optimizer.name=sgd", "optimizer.betas=null", "ema_decay=0.9"),
        ("schedule={name: plateau, patience: 0, factor: 0.1}", "optimizer.lr=0.003", "epochs=3"),
    ],
    ids=str,
)
def test_each_seed_is_the_run_that_train_makes(small_reference, tmp_path, words):
    recipe = load_recipe("speed/mnist_99", *WORDS, "schedule.max_lr=0.003", *words, "tracking.wandb.mode=disabled")
    found = record.measure(recipe, 3)
    expected = []
    for seed in range(3):
        summary = train(recipe.model_copy(update={"seed": seed}), tmp_path / str(seed))
        expected.append(summary["eval.last.accuracy"])
    assert list(found["ours"]["accuracy"]["each"]) == expected
    assert len(set(expected)) > 1
    assert found["parameters"] == 22_346


def test_the_lines_tell_mean_deviation_and_number(small_reference, tmp_path):
    result = record.measure(load_recipe("speed/mnist_99", *WORDS, "max_steps=3"), 2)
    accuracy = result["ours"]["accuracy"]
    text = record.to_markdown(result, "the command")
    assert f"{accuracy['mean']:.3f} ± {accuracy['sd']:.3f} %" in text
    assert "n = 2" in text and "`the command`" in text and "fp32" in text


def test_less_than_a_batch_of_images_is_measured_too():
    words = ("data.limit_train=64", "data.limit_test=16", "batch_size=8", "mixed_precision=no")
    recipe = load_recipe("speed/mnist_99_4", "data.dataset=synthetic", *words)
    accuracies = record.measure(recipe, 1)["ours"]["accuracy"]["each"]
    assert len(accuracies) == 1 and accuracies[0] in [100 * hits / 16 for hits in range(17)]


def test_a_training_that_breaks_off_is_no_figure(small_reference, monkeypatch, capsys):
    words = ["--time-to-accuracy", "speed/mnist_99", "--seeds", "1", *WORDS]
    assert run_command(lambda: benchmark.main([*words, "schedule.max_lr=1e30"])) == 1
    assert "is not finite" in capsys.readouterr().err
    monkeypatch.setattr(record, "fit", lambda *arguments: False)
    assert run_command(lambda: benchmark.main(words)) == 1
    assert "asked to stop while measuring" in capsys.readouterr().err


@pytest.mark.parametrize("optimizer", ["{name: nadam, lr: 0.1}", "{name: sgd, lr: 0.1, momentum: 0.9, dampening: 0.5}"])
def test_an_optimizer_that_does_not_begin_with_zeros_is_refused(optimizer):
    words = ["data.dataset=synthetic", "data.limit_train=200", f"optimizer={optimizer}"]
    recipe = load_recipe("lenet5", *words)
    with pytest.raises(RecipeError, match="begins with the state filled with zeros"):
        record.measure(recipe, 1)


def test_the_figures_go_into_the_recipe_s_head(small_reference, tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text(bundled_recipes()["speed/mnist_99"].read_text(encoding="utf-8"), encoding="utf-8")
    words = ["--time-to-accuracy", str(path), "--seeds", "1", "--note", *WORDS, "max_steps=3"]
    assert benchmark.main(words) == 0
    [line] = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# measured:")]
    assert " % in " in line and "n = 1, cpu" in line


def test_a_record_is_of_one_process(monkeypatch):
    two = SimpleNamespace(state=SimpleNamespace(num_processes=2))
    monkeypatch.setattr(record.BenchmarkSetup, "prepare", lambda recipe: two)
    with pytest.raises(RecipeError, match="one process"):
        record.measure(load_recipe("speed/mnist_99"), 1)
