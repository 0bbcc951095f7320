"""launch/reproduce.sh trains missing runs, teachers first, and writes the table of results."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

from tests.launch.launching import LAUNCH, ROOT, environment, executable


def reproduce(folder: Path, *words: str, **variables: str) -> str:
    """Runs the script in a folder, with the programs in its folder `bin`; returns its output."""
    command, env = [LAUNCH / "reproduce.sh", *words], environment(folder / "bin", **variables)
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_missing_runs_are_trained_teachers_first_and_the_table_is_written(tmp_path):
    small = "model: {name: lenet5}\ndata: {dataset: synthetic, limit_train: 64, limit_test: 20}\nbatch_size: 32\n"
    small += "tracking: {plots: false, wandb: {mode: disabled}}\n"
    (tmp_path / "teacher").write_text(small)
    (tmp_path / "pupil").write_text(small + "distill: {from: [runs/reproduce/teacher-seed1]}\n")

    assert "pupil" in reproduce(tmp_path, "pupil", "epochs=2", SEEDS="3")
    folder = tmp_path / "runs" / "reproduce"
    runs = {"teacher-seed1", "pupil-seed3-epochs=2"}
    assert {path.name for path in folder.iterdir()} == {*runs, "results.md"}
    table = (folder / "results.md").read_text()
    assert re.search(r"\| pupil \|.* 1 \| 2 \|", table)
    assert re.search(r"\| teacher \|.* 1 \| 1 \|", table)

    before = {name: (folder / name / "summary.json").stat().st_mtime_ns for name in runs}
    reproduce(tmp_path, "pupil", "epochs=2", SEEDS="3")
    after = {name: (folder / name / "summary.json").stat().st_mtime_ns for name in runs}
    assert after == before, "finished runs are not trained again"


def test_without_arguments_every_recipe_of_the_table_is_trained(tmp_path):
    (tmp_path / "configs").mkdir()
    shutil.copy(ROOT / "configs" / "results.jsonl", tmp_path / "configs")
    executable(tmp_path / "bin" / "python", '#!/bin/sh\necho "$@" >> calls\n')
    reproduce(tmp_path, SEEDS="7")
    trained = set(re.findall(r"--recipe (\S.*?) --run-dir", (tmp_path / "calls").read_text()))
    assert {"ms_ran", "resnet152", "plus_8k"} <= trained <= {path.stem for path in (ROOT / "configs").rglob("*.yaml")}
