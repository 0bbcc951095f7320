"""A search gives a table, goes on where it stopped, and chooses without the test set."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from mnist_dist.cli import run_command
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.errors import RecipeError
from mnist_dist.sweep import __main__ as sweep
from mnist_dist.train import main as train_main

LAUNCH = Path(__file__).parents[2] / "launch"
WORDS = ["data.dataset=synthetic", "data.limit_train=128", "data.limit_test=50", "epochs=1", "batch_size=64"]
WORDS += ["tracking.wandb.mode=disabled"]
SWEEP = """\
program: mnist_dist.train
method: {method}
parameters: {parameters}
command: [python, -m, "${{program}}", --recipe=lenet5, --world-size=1, label_smoothing=0.1, "${{args_no_hyphens}}"]
"""


def search(*words: str | Path) -> int:
    return run_command(lambda: sweep.main(list(map(str, words))))


@pytest.fixture
def started(monkeypatch) -> list[str]:
    """Trials train in this process, for speed; the names of those that did."""
    names: list[str] = []

    def train_here(searched: sweep.Sweep, trial: sweep.Trial, log: Path) -> int:
        names.append(trial.name)
        with log.open("w") as output:
            streams, sys.stderr = sys.stderr, output
            try:
                words = ["--recipe", searched.recipe, *searched.words, *trial.words]
                return run_command(lambda: train_main([*words, "--run-dir", str(trial.folder.path)]))
            finally:
                sys.stderr = streams

    monkeypatch.setattr(sweep, "train_trial", train_here)
    return names


def rows(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "sweep.json").read_text())["trials"]


def file(tmp_path: Path, method: str, parameters: dict[str, Any], **more: Any) -> Path:
    content = yaml.safe_load(SWEEP.format(method=method, parameters=json.dumps(parameters))) | more
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def choices(path: Path, *, words: tuple[str, ...] = (), count: int | None = None, seed: int = 0) -> list[sweep.Choice]:
    return sweep.read_file(path, list(words), count, seed).choices


# --- whole searches -----------------------------------------------------------------------------------------------


def test_a_grid_becomes_a_table_best_first_and_is_not_trained_twice(started, tmp_path, capsys):
    words = ["lenet5", *WORDS, "optimizer.lr=0.003,1e30", "optimizer.name=adam,sgd", "schedule.name=constant"]
    words += ["schedule.step_size=null", "schedule.gamma=null", "optimizer.weight_decay=null", "--run-dir", tmp_path]
    assert search(*words) == 0
    assert len(started) == 4 and len(set(started)) == 4
    found = rows(tmp_path)
    done, failed = [row for row in found if "failed" not in row], [row for row in found if "failed" in row]
    assert found == [*done, *failed] and done and failed, "one learning rate is impossible; its neighbours go on"
    assert all("is not finite" in row["failed"] for row in failed)
    assert all((tmp_path / f"{row['trial']}.log").is_file() for row in failed)
    accuracies = [row["eval.best.accuracy"] for row in done]
    assert accuracies == sorted(accuracies, reverse=True)
    for row in done:
        summary = json.loads((tmp_path / row["trial"] / "summary.json").read_text())
        assert (summary["eval.split"], summary["recipe"]) == ("validation", row["trial"])
        assert row["eval.best.accuracy"] == summary["eval.best.accuracy"]
    recipe = yaml.safe_load((tmp_path / done[0]["trial"] / "recipe.yaml").read_text())
    assert (recipe["tracking"]["wandb"]["group"], recipe["tracking"]["wandb"]["job_type"]) == ("lenet5", "sweep")
    output, table = capsys.readouterr().out, (tmp_path / "sweep.md").read_text()
    assert output.count("so many training images are held out") == 1
    assert (
        table.count("\n| ") == 2 + 4 and f"best: {done[0]['trial']}" in table and f"best: {done[0]['trial']}" in output
    )
    assert table.index(done[0]["trial"]) < table.index(failed[0]["trial"])
    assert "\n\non all training images: python" in table and table.strip().endswith("data.validation=0")

    before = {row["trial"] for row in failed}
    started.clear()
    assert search(*words) == 0
    assert set(started) == before, "what failed is tried again, what is done is not"
    assert rows(tmp_path) == found


def test_a_sweep_file_starts_each_trial_as_its_command_says(tmp_path):
    """The bundled file, one trial of it, in a process of its own."""
    overrides = [word for word in WORDS if not word.startswith("batch_size")] + ["data.validation=100"]
    assert search(LAUNCH / "sweep.yaml", *overrides, "--count", "1", "--run-dir", tmp_path) == 0
    [row] = rows(tmp_path)
    recipe = yaml.safe_load((tmp_path / row["trial"] / "recipe.yaml").read_text())
    assert row["values"] == {"optimizer.lr": recipe["optimizer"]["lr"], "batch_size": recipe["batch_size"]}
    assert recipe["data"]["validation"] == 100
    assert not list(tmp_path.glob("*.log"))


def test_when_all_fail_the_exit_code_is_1_and_the_reason_is_shown(started, tmp_path, capsys):
    assert search("lenet5", *WORDS, "optimizer.lr=1e30,1e31", "--run-dir", tmp_path) == 1
    assert "every trial failed" in capsys.readouterr().out
    assert all("is not finite" in row["failed"] for row in rows(tmp_path))


def test_a_trial_that_is_asked_to_stop_stops_the_search(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "train_trial", lambda *arguments: PREEMPTED)
    assert search("lenet5", *WORDS, "optimizer.lr=0.1,0.2", "--run-dir", tmp_path) == PREEMPTED
    assert "the same command goes on" in capsys.readouterr().out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_reaches_the_trial_and_stops_the_search(tmp_path, number):
    """Left to itself the trial would train on, and the same command would start a second one beside it."""
    content = yaml.safe_load(SWEEP.format(method="grid", parameters='{"seed": {"values": [1, 2]}}'))
    endless = [word for word in WORDS if "epochs" not in word] + ["data.validation=50", "epochs=5000"]
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(content))
    where = [str(tmp_path / "search.yaml"), "--run-dir", str(tmp_path / "runs")]
    command = [sys.executable, "-m", "mnist_dist.sweep", *where, *endless]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        metrics, deadline = tmp_path / "runs" / "seed=1" / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.is_file() and metrics.read_text()) and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        output, _ = process.communicate(timeout=60)
    assert process.returncode == PREEMPTED and "the same command goes on" in output
    assert (tmp_path / "runs" / "seed=1" / "STATUS").read_text() == "preempted\n"
    assert not (tmp_path / "runs" / "seed=2").exists()


def test_a_folder_of_another_search_is_refused_before_anything_is_trained(started, tmp_path, capsys):
    assert search("lenet5", *WORDS, "optimizer.lr=0.001,0.002", "--count", "1", "--run-dir", tmp_path) == 0
    started.clear()
    words = ["lenet5", *WORDS, "label_smoothing=0.1", "optimizer.lr=0.001,0.002", "--run-dir", tmp_path]
    assert search(*words) == 2 and not started
    assert "label_smoothing: 0.0 -> 0.1" in capsys.readouterr().err


# --- what is drawn ------------------------------------------------------------------------------------------------


def test_a_grid_has_every_combination_once(tmp_path):
    path = file(
        tmp_path, "grid", {"optimizer.lr": {"values": [0.1, 0.2]}, "seed": {"values": [1, 2]}, "epochs": {"value": 3}}
    )
    expected = [{"optimizer.lr": lr, "seed": seed, "epochs": 3} for lr in (0.1, 0.2) for seed in (1, 2)]
    assert choices(path) == expected
    assert choices(path, count=3) == expected[:3]


def test_a_random_search_follows_from_its_seed_and_keeps_to_the_bounds(tmp_path):
    parameters = {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "label_smoothing": {"min": 0.0, "max": 0.2},
        "batch_size": {"min": 32, "max": 64},
        "optimizer.name": {"values": ["adam", "sgd"]},
        "epochs": {"value": 2},
    }
    path = file(tmp_path, "random", parameters, run_cap=200)
    drawn = choices(path)
    assert drawn == choices(path) != choices(path, seed=1)
    assert choices(path, count=20) == drawn[:20], "a longer search begins with the shorter one"
    assert len(drawn) == 200 == len({json.dumps(each) for each in drawn})
    assert all(1e-4 <= each["optimizer.lr"] <= 1e-1 and 0 <= each["label_smoothing"] <= 0.2 for each in drawn)
    assert {type(each["batch_size"]) for each in drawn} == {int} and {each["epochs"] for each in drawn} == {2}
    assert {each["batch_size"] for each in drawn} >= {32, 64} and {each["optimizer.name"] for each in drawn} == {
        "adam",
        "sgd",
    }
    # In the logarithm: as many between 1e-4 and 1e-3 as in the decade above, where uniform draws would hardly come.
    decades = [sum(math.floor(math.log10(each["optimizer.lr"])) == decade for each in drawn) for decade in (-4, -3, -2)]
    assert all(40 <= count <= 95 for count in decades), decades


def test_draws_that_are_equal_are_one_trial(tmp_path):
    assert len(choices(file(tmp_path, "random", {"seed": {"values": [1, 2]}}, run_cap=50))) == 2


def test_several_values_may_be_lists():
    found = sweep.read_words("lenet5", ["data.augment.scale=[0.9, 1.1],[1, 1]", "optimizer.betas=[0.9, 0.99]"], None)
    assert found.choices == [{"data.augment.scale": [0.9, 1.1]}, {"data.augment.scale": [1, 1]}]
    assert found.words == ["optimizer.betas=[0.9, 0.99]"]


def test_a_trial_is_named_by_its_values():
    assert sweep._names([{"optimizer.lr": 0.1, "seed": 1}]) == ["lr=0.1,seed=1"]
    assert sweep._names([{"optimizer.name": "adam", "model.name": "torchvision/resnet18"}]) == [
        "optimizer.name=adam,model.name=torchvision_resnet18"
    ]
    long = [{"model.name": "x" * 90 + end} for end in "ab"]
    assert len(set(sweep._names(long))) == 2 and all(len(name) < 100 for name in sweep._names(long))


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lenet5"], "nothing is searched"),
        (["lenet5", "optimizer.lr=0.1"], "nothing is searched"),
        (["lenet5", "optimizer.weigth_decay=0.1,0.2"], "did you mean 'weight_decay'"),
        (["lenet5", "batch_size=64,2.5"], "expected a whole number, got 2.5"),
        (["lenet5", "batch_size=64,{"], "cannot be read"),
        (["lenet5", "data.dataset=synthetic", "data.validation=0,100"], "cannot be searched"),
        (["lenet_5", "seed=1,2"], "did you mean 'lenet5'"),
        (["lenet5", "seed=1,2", "--count", "0"], "--count is at least 1"),
        (["lenet5", "seed=1,2", "data.root=/nowhere", "data.dataset=kmnist"], "data.root"),
    ],
)
def test_a_bad_command_line_is_one_screen(words, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sweep, "train_trial", lambda *arguments: pytest.fail("it was trained"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    assert search(*words, "--run-dir", tmp_path / "new") == 2
    error = capsys.readouterr().err
    assert expected in error and "Traceback" not in error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("method", "parameters", "more", "expected"),
    [
        ("bayes", {"seed": {"values": [1]}}, {}, "not bayes; that needs W&B's server: wandb sweep"),
        ("grid", {"optimizer.lr": {"min": 0.1, "max": 0.2}}, {}, "expected `values: [a, b]`"),
        ("grid", {"seed": {"values": []}}, {}, "expected `values: [a, b]`"),
        ("grid", {"seed": 3}, {}, "expected `values: [a, b]`"),
        ("grid", {}, {}, "a mapping of recipe keys"),
        ("random", {"seed": {"values": [1]}}, {}, "a random search has no end"),
        ("random", {"seed": {"values": [1]}}, {"run_cap": "many"}, "expected a whole number"),
        ("random", {"a": {"min": 2, "max": 1}}, {"run_cap": 1}, "min is to be less than max"),
        ("random", {"a": {"min": 1}}, {"run_cap": 1}, "`min` and `max`"),
        ("random", {"a": {"distribution": "normal", "mu": 0, "sigma": 1}}, {"run_cap": 1}, "`min` and `max`"),
        ("random", {"a": {"distribution": "q_uniform", "min": 0, "max": 1}}, {"run_cap": 1}, "q_uniform"),
        ("random", {"a": {"distribution": "log_uniform_values", "min": 0, "max": 1}}, {"run_cap": 1}, "above 0"),
        ("random", {"a": {"distribution": "int_uniform", "min": 0.5, "max": 1.5}}, {"run_cap": 1}, "whole numbers"),
        ("grid", {"seed": {"values": [1]}}, {"metric": {"name": "eval/loss"}}, "judged by eval/accuracy"),
        ("grid", {"seed": {"values": [1]}}, {"early_terminate": {"type": "hyperband"}}, "unknown key"),
        ("grid", {"seed": {"values": [1]}}, {"command": ["python", "${program}"]}, "${args_no_hyphens} is needed"),
        ("grid", {"seed": {"values": [1]}}, {"command": ["${args_no_hyphens}"]}, "--recipe=NAME is needed"),
        ("grid", {"seed": {"values": [1]}}, {"command": ["${x}", "${args_no_hyphens}"]}, "${x} is not known"),
        ("grid", {"seed": {"values": [1]}}, {"program": "train.py"}, "program: mnist_dist.train"),
    ],
)
def test_what_a_sweep_file_cannot_ask_for_here(method, parameters, more, expected, tmp_path):
    path = file(tmp_path, method, parameters, **more)
    with pytest.raises(RecipeError) as refusal:
        choices(path)
    assert expected in str(refusal.value) and "search.yaml" in str(refusal.value)


def test_a_searched_key_is_not_overridden_too(tmp_path):
    with pytest.raises(RecipeError, match="searches this key"):
        choices(file(tmp_path, "grid", {"seed": {"values": [1]}}), words=("seed=2",))


def test_a_search_is_one_process(monkeypatch, capsys):
    class Two:
        num_processes = 2

    monkeypatch.setattr(sweep, "launched_world", Two)
    assert search("lenet5", "seed=1,2") == 2
    assert "one process" in capsys.readouterr().err


def test_a_command_that_cannot_be_started_is_named(tmp_path, capsys):
    content = yaml.safe_load(SWEEP.format(method="grid", parameters='{"seed": {"values": [1]}}'))
    content["command"][0] = os.fspath(tmp_path / "no_such_python")
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(content))
    words = [*WORDS, "data.validation=50", "--run-dir", tmp_path / "runs"]
    assert search(tmp_path / "search.yaml", *words) == 2
    assert "no_such_python" in capsys.readouterr().err
