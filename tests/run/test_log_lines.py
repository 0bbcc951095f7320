"""A device that is read a log line late writes the same run as one that is read at once."""

import itertools
import json
import re
import sys
from pathlib import Path

import pytest

from mnist_dist import load_recipe, load_run, train
from mnist_dist.distributed.signals import Interrupts
from mnist_dist.engine import evaluation
from mnist_dist.engine.checkpoint import list_checkpoints, load_checkpoint
from mnist_dist.engine.metrics import Meter
from mnist_dist.run import components
from tests.distributed.training import WITHOUT_TRACKING, train_in_world, weights_and_metrics
from tests.processes import run_ranks

# Five steps per epoch. A checkpoint comes between two log lines, and a log line between two evaluations.
WORDS = ["data.limit_train=80", "data.limit_test=20", "batch_size=16", "epochs=3", "log_every=3", "ema_decay=0.9"]
WORDS += ["checkpoint.every_steps=4", "checkpoint.keep=9", "tracking.plots=false"]


@pytest.fixture
def read_behind(monkeypatch):
    monkeypatch.setattr("mnist_dist.engine.metrics.runs_behind", lambda device: True)


def meters(folder: Path) -> dict[str, list[object]]:
    """Returns what each checkpoint holds of the meter, except times."""
    found = {path.name: load_checkpoint(path)["components"] for path in list_checkpoints(folder / "checkpoints")}
    return {name: [state["meter"][key] for key in ("sums", "steps", "epoch_sums")] for name, state in found.items()}


def test_lines_checkpoints_and_weights_are_the_same(tmp_path, monkeypatch):
    recipe = load_recipe("debug", *WORDS)
    train(recipe, tmp_path / "at_once")
    monkeypatch.setattr("mnist_dist.engine.metrics.runs_behind", lambda device: True)
    train(recipe, tmp_path / "behind")
    assert weights_and_metrics(tmp_path / "behind") == weights_and_metrics(tmp_path / "at_once")
    assert meters(tmp_path / "behind") == meters(tmp_path / "at_once")
    assert [*meters(tmp_path / "behind")] == ["step-4", "step-8", "step-12", "step-15"]
    for line in load_run(tmp_path / "behind").metrics:
        assert line.get("train/images_per_second", 1) > 0


def test_a_line_is_written_after_the_reading_of_the_next_one_began(tmp_path, monkeypatch, read_behind):
    events: list[str] = []
    for name in ("start_reading", "finish_reading", "count_step"):
        method = getattr(Meter, name)

        def spied(self, *arguments, name=name, method=method):
            events.append(name)
            return method(self, *arguments)

        monkeypatch.setattr(Meter, name, spied)
    words = ["data.limit_train=64", "epochs=1", "log_every=1", "checkpoint.every_steps=null"]
    train(load_recipe("debug", *WORDS, *words), tmp_path / "run")
    assert events == [
        *("count_step", "start_reading"),
        *("count_step", "finish_reading", "start_reading"),
        *("count_step", "finish_reading", "start_reading"),
        *("count_step", "finish_reading", "start_reading", "finish_reading"),  # the evaluation needs all of them
    ]


def test_an_evaluation_is_queued_before_the_host_waits_for_the_steps(tmp_path, monkeypatch, read_behind):
    events: list[str] = []

    def spy(owner, name):
        function = getattr(owner, name)

        def spied(*arguments, **keywords):
            events.append(name)
            return function(*arguments, **keywords)

        monkeypatch.setattr(owner, name, spied)

    for method in ("start_reading", "finish_reading", "read_epoch"):
        spy(Meter, method)
    spy(components, "evaluate")
    spy(evaluation, "score")
    words = ["data.limit_train=32", "epochs=2", "log_every=9", "checkpoint.every_steps=null"]
    train(load_recipe("debug", *WORDS, *words), tmp_path / "run")
    # `score` reads the result of the evaluation: it is the first wait of the host.
    assert events[:5] == ["start_reading", "evaluate", "score", "finish_reading", "read_epoch"]


@pytest.mark.parametrize("stopped_at", [3, 4, 8])
def test_a_stopped_run_resumes_to_the_same_bytes(tmp_path, monkeypatch, read_behind, stopped_at):
    recipe = load_recipe("debug", *WORDS)
    train(recipe, tmp_path / "straight")
    calls = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(Interrupts, "stop_requested", lambda *_: next(calls) == stopped_at)
        assert train(recipe, tmp_path / "stopped")["status"] == "preempted"
    train(recipe, tmp_path / "stopped")
    assert weights_and_metrics(tmp_path / "stopped") == weights_and_metrics(tmp_path / "straight")


READ_BEHIND = """
import json, sys
from mnist_dist.engine import metrics
from mnist_dist.train import main

metrics.runs_behind = lambda device: True
read, seconds = metrics.Meter.agree, []
def agree(self):
    read(self)
    seconds.append((self.train_seconds, self.seconds_per_step))
metrics.Meter.agree = agree
assert main(sys.argv[1:]) == 0
print(json.dumps(seconds), file=sys.stderr)
"""


def test_two_processes_write_the_same_run(tmp_path):
    words = ["--recipe", "debug", *WORDS]
    train_in_world(2, tmp_path / "at_once", *words)
    words = ["--run-dir", tmp_path / "behind", *WITHOUT_TRACKING, *words]
    ranks = run_ranks(2, [sys.executable, "-c", READ_BEHIND, *words])
    seconds = [json.loads(re.search(r"^\[\[.*", rank.stderr, re.MULTILINE).group()) for rank in ranks]
    assert seconds[0] == seconds[1] and len(seconds[0]) == 6, "the ranks do not agree on the time"
    assert all(later[0] > earlier[0] > 0 for earlier, later in itertools.pairwise(seconds[0]))
    assert weights_and_metrics(tmp_path / "behind") == weights_and_metrics(tmp_path / "at_once")
