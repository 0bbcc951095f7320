"""Short trials of the fault driver: killed, stopped and damaged runs end with the bytes of the undisturbed run.

`python -m tests.faults` runs many more trials.
"""

from __future__ import annotations

import random
import re
import signal
from typing import Any

import pytest
import torch

from mnist_dist.distributed.signals import SIGNALS
from mnist_dist.engine.checkpoint import list_checkpoints, newest_checkpoint, save_checkpoint
from tests.faults import training
from tests.faults.__main__ import table_of
from tests.faults.damage import KINDS, Scene
from tests.faults.training import EVERY_STATE, STEPS, bytes_of, differences, finish, use_colour_folder
from tests.faults.trials import (
    PHASES,
    PLACES,
    Blow,
    Notes,
    Place,
    Trial,
    blow_trial,
    damage_trial,
    kills_of,
    restart_trial,
    signals_of,
    steps_of,
)
from tests.faults.victim import POINTS
from tests.processes import forked_python

KILL = signal.SIGKILL
BLOWS = [
    [
        (Place("start", "before recipe.yaml has its name"), KILL),
        (Place("writing", "state half written"), KILL),
        (Place("evaluation"), signal.SIGINT),
        (Place("step"), KILL),
        (Place("step"), signal.SIGTERM),
        (Place("saving"), signal.SIGUSR1),
        (Place("writing"), signal.SIGHUP),
        (Place("writing", "last.safetensors half written"), KILL),
    ],
    [
        (Place("start"), signal.SIGTERM),
        (Place("start"), signal.SIGINT),
        (Place("start"), signal.SIGUSR1),
        (Place("start"), KILL),
        (Place("step"), signal.SIGUSR1),
        (Place("evaluation"), KILL),
        (Place("writing", "after the rename, before old ones go"), KILL),
        (Place("step"), signal.SIGINT),
        (Place("ending", "before STATUS is done"), KILL),
        (Place("ending"), signal.SIGTERM),
        (Place("ending"), signal.SIGINT),
        (Place("ending"), signal.SIGUSR1),
        (Place("exit"), signal.SIGTERM),
    ],
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, Any]:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    finish(run_dir, 1, *EVERY_STATE)
    return bytes_of(run_dir)


@pytest.mark.parametrize("blows", BLOWS, ids=["first", "second"])
def test_a_run_that_is_killed_and_stopped_several_times_ends_with_the_same_bytes(blows, tmp_path, undisturbed):
    trial = blow_trial(tmp_path, undisturbed, seed=0, world_size=1, blows=blows)
    assert trial.problem is None, str(trial)
    # The end is short: the run may be over before a blow at any moment of it, and then no other blow follows.
    assert len(trial.blows) >= len([place for place, _ in blows if place not in (Place("ending"), Place("exit"))])


def test_a_killed_run_on_colour_pictures_from_disk_ends_with_the_same_bytes(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "WORDS", [*training.WORDS])
    use_colour_folder(tmp_path / "pictures")
    finish(tmp_path / "undisturbed", 1, *EVERY_STATE)
    blows = [(Place("step"), KILL), (Place("writing", "state half written"), KILL)]
    trial = blow_trial(tmp_path, bytes_of(tmp_path / "undisturbed"), seed=0, world_size=1, blows=blows)
    assert trial.problem is None and len(trial.blows) == 2, str(trial)


def test_a_run_skips_a_damaged_checkpoint_and_ends_with_the_same_bytes(tmp_path, undisturbed):
    kinds = ["state: one bit flipped", "run folder: best.safetensors truncated"]
    trial = damage_trial(tmp_path, undisturbed, seed=0, world_size=1, kinds=kinds)
    assert trial.problem is None, str(trial)


def test_torchrun_restarts_a_killed_worker_and_two_processes_end_with_the_same_bytes(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHON_EXEC", str(forked_python()))  # torchrun starts its processes with it
    finish(tmp_path / "undisturbed", 2, *EVERY_STATE)
    trial = restart_trial(tmp_path, bytes_of(tmp_path / "undisturbed"), seed=0, world_size=2)
    assert trial.problem is None, str(trial)


# --- damaged checkpoints, without a run ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("run folder")])
@pytest.mark.parametrize("seed", range(3))
def test_the_newest_valid_checkpoint_is_used_and_a_damaged_one_is_named_and_renamed(kind, seed, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    for step in (7, 14, 21):
        save_checkpoint(checkpoints, step, {"step": step, "weights": torch.full((1000,), float(step))}, keep=3)
    scene = Scene(tmp_path, random.Random(seed))
    KINDS[kind](scene)
    state, problems = newest_checkpoint(checkpoints)
    assert (state and f"step-{state['step']}") == (scene.used and scene.used.name)
    assert len(problems) == len(scene.named)
    for name, problem in zip(scene.named, problems, strict=True):
        [renamed] = checkpoints.glob(f"damaged-{name}-*")  # kept, so that the user can examine it
        assert str(checkpoints / name) in problem and renamed.name in problem
    assert not scene.harm.exists()
    # What is left does not prevent the next checkpoints.
    for step in (21, 28, 35):
        save_checkpoint(checkpoints, step, {"step": step}, keep=2)
    assert [path.name for path in list_checkpoints(checkpoints)] == ["step-28", "step-35"]
    assert not list(checkpoints.glob(".step-*.staged"))


# --- the driver itself: can it fail? ------------------------------------------------------------------------------


def test_the_driver_uses_all_places_and_lets_each_run_reach_its_end():
    seeds = range(len(PLACES))
    assert {place for seed in seeds for place, _ in kills_of(seed)} == set(PLACES)
    assert {place.point for place in PLACES} == {None, *POINTS}
    assert len({blow for seed in seeds for blow in signals_of(seed)}) == len(SIGNALS) * len(PHASES)
    for seed in seeds:
        places = [place for place, _ in kills_of(seed)]
        steps = [
            (step, place.only_at_the_end)
            for step, place in zip(steps_of(places, random.Random(seed)), places, strict=True)
            if place.phase != "start"
        ]
        assert steps == sorted(steps)
        assert all(step == STEPS if at_the_end else step <= STEPS - 7 for step, at_the_end in steps)


def test_the_driver_detects_every_byte_that_differs(tmp_path, undisturbed):
    assert differences(undisturbed, undisturbed) == []
    chosen = random.Random(0).sample(sorted(undisturbed), 200)
    for name in [*chosen, "last.safetensors", "best.safetensors", "metrics.jsonl, line 0", "summary.json"]:
        value = undisturbed[name]
        if isinstance(value, bytes):
            changed = value[:-1] + bytes([value[-1] ^ 1])
        elif isinstance(value, tuple) and isinstance(value[-1], bytes):  # a tensor
            changed = (*value[:-1], value[-1][:-1] + bytes([value[-1][-1] ^ 1]))
        else:
            changed = "another"
        assert differences(undisturbed | {name: changed}, undisturbed) == [name]
    gone = {name: value for name, value in undisturbed.items() if name != "metrics.jsonl, line 3"}
    assert differences(gone, undisturbed) == ["metrics.jsonl, line 3"]
    kept = {name: value for name, value in undisturbed.items() if not re.match(r"step-\d\b", name)}
    assert differences(kept, undisturbed) == []


def test_all_that_a_run_does_between_its_last_step_and_its_status_is_its_ending():
    assert Notes(["step", "evaluation"], 64, False).phase == "evaluation"
    assert Notes(["ending"], 64, False, writing=True).phase == "ending"
    assert Notes(["ending"], 64, False).phase == Notes(["ending", "evaluation"], 64, False).phase == "ending"
    assert Notes(["exit"], 64, False).phase == "exit"


def test_no_blow_of_a_run_that_ends_with_other_bytes_counts_as_survived():
    step, writing = Blow("SIGKILL", "step", "any moment", ""), Blow("SIGKILL", "writing", "before the rename", "")
    rows = table_of([Trial([step]), Trial([step, writing], problem="last.safetensors differs")])
    assert rows == [
        ("SIGKILL", "step", "1 / 2", "2 any moment"),
        ("SIGKILL", "writing", "0 / 1", "1 before the rename"),
        ("all", "", "1 / 3", ""),
    ]
