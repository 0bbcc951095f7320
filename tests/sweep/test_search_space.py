"""The trials that a command line or a sweep file gives, and sweep files that are refused."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from mnist_dist.errors import RecipeError
from mnist_dist.sweep.search_space import Choice, read_file, read_words
from mnist_dist.sweep.trials import trial_names

COMMAND = ["python", "-m", "${program}", "--recipe=lenet5", "label_smoothing=0.1", "${args_no_hyphens}"]
OTHER_PROGRAMS = [
    *(["rm", "-rf", "/"], ["./python"], ["/bin/sh", "-c", "id"], ["${env}", "curl"]),
    *(["python", "-c", "import os"], ["python", "evil.py"], ["python", "-i"]),
    *(["accelerate", "launch", "evil.py"], ["accelerate", "test"], ["accelerate", "launch", "--no_python", "id"]),
    *(["torchrun", "--standalone", "evil.py"], ["torchrun", "--no-python", "id"]),
]
"""Beginnings of a command that would start something else before the trainer, or instead of it."""
ONE_SEED = {"seed": {"values": [1]}}


def sweep_file(tmp_path: Path, method: str, parameters: dict[str, Any], **more: Any) -> Path:
    content = {"program": "mnist_dist.train", "method": method, "parameters": parameters, "command": COMMAND} | more
    path = tmp_path / "search.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def drawn(distribution: str, low: float, high: float) -> dict[str, Any]:
    return {"distribution": distribution, "min": low, "max": high}


def choices(path: Path, *, words: tuple[str, ...] = (), count: int | None = None, seed: int = 0) -> list[Choice]:
    return read_file(path, list(words), count, seed).choices


def test_a_grid_has_every_combination_once(tmp_path):
    parameters = {"optimizer.lr": {"values": [0.1, 0.2]}, "seed": {"values": [1, 2]}, "epochs": {"value": 3}}
    path = sweep_file(tmp_path, "grid", parameters)
    expected = [{"optimizer.lr": lr, "seed": seed, "epochs": 3} for lr in (0.1, 0.2) for seed in (1, 2)]
    assert choices(path) == expected
    assert choices(path, count=3) == expected[:3]


def test_the_overrides_of_the_file_and_of_the_command_line_apply_to_all_trials(tmp_path):
    found = read_file(sweep_file(tmp_path, "grid", ONE_SEED), ["epochs=1"], None, 0)
    assert (found.recipe, found.words) == ("lenet5", ["label_smoothing=0.1", "epochs=1"])
    assert found.command == [sys.executable, "-m", "mnist_dist.train"]


def test_a_random_search_is_a_function_of_its_seed_and_stays_in_the_bounds(tmp_path):
    parameters = {
        "optimizer.lr": {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1},
        "label_smoothing": {"min": 0.0, "max": 0.2},
        "batch_size": {"min": 32, "max": 64},
        "optimizer.name": {"values": ["adam", "sgd"]},
        "epochs": {"value": 2},
    }
    path = sweep_file(tmp_path, "random", parameters, run_cap=200)
    found = choices(path)
    assert found == choices(path) != choices(path, seed=1)
    assert choices(path, count=20) == found[:20], "a longer search starts with the shorter one"
    assert len(found) == 200 == len({json.dumps(each) for each in found})
    assert all(1e-4 <= each["optimizer.lr"] <= 1e-1 and 0 <= each["label_smoothing"] <= 0.2 for each in found)
    assert {type(each["batch_size"]) for each in found} == {int} and {each["epochs"] for each in found} == {2}
    assert {each["batch_size"] for each in found} >= {32, 64}
    assert {each["optimizer.name"] for each in found} == {"adam", "sgd"}
    # Log-uniform: each decade gets a third of the draws. Uniform draws would rarely be below 1e-2.
    decades = [sum(math.floor(math.log10(each["optimizer.lr"])) == decade for each in found) for decade in (-4, -3, -2)]
    assert all(40 <= count <= 95 for count in decades), decades


def test_nested_parameters_are_dotted_keys(tmp_path):
    nested = {"optimizer": {"parameters": {"lr": {"values": [0.1, 0.2]}}}, "seed": {"values": [1]}}
    nested["data"] = {"parameters": {"augment": {"parameters": {"rotation": {"value": 5}, "shear": {"value": 1}}}}}
    fixed = {"data.augment.rotation": 5, "data.augment.shear": 1}
    expected = [{"optimizer.lr": lr, "seed": 1, **fixed} for lr in (0.1, 0.2)]
    assert choices(sweep_file(tmp_path, "grid", nested)) == expected
    drawn_ones = choices(sweep_file(tmp_path, "random", nested, run_cap=30))
    assert sorted(drawn_ones, key=lambda each: each["optimizer.lr"]) == expected


def test_equal_draws_are_one_trial(tmp_path):
    assert len(choices(sweep_file(tmp_path, "random", {"seed": {"values": [1, 2]}}, run_cap=50))) == 2


def test_the_values_of_a_key_may_be_lists():
    found = read_words("lenet5", ["data.augment.scale=[0.9, 1.1],[1, 1]", "optimizer.betas=[0.9, 0.99]"], None)
    assert found.choices == [{"data.augment.scale": [0.9, 1.1]}, {"data.augment.scale": [1, 1]}]
    assert found.words == ["optimizer.betas=[0.9, 0.99]"]


def test_a_trial_is_named_by_its_values():
    assert trial_names([{"optimizer.lr": 0.1, "seed": 1}]) == ["lr=0.1,seed=1"]
    assert trial_names([{"optimizer.name": "adam", "model.name": "torchvision/resnet18"}]) == [
        "optimizer.name=adam,model.name=torchvision_resnet18"
    ]
    long = [{"model.name": "x" * 90 + end} for end in "ab"]
    assert len(set(trial_names(long))) == 2 and all(len(name) < 100 for name in trial_names(long))


@pytest.mark.parametrize(
    ("method", "parameters", "more", "key", "kind"),
    [
        ("bayes", ONE_SEED, {}, "method", "unsupported"),
        ("grid", {"optimizer.lr": {"min": 0.1, "max": 0.2}}, {}, "parameters.optimizer.lr", "type"),
        ("grid", {"seed": {"values": []}}, {}, "parameters.seed", "type"),
        ("grid", {"seed": 3}, {}, "parameters.seed", "type"),
        ("grid", {}, {}, "parameters", "missing"),
        ("grid", {"a": {"parameters": {"b": {"values": 3}}}}, {}, "parameters.a.parameters.b", "type"),
        ("grid", {"a": {"parameters": {}}}, {}, "parameters.a", "type"),
        (
            "grid",
            {"a.b": {"values": [1]}, "a": {"parameters": {"b": {"value": 1}}}},
            {},
            "parameters.a.b",
            "conflict",
        ),
        ("random", ONE_SEED, {}, "run_cap", "missing"),
        ("random", ONE_SEED, {"run_cap": "many"}, "run_cap", "type"),
        ("random", ONE_SEED, {"run_cap": 0}, "run_cap", "range"),
        ("random", {"a": {"min": 2, "max": 1}}, {"run_cap": 1}, "parameters.a", "range"),
        ("random", {"a": {"min": 1}}, {"run_cap": 1}, "parameters.a", "type"),
        ("random", {"a": {"distribution": "normal", "mu": 0, "sigma": 1}}, {"run_cap": 1}, "parameters.a", "type"),
        ("random", {"a": drawn("q_uniform", 0, 1)}, {"run_cap": 1}, "parameters.a", "unsupported"),
        ("random", {"a": drawn("log_uniform_values", 0, 1)}, {"run_cap": 1}, "parameters.a", "unsupported"),
        ("random", {"a": drawn("int_uniform", 0.5, 1.5)}, {"run_cap": 1}, "parameters.a", "unsupported"),
        ("grid", ONE_SEED, {"metric": {"name": "eval/loss"}}, "metric", "unsupported"),
        ("grid", ONE_SEED, {"early_terminate": {"type": "hyperband"}}, "early_terminate", "unknown"),
        ("grid", ONE_SEED, {"command": ["python", "${program}"]}, "command", "missing"),
        ("grid", ONE_SEED, {"command": ["${args_no_hyphens}"]}, "command", "missing"),
        ("grid", ONE_SEED, {"command": ["${x}", "${args_no_hyphens}"]}, "command", "unsupported"),
        ("grid", ONE_SEED, {"program": "train.py"}, "command", "missing"),
        *(("grid", ONE_SEED, {"command": [*words, *COMMAND[1:]]}, "command", "code") for words in OTHER_PROGRAMS),
        ("grid", ONE_SEED, {"command": [*COMMAND, "--allow-code=os"]}, "command", "code"),
    ],
)
def test_a_sweep_file_that_cannot_be_searched_is_refused(method, parameters, more, key, kind, tmp_path, refused):
    path = sweep_file(tmp_path, method, parameters, **more)
    assert refused(lambda: choices(path)) == [(key, kind)]


@pytest.mark.parametrize(
    "launcher",
    [
        ["python"],
        ["${interpreter}"],
        ["accelerate", "launch", "--quiet", "--cpu", "--num_processes", "1"],
        ["torchrun", "--standalone", "--nproc-per-node=2"],
    ],
)
def test_a_command_may_start_the_trainer_by_a_launcher(launcher, tmp_path):
    command = [*launcher, *COMMAND[1:]]
    found = read_file(sweep_file(tmp_path, "grid", ONE_SEED, command=command), [], None, seed=0)
    assert found.command[-2:] == ["-m", "mnist_dist.train"] and len(found.command) == len(launcher) + 2


def test_every_problem_of_a_sweep_file_is_listed_with_its_line(tmp_path):
    path = sweep_file(tmp_path, "bayes", {"seed": 3, "a": 4}, run_cap=-1)
    with pytest.raises(RecipeError) as found:
        choices(path)
    keys = {problem.key for problem in found.value.problems}
    assert keys == {"method", "parameters.seed", "parameters.a", "run_cap"}
    assert all(problem.where.startswith(f"{path}:") for problem in found.value.problems)


def test_a_searched_key_cannot_be_overridden_too(tmp_path, refused):
    path = sweep_file(tmp_path, "grid", ONE_SEED)
    assert refused(lambda: choices(path, words=("seed=2",))) == [("seed", "conflict")]
