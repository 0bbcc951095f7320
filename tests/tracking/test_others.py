"""`tracking.also`: TensorBoard, MLflow and Trackio hold what metrics.jsonl holds, also after a resume."""

from __future__ import annotations

import os
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mnist_dist import load_recipe, load_run, train
from mnist_dist.recipe.schema import Recipe
from mnist_dist.tracking import missing_packages, others, stores
from tests import processes

NAMES = ("tensorboard", "mlflow", "trackio")
WORDS = ["data.dataset=synthetic", "data.limit_train=200", "data.limit_test=100", "batch_size=50", "log_every=2"]
WORDS += ["epochs=2", "checkpoint.every_steps=4", "tracking.plots=false", "tracking.wandb.project=digits"]

Points = Counter[tuple[str, int, float]]


def tiny(names: list[str], *words: str) -> Recipe:
    return load_recipe("lenet5", *WORDS, f"tracking.also=[{','.join(names)}]", *words)


def require(name: str) -> None:
    if missing := missing_packages(name):
        pytest.skip(f"not installed: {', '.join(missing)} (pip install -e '.[{name}]')")


def expected(run_dir: Path) -> Points:
    """Every value of metrics.jsonl with its step, once: an evaluation repeats the epoch of the line before it."""
    lines = load_run(run_dir).metrics
    return Counter({(key, line["step"], value): 1 for line in lines for key, value in line.items() if key != "step"})


def read_tensorboard(run_dir: Path) -> Points:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0})
    events.Reload()
    return Counter((tag, each.step, each.value) for tag in events.Tags()["scalars"] for each in events.Scalars(tag))


def mlflow_run(run_dir: Path) -> tuple[Any, Any]:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir}/mlflow/mlflow.db")
    experiment = client.get_experiment_by_name("digits")
    assert experiment is not None
    [run] = client.search_runs([experiment.experiment_id])
    return client, run


def read_mlflow(run_dir: Path) -> Points:
    client, run = mlflow_run(run_dir)
    points = [each for key in run.data.metrics for each in client.get_metric_history(run.info.run_id, key)]
    return Counter((each.key, each.step, each.value) for each in points)


def read_trackio(run_dir: Path) -> Points:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    with stores._patched_modules("trackio", {"TRACKIO_DIR": run_dir / "trackio"}):  # its folder is fixed at the import
        [run] = trackio.Api().runs("digits")
        assert (run.name, run.config["optimizer.name"]) == ("lenet5-seed0", load_run(run_dir).recipe.optimizer.name)
        logs = SQLiteStorage.get_logs("digits", run.name)
    return Counter((key, log["step"], log[key]) for log in logs for key in log if key not in ("step", "timestamp"))


READERS: dict[str, Callable[[Path], Points]] = {
    "tensorboard": read_tensorboard,
    "mlflow": read_mlflow,
    "trackio": read_trackio,
}


def rounded(points: Points) -> Points:
    """TensorBoard stores float32."""
    return Counter({(key, step, float(np.float32(value))): count for (key, step, value), count in points.items()})


@pytest.fixture(scope="module")
def resumed(tmp_path_factory) -> Path:
    """A run that failed at step 7, after the checkpoint of step 4, and was resumed, with all installed trackers."""
    names = [name for name in NAMES if not missing_packages(name)]
    if not names:
        pytest.skip("none of the trackers is installed: pip install -e '.[trackers]'")
    folder = tmp_path_factory.mktemp("others") / "run"
    recipe = tiny(names)
    with pytest.MonkeyPatch.context() as patch:
        fail_at(7, patch)
        with pytest.raises(ZeroDivisionError):
            train(recipe, folder)
    assert load_run(folder).metrics[-1]["step"] == 6
    train(recipe, folder)
    return folder


def fail_at(step: int, patch: pytest.MonkeyPatch) -> None:
    from mnist_dist.distributed.watchdog import Watchdog

    beat = Watchdog.beat

    def failing(self: Watchdog, at: int) -> None:
        beat(self, at)
        if at >= step:
            raise ZeroDivisionError

    patch.setattr(Watchdog, "beat", failing)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_has_every_value_of_metrics_once(name, resumed):
    require(name)
    found, wanted = rounded(READERS[name](resumed)), rounded(expected(resumed))
    assert set(Counter(key for key, *_ in wanted).values()) == {2, 4}, "evaluations, log lines"
    if name == "mlflow":  # keeps the points after the checkpoint, whose speed differs
        found, wanted = (
            Counter({(key, step): count for (key, step, _), count in each.items()}) for each in (found, wanted)
        )
    assert found == wanted


def test_a_store_that_a_kill_left_without_its_tables_is_created_again(tmp_path):
    require("mlflow")
    lines = [{"step": step, "train/loss": 1.0 / step} for step in (1, 2)]
    run = {"folder": tmp_path, "project": "digits", "name": "a", "group": "a", "config": {}}
    (tmp_path / "mlflow").mkdir()
    with closing(sqlite3.connect(tmp_path / "mlflow" / "mlflow.db")) as store:
        store.execute("CREATE TABLE experiments (experiment_id INTEGER)")  # MLflow has not recorded this migration
    problems: list[str] = []
    tracker = others.OtherTracker("mlflow", run, lines, problems.append)
    tracker.start()
    tracker.finish()
    assert problems == []
    assert read_mlflow(tmp_path) == {("train/loss", line["step"], line["train/loss"]): 1 for line in lines}


def test_mlflow_keeps_the_losses_of_a_resumed_run_with_recipe_and_status(resumed):
    require("mlflow")
    losses = {each for each in read_mlflow(resumed) if "loss" in each[0]}
    assert losses == {each for each in expected(resumed) if "loss" in each[0]}
    _, run = mlflow_run(resumed)
    assert (run.info.run_name, run.info.status) == ("lenet5-seed0", "FINISHED")
    assert run.data.params["optimizer.name"] == load_run(resumed).recipe.optimizer.name
    assert "MLFLOW_TRACKING_URI" not in os.environ


def test_the_stores_are_in_the_run_folder_only(resumed):
    names = {name for name in NAMES if not missing_packages(name)}
    assert {path.name for path in resumed.iterdir() if path.is_dir()} >= names
    assert not (Path.cwd() / "mlruns").exists() and not (Path.cwd() / "mlflow.db").exists()
    assert "failed" not in (resumed / "console.log").read_text()


def test_a_tracker_added_later_gets_the_earlier_lines(tmp_path, monkeypatch):
    require("tensorboard")
    with monkeypatch.context() as patch:
        fail_at(7, patch)
        with pytest.raises(ZeroDivisionError):
            train(tiny([]), tmp_path / "run")
    train(tiny(["tensorboard"]), tmp_path / "run")
    assert rounded(read_tensorboard(tmp_path / "run")) == rounded(expected(tmp_path / "run"))


def test_only_the_main_process_logs(tmp_path):
    require("tensorboard")
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "lenet5", "--run-dir", tmp_path / "run", *WORDS]
    processes.run_ranks(2, [*command, "epochs=1", "tracking.also=[tensorboard]"])
    assert len(list((tmp_path / "run" / "tensorboard").glob("events.*"))) == 1
    assert rounded(read_tensorboard(tmp_path / "run")) == rounded(expected(tmp_path / "run"))


def test_a_warning_of_trackio_is_reported_once(tmp_path, monkeypatch):
    require("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    monkeypatch.setattr(SQLiteStorage, "bulk_log", lambda *arguments, **keywords: 1 / 0)
    assert train(tiny(["trackio"], "epochs=1"), tmp_path / "run")["steps"] == 4
    [line] = [line for line in (tmp_path / "run" / "console.log").read_text().splitlines() if "trackio failed" in line]
    assert "division by zero" in line


def test_mlflow_logs_to_the_store_of_the_environment(tmp_path, monkeypatch):
    require("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "server").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    recipe = tiny(["mlflow"])
    with monkeypatch.context() as patch:
        fail_at(7, patch)
        with pytest.raises(ZeroDivisionError):
            train(recipe, tmp_path / "run")
    from mlflow import MlflowClient

    client = MlflowClient()
    experiment = client.get_experiment_by_name("digits")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FAILED"
    train(recipe, tmp_path / "run")
    [run] = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and not (tmp_path / "run" / "mlflow" / "mlflow.db").exists()
    assert [each.step for each in client.get_metric_history(run.info.run_id, "train/loss")] == [2, 4, 6, 8]


# --- failures: they need no package -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_refused_before_anything_is_written(name, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(others, "find_spec", lambda package: None)
    assert refused(lambda: train(tiny([name]), tmp_path / "run")) == [("tracking.also", "missing")]
    assert not (tmp_path / "run").exists()


class Store:
    """Stands for a store. `log` calls what a test sets."""

    def __init__(self, run: stores.TrackedRun, report: Callable[[str], None]):
        self.run = run

    def start(self) -> None:
        pass

    def log(self, values: dict[str, Any], step: int) -> None:
        pass

    def end(self, status: str) -> None:
        ended.append(status)


ended: list[str] = []


@pytest.fixture
def store(monkeypatch) -> type[Store]:
    ended.clear()
    monkeypatch.setattr("mnist_dist.run.trackers.missing_packages", lambda name: [])
    monkeypatch.setitem(stores.STORES, "tensorboard", Store)
    return Store


def reports(run_dir: Path) -> list[str]:
    return [line for line in (run_dir / "console.log").read_text().splitlines() if line.startswith("tensorboard")]


@pytest.mark.parametrize("method", ["start", "log", "end"])
def test_a_tracker_that_fails_is_reported_once_and_the_training_continues(method, store, tmp_path, monkeypatch):
    def broken(*arguments: Any, **keywords: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store, method, broken)
    assert train(tiny(["tensorboard"], "epochs=1"), tmp_path / "run")["steps"] == 4
    [line] = reports(tmp_path / "run")
    assert "No space left" in line
    assert ended == ([] if method == "end" else ["FINISHED"]), "a tracker that failed is closed too"


def test_a_tracker_that_hangs_does_not_hang_the_end_of_the_run(store, tmp_path, monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(store, "log", lambda *arguments, **keywords: released.wait())
    monkeypatch.setattr(others, "FINISH_SECONDS", 0.2)
    assert train(tiny(["tensorboard"], "epochs=1"), tmp_path / "run")["steps"] == 4
    released.set()
    assert len(reports(tmp_path / "run")) == 1
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"


def test_the_status_of_a_failed_and_of_a_stopped_run(store, tmp_path, monkeypatch):
    monkeypatch.setattr("mnist_dist.train.fit", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(["tensorboard"]), tmp_path / "failed")
    monkeypatch.setattr("mnist_dist.train.fit", lambda *arguments: False)
    train(tiny(["tensorboard"]), tmp_path / "stopped")
    assert ended == ["FAILED", "KILLED"]


def test_a_tracker_that_fails_at_the_end_of_a_failed_run_hides_no_error(store, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "end", lambda *arguments: [][0])
    monkeypatch.setattr("mnist_dist.train.fit", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(tiny(["tensorboard"]), tmp_path / "run")
    assert len(reports(tmp_path / "run")) == 1


def test_a_tracker_that_is_named_twice_logs_once(store, tmp_path):
    train(tiny(["tensorboard", "tensorboard"], "epochs=1"), tmp_path / "run")
    assert ended == ["FINISHED"]
