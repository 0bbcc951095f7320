"""Complete searches: the table, what a second start trains, signals, and command lines that are refused."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from mnist_dist.cli import run_command
from mnist_dist.distributed.signals import PREEMPTED
from mnist_dist.errors import RecipeError
from mnist_dist.recipe.file import find_recipe
from mnist_dist.sweep import __main__ as sweep
from mnist_dist.sweep import trials
from mnist_dist.train import main as train_main
from tests import processes
from tests.launch.launching import executable

LAUNCH = Path(__file__).parents[2] / "launch"
WORDS = ["data.dataset=synthetic", "data.limit_train=128", "data.limit_test=50", "epochs=1", "batch_size=64"]
WORDS += ["tracking.wandb.mode=disabled", "tracking.plots=false"]


def search(*words: str | Path) -> int:
    return run_command(lambda: sweep.main(list(map(str, words))))


@pytest.fixture
def trained(monkeypatch) -> list[str]:
    """Trains trials in this process, which is faster; returns a list that collects the names of the trained trials."""
    names: list[str] = []

    def train_here(searched: sweep.Sweep, trial: trials.Trial, log: Path) -> int:
        names.append(trial.name)
        with log.open("w") as output:
            stderr, sys.stderr = sys.stderr, output
            try:
                words = ["--recipe", searched.recipe, *searched.words, *trial.words]
                return run_command(lambda: train_main([*words, "--run-dir", str(trial.folder.path)]))
            finally:
                sys.stderr = stderr

    monkeypatch.setattr(sweep, "train_trial", train_here)
    return names


def rows(directory: Path) -> list[dict[str, Any]]:
    return json.loads((directory / "sweep.json").read_text())["trials"]


# --- searches -----------------------------------------------------------------------------------------------------


def test_a_grid_becomes_a_ranked_table_and_finished_trials_are_kept(trained, tmp_path, capsys):
    words = ["lenet5", *WORDS, "optimizer.lr=0.003,1e30", "optimizer.name=adam,sgd", "schedule.name=constant"]
    words += ["schedule.step_size=null", "schedule.gamma=null", "optimizer.weight_decay=null", "--run-dir", tmp_path]
    assert search(*words) == 0
    assert len(trained) == 4 and len(set(trained)) == 4
    found = rows(tmp_path)
    done, failed = [row for row in found if "failed" not in row], [row for row in found if "failed" in row]
    assert found == [*done, *failed] and done and failed, "a learning rate of 1e30 fails, and the search continues"
    assert all("not finite" in row["failed"] for row in failed)
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
    assert output.count("data.validation=") == 2, "once for the images held out, once in the command for all images"
    best = f"best: {done[0]['trial']}"
    assert table.count("\n| ") == 2 + 4 and best in table and best in output
    assert table.index(done[0]["trial"]) < table.index(failed[0]["trial"])
    assert "python -m mnist_dist.train --recipe lenet5" in table and table.strip().endswith("data.validation=0")

    trained.clear()
    assert search(*words) == 0
    assert set(trained) == {row["trial"] for row in failed}, "failed trials are trained again, finished ones are not"
    assert rows(tmp_path) == found


def test_the_bundled_sweep_file_starts_a_trial_with_its_command(tmp_path, monkeypatch):
    # The trial is forked from a server, which is faster than a new interpreter.
    forked = SimpleNamespace(Popen=processes.popen, DEVNULL=subprocess.DEVNULL, STDOUT=subprocess.STDOUT)
    monkeypatch.setattr(trials, "subprocess", forked)
    overrides = [word for word in WORDS if not word.startswith("batch_size")] + ["data.validation=100"]
    assert search(LAUNCH / "sweep.yaml", *overrides, "--count", "1", "--run-dir", tmp_path) == 0
    [row] = rows(tmp_path)
    recipe = yaml.safe_load((tmp_path / row["trial"] / "recipe.yaml").read_text())
    assert row["values"] == {"optimizer.lr": recipe["optimizer"]["lr"], "batch_size": recipe["batch_size"]}
    assert recipe["data"]["validation"] == 100
    assert not list(tmp_path.glob("*.log"))


def test_if_every_trial_fails_the_exit_code_is_1(trained, tmp_path, capsys):
    assert search("lenet5", *WORDS, "optimizer.lr=1e30,1e31", "--run-dir", tmp_path) == 1
    assert "best:" not in capsys.readouterr().out
    assert [row["values"]["optimizer.lr"] for row in rows(tmp_path)] == [1e30, 1e31]
    assert all("not finite" in row["failed"] for row in rows(tmp_path))


def test_a_folder_of_another_search_is_refused_before_any_training(trained, tmp_path, refused):
    assert search("lenet5", *WORDS, "optimizer.lr=0.001,0.002", "--count", "1", "--run-dir", tmp_path) == 0
    trained.clear()
    words = ["lenet5", *WORDS, "label_smoothing=0.1", "optimizer.lr=0.001,0.002", "--run-dir", str(tmp_path)]
    assert refused(lambda: sweep.main(words)) == [("--run-dir", "exists")]
    assert not trained


# --- signals ------------------------------------------------------------------------------------------------------

TRAINER = """\
#!{python} -S
import pathlib, signal, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
folder.mkdir()
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGUSR1])
(folder / "metrics.jsonl").write_text("started")
(folder / "STATUS").write_text(str(int(signal.sigwait([signal.SIGTERM, signal.SIGUSR1]))))
"""
"""Takes the place of torchrun: waits for a signal and writes its number into the run folder."""


def test_a_preempted_trial_stops_the_search(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "train_trial", lambda *arguments: PREEMPTED)
    assert search("lenet5", *WORDS, "optimizer.lr=0.1,0.2", "--run-dir", tmp_path) == PREEMPTED
    assert not (tmp_path / "sweep.json").exists()


def stop_first_trial(tmp_path: Path, command: list[str], number: int) -> str:
    """Runs a search over two seeds, sends it a signal while the first trains, and returns the first trial's STATUS."""
    content = {"program": "mnist_dist.train", "method": "grid", "parameters": {"seed": {"values": [1, 2]}}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(content | {"command": command}))
    endless = [word for word in WORDS if "epochs" not in word] + ["data.validation=50", "epochs=5000"]
    words = [tmp_path / "search.yaml", "--run-dir", tmp_path / "runs", *endless]
    metrics = tmp_path / "runs" / "seed=1" / "metrics.jsonl"
    with processes.popen([sys.executable, "-m", "mnist_dist.sweep", *words], stdout=subprocess.PIPE) as process:
        while not (metrics.is_file() and metrics.read_text()):
            assert process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
        process.send_signal(number)
        process.communicate(timeout=60)
    assert process.returncode == PREEMPTED
    assert not (tmp_path / "runs" / "seed=2").exists(), "the search continued"
    return (tmp_path / "runs" / "seed=1" / "STATUS").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_passed_on_to_the_trial_and_stops_the_search(tmp_path, number, monkeypatch):
    """Otherwise the trial would continue alone, and the next search would start a second process in its folder."""
    executable(tmp_path / "torchrun", TRAINER.format(python=sys.executable))
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    command = ["torchrun", "-m", "${program}", "--recipe=lenet5", "${args_no_hyphens}"]
    assert stop_first_trial(tmp_path, command, number) == str(int(number))


def test_a_signal_makes_the_trainer_save_and_stop(tmp_path):
    command = ["python", "-m", "${program}", "--recipe=lenet5", "--world-size=1", "${args_no_hyphens}"]
    assert stop_first_trial(tmp_path, command, signal.SIGTERM) == "preempted\n"
    assert list((tmp_path / "runs" / "seed=1" / "checkpoints").iterdir())


# --- refused command lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "kind"),
    [
        (["lenet5"], "key=value", "missing"),
        (["lenet5", "optimizer.lr=0.1"], "key=value", "missing"),
        (["lenet5", "data.dataset=synthetic", "optimizer.weigth_decay=0.1,0.2"], "optimizer.weigth_decay", "unknown"),
        (["lenet5", "data.dataset=synthetic", "batch_size=64,2.5"], "batch_size", "type"),
        (["lenet5", "batch_size=64,{"], "batch_size", "syntax"),
        (["lenet5", "data.dataset=synthetic", "data.validation=0,100"], "data.validation", "conflict"),
        (["lenet_5", "seed=1,2"], "--recipe", "missing"),
        (["lenet5", "seed=1,2", "--count", "0"], "--count", "range"),
        (["lenet5", "seed=1,2", "data.root=/nowhere", "data.dataset=kmnist"], "data.root", "missing"),
        (["lenet5", *WORDS, "data.validation=50", "seed=1,2", "--run-dir", "/dev/null/new"], "--run-dir", "unwritable"),
    ],
)
def test_a_wrong_command_line_is_refused_before_any_training(words, key, kind, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(sweep, "train_trial", lambda *arguments: pytest.fail("a trial was trained"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    folder = tmp_path / "new"
    assert refused(lambda: sweep.main(["--run-dir", str(folder), *words])) == [(key, kind)]
    assert not folder.exists()


@pytest.mark.parametrize("key", ["model.name", "data.dataset"])
def test_code_that_a_file_names_is_imported_only_with_permission(key, tmp_path, monkeypatch, refused):
    """The recipe may be that of a stranger's run folder, and a sweep file a stranger's."""
    (tmp_path / "stranger.py").write_text("raise ValueError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    base = yaml.safe_load(find_recipe("debug").read_text())
    base["tracking"] = {"plots": False, "wandb": {"mode": "disabled"}}
    section, name = key.split(".")
    recipe, of_file = tmp_path / "recipe.yaml", tmp_path / "search.yaml"
    recipe.write_text(yaml.safe_dump(base | {section: base[section] | {name: "stranger:Thing"}}))
    content = {"program": "mnist_dist.train", "method": "grid", "parameters": {key: {"value": "stranger:Thing"}}}
    command = ["python", "-m", "${program}", "--recipe=debug", "${args_no_hyphens}"]
    of_file.write_text(yaml.safe_dump(content | {"command": command}))
    search_it = [[str(recipe), "seed=1,2"], [str(of_file)]]
    for words in search_it:
        words += ["--run-dir", str(tmp_path / "new")]
        assert refused(lambda words=words: sweep.main(words)) == [("--allow-code", "code")]
        assert refused(lambda words=words: sweep.main([*words, "--allow-code", "other"])) == [("--allow-code", "code")]
        similar = [*words, "tracking.wandb.project=stranger:Things"]
        assert refused(lambda words=similar: sweep.main(words)) == [("--allow-code", "code")]
        for allowed in ([*words, "--allow-code", "stranger"], ["debug", f"{key}=stranger:Thing,stranger:Thing"]):
            with pytest.raises(RecipeError, match="imported"):
                sweep.main(allowed)
    assert not (tmp_path / "new").exists()


def test_a_wrong_command_line_is_one_screen_without_a_traceback(capsys):
    assert search("lenet5") == 2
    error = capsys.readouterr().err
    assert "key=value" in error and "Traceback" not in error


def test_a_search_with_several_processes_is_refused(monkeypatch, refused):
    monkeypatch.setattr(sweep, "launched_world", lambda: SimpleNamespace(num_processes=2))
    assert refused(lambda: sweep.main(["lenet5", "seed=1,2"])) == [("", "unsupported")]


def test_a_command_that_cannot_be_started_is_refused_with_its_name(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    command = ["torchrun", "-m", "${program}", "--recipe=lenet5", "${args_no_hyphens}"]
    content = {"program": "mnist_dist.train", "method": "grid", "parameters": {"seed": {"values": [1]}}}
    (tmp_path / "search.yaml").write_text(yaml.safe_dump(content | {"command": command}))
    words = [*WORDS, "data.validation=50", "--run-dir", tmp_path / "runs"]
    assert search(tmp_path / "search.yaml", *words) == 2
    assert "torchrun" in capsys.readouterr().err
