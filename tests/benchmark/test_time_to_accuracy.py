"""Time to accuracy: each seed is the run that `train` makes, and every failure is reported."""

from types import SimpleNamespace

import pytest

from mnist_dist import load_recipe, train
from mnist_dist.benchmark import __main__ as benchmark
from mnist_dist.benchmark import time_to_accuracy
from mnist_dist.cli import run_command
from mnist_dist.recipe.file import bundled_recipes

WORDS = ("data.dataset=synthetic", "data.limit_train=700", "data.limit_test=200", "mixed_precision=no", "epochs=2")


@pytest.fixture
def short_reference(monkeypatch):
    """Limits the reference to two steps; these tests are not about its epoch of 60,000 images."""
    complete = time_to_accuracy._train_reference
    monkeypatch.setattr(
        time_to_accuracy, "_train_reference", lambda train, test, seed, steps=None: complete(train, test, seed, 2)
    )


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("optimizer.name=sgd", "optimizer.betas=null", "ema_decay=0.9"),
        ("schedule={name: plateau, patience: 0, factor: 0.1}", "optimizer.lr=0.003", "epochs=3"),
    ],
    ids=str,
)
def test_each_seed_is_the_run_that_train_makes(short_reference, tmp_path, words):
    recipe = load_recipe("speed/mnist_99", *WORDS, "schedule.max_lr=0.003", *words, "tracking.wandb.mode=disabled")
    result = time_to_accuracy.measure(recipe, 2)
    expected = []
    for seed in range(2):
        summary = train(recipe.model_copy(update={"seed": seed}), tmp_path / str(seed))
        expected.append(summary["eval.last.accuracy"])
    assert list(result["ours"]["accuracy"]["each"]) == expected
    assert len(set(expected)) > 1
    assert result["parameters"] == 25_546


def test_the_summary_has_mean_deviation_and_number_of_seeds(short_reference):
    result = time_to_accuracy.measure(load_recipe("speed/mnist_99", *WORDS, "batch_size=4", "max_steps=3"), 2)
    accuracy = result["ours"]["accuracy"]
    text = time_to_accuracy.to_markdown(result, "the command")
    assert f"{accuracy['mean']:.3f} ± {accuracy['sd']:.3f} %" in text
    assert "`the command`" in text and "fp32" in text
    assert "(n = 2, after 1 epoch(s))" in text, "the reference trains one epoch"
    assert "### mnist_99, 0.02 epoch(s)" in text and "(n = 2, after 0.02 epoch(s))" in text, "max_steps is 3"


def test_fewer_images_than_a_batch_of_the_reference_are_measured():
    words = ("data.limit_train=64", "data.limit_test=16", "batch_size=8", "mixed_precision=no")
    recipe = load_recipe("speed/mnist_99_4", "data.dataset=synthetic", *words)
    accuracies = time_to_accuracy.measure(recipe, 1)["ours"]["accuracy"]["each"]
    assert len(accuracies) == 1 and accuracies[0] in [100 * hits / 16 for hits in range(17)]


def test_training_that_fails_or_stops_gives_a_message_and_no_figure(short_reference, monkeypatch, capsys):
    words = ["--time-to-accuracy", "speed/mnist_99", "--seeds", "1", *WORDS]
    assert run_command(lambda: benchmark.main([*words, "schedule.max_lr=1e30"])) == 1
    output = capsys.readouterr()
    assert "seed 0" in output.err and "reference" not in output.out
    monkeypatch.setattr(time_to_accuracy, "fit", lambda *arguments: False)
    assert run_command(lambda: benchmark.main(words)) == 1
    output = capsys.readouterr()
    assert "signal" in output.err and "reference" not in output.out


@pytest.mark.parametrize("optimizer", ["{name: nadam, lr: 0.1}", "{name: sgd, lr: 0.1, momentum: 0.9, dampening: 0.5}"])
def test_an_optimizer_whose_state_does_not_start_with_zeros_is_refused(optimizer, refused):
    recipe = load_recipe("lenet5", "data.dataset=synthetic", "data.limit_train=200", f"optimizer={optimizer}")
    assert refused(lambda: time_to_accuracy.measure(recipe, 1)) == [("optimizer.name", "unsupported")]


def test_the_result_is_written_into_the_recipes_head_comment(short_reference, tmp_path):
    path = tmp_path / "fast.yaml"
    path.write_text(bundled_recipes()["speed/mnist_99"].read_text(encoding="utf-8"), encoding="utf-8")
    words = ["--time-to-accuracy", str(path), "--seeds", "1", "--note", *WORDS, "max_steps=3"]
    assert benchmark.main(words) == 0
    [line] = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("# measured:")]
    assert " % in " in line and "n = 1, cpu" in line


def test_several_processes_are_refused(monkeypatch, refused):
    two = SimpleNamespace(state=SimpleNamespace(num_processes=2))
    monkeypatch.setattr(time_to_accuracy.BenchmarkSetup, "prepare", lambda recipe: two)
    recipe = load_recipe("speed/mnist_99")
    assert refused(lambda: time_to_accuracy.measure(recipe, 1)) == [("--time-to-accuracy", "unsupported")]
