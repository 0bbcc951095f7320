"""The history of a run's world: its file, its causes, and where it is shown."""

from __future__ import annotations

import json

import pytest

from mnist_dist import load_recipe, load_run, train
from mnist_dist.compare.table import Measured, Row
from mnist_dist.run.folder import RunFolder
from mnist_dist.run.reader import RunReader
from mnist_dist.run.world_history import note_start, read_history, sizes

CAUSES = [
    # elastic, STATUS before, processes, cause
    (True, "preempted", 4, "processes joined"),
    (True, "failed", 4, "processes joined"),
    (True, "preempted", 1, "processes left"),
    (True, "running", 1, "processes lost"),
    (True, "failed", 1, "processes lost"),
    (True, "failed", 2, "resumed after a failure"),
    (False, "preempted", 4, "resumed after a stop"),
    (False, "running", 1, "resumed after a failure"),
    (False, "done", 2, "resumed after the end"),
]


@pytest.mark.parametrize(("elastic", "status", "processes", "cause"), CAUSES)
def test_the_cause_follows_from_the_number_of_processes_and_the_status(
    elastic, status, processes, cause, tmp_path, monkeypatch
):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3" if elastic else "0")
    first = note_start(RunFolder(tmp_path), 0, 2, 1)
    assert [each["cause"] for each in first] == ["start"]
    history = note_start(RunFolder(tmp_path, status_before=status), 40, processes, 2)
    assert history == read_history(RunFolder(tmp_path)) and len(history) == 2
    assert {**history[-1], "time": ""} == {
        "time": "",
        "step": 40,
        "processes": processes,
        "nodes": 2,
        "cause": cause,
    }


def test_lines_of_another_form_are_left_out(tmp_path):
    valid = note_start(RunFolder(tmp_path), 0, 2, 1)
    with (tmp_path / "world.jsonl").open("ab") as file:
        file.write(b'[1]\n{"time": 3}\n\xff\nhalf a line')
    assert read_history(RunFolder(tmp_path)) == valid
    assert read_history(RunFolder(tmp_path / "missing")) == []


def test_every_start_of_a_run_is_noted_and_shown(tmp_path):
    words = ["tracking.plots=false", "tracking.wandb.mode=disabled", "schedule={name: constant}"]
    train(load_recipe("debug", *words, "max_steps=2"), tmp_path / "run")
    summary = train(load_recipe("debug", *words, "max_steps=4"), tmp_path / "run", allow_recipe_change=True)
    found = [(each["step"], each["processes"], each["nodes"], each["cause"]) for each in summary["world_history"]]
    assert found == [(0, 1, 1, "start"), (2, 1, 1, "resumed after the end")]
    assert load_run(tmp_path / "run").summary["world_history"] == summary["world_history"]
    assert "resumed after the end" in (tmp_path / "run" / "console.log").read_text()


def test_the_table_shows_the_numbers_of_processes_in_their_order(debug_run):
    lines = [{"time": "now", "step": 0, "processes": n, "nodes": n, "cause": "start"} for n in (3, 2, 2, 3)]
    (debug_run / "world.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = RunReader(debug_run)
    assert run.world == lines and sizes(lines) == "3 → 2 → 3"
    assert Row([Measured(run.summary, run)]).cells()["world size"][0] == "3 → 2 → 3"
    (debug_run / "summary.json").unlink()
    assert RunReader(debug_run).summary["world_size"] == 3
