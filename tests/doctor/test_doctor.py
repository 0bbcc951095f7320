"""The command `doctor`: healthy processes pass, and a fault on one rank is reported with this rank."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from mnist_dist.doctor import __main__ as doctor
from mnist_dist.doctor import checks, ranks, reference, training
from mnist_dist.doctor.checks import FAIL, NOTE, OK, WARN
from tests.processes import free_port, popen, rank_variables

CHECKS = [
    *("world", "versions", "clocks", "limits", "free space", "run folder", "peer to peer", "all-reduce", "W&B"),
    *("training, each rank alone", "training, batch norm", "training, bf16"),
    *("training, distributed", "training, captured", "GPUs"),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")


@pytest.fixture
def no_training(monkeypatch):
    """The training measurements return the reference at once."""
    monkeypatch.setattr(training, "train_alone", alone)
    monkeypatch.setattr(training, "train_distributed", distributed)


def alone(device: object, name: str = "lenet5") -> dict:
    return {"losses": reference.reference_losses(name), "seconds": 0.01, "fastest": 0.01}


def distributed(device: object, capture: str = "off") -> dict:
    return {"losses": reference.reference_losses("lenet5"), "weights": "", "obstacle": ""}


# --- one process --------------------------------------------------------------------------------------------------


def examine(tmp_path: Path, *words: str) -> tuple[int, list[dict]]:
    """Runs the command; returns its exit code and the rows of its report."""
    file = tmp_path / "health.json"
    code = doctor.main(["--run-dir", str(tmp_path / "a" / "runs"), "--json", str(file), *words])
    return code, json.loads(file.read_text())["checks"]


def rows_of(rows: list[dict], check: str, verdict: str | None = None) -> list[dict]:
    return [row for row in rows if row["check"] == check and verdict in (None, row["verdict"])]


def test_a_healthy_process(tmp_path, capsys):
    started = time.monotonic()
    code, rows = examine(tmp_path)
    output = capsys.readouterr().out
    assert code == 0, output
    assert time.monotonic() - started < 120
    assert list(dict.fromkeys(row["check"] for row in rows)) == CHECKS
    assert {row["verdict"] for row in rows} <= {OK, NOTE, WARN}, rows
    assert "\x1b" not in output and "…" not in output, "without a terminal: no colours, nothing cut off"
    assert output.count("verdict") == 1 and "\nfit to train" in output
    assert {row["check"] for row in rows if "one process" in row["figure"]} == {"clocks", "peer to peer", "all-reduce"}
    assert [path.name for path in tmp_path.iterdir()] == ["health.json"], "nothing else is left behind"


def test_another_number_of_processes_than_expected_fails(tmp_path, capsys, no_training):
    code, rows = examine(tmp_path, "--world-size", "2")
    assert code == 1
    [row] = rows_of(rows, "world", FAIL)
    assert "--world-size is 2" in row["figure"] and "--num_processes 2" in row["figure"]
    assert "mnist_dist.doctor" in row["figure"] and "mnist_dist.train" not in row["figure"]
    assert "\nnot fit to train: world (" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_fails(tmp_path, capsys, no_training):
    (tmp_path / "a").write_text("a file instead of a folder")
    assert examine(tmp_path)[0] == 1
    assert "\nnot fit to train: run folder (ranks 0)" in capsys.readouterr().out
    assert (tmp_path / "a").read_text() == "a file instead of a folder"


def test_wrong_losses_fail_at_their_step(tmp_path, monkeypatch, no_training):
    losses = reference.reference_losses("lenet5")
    wrong = [*losses[:9], 1.1 * losses[9], *losses[10:]]
    monkeypatch.setattr(
        training, "reference_losses", lambda name: wrong if name == "lenet5" else alone(None, name)["losses"]
    )
    code, rows = examine(tmp_path)
    assert code == 1
    for check in ("training, each rank alone", "training, distributed"):
        assert "step 10:" in rows_of(rows, check, FAIL)[0]["figure"]


def test_a_check_that_raises_is_a_row_and_the_other_checks_run(tmp_path, monkeypatch, no_training):
    monkeypatch.setattr(checks, "free_space", lambda *arguments: 1 / 0)
    code, rows = examine(tmp_path)
    assert code == 1
    [row] = rows_of(rows, "free space")
    assert row["figure"].startswith("ZeroDivisionError") and row["ranks"] == "0"
    assert {row["check"] for row in rows if row["verdict"] == FAIL} == {"free space"}
    assert list(dict.fromkeys(row["check"] for row in rows)) == CHECKS


def test_a_check_that_hangs_is_a_row_and_the_process_ends(tmp_path, monkeypatch, no_training):
    end, codes = threading.Event(), []
    monkeypatch.setattr(checks, "free_space", lambda *arguments: end.wait())
    real = checks.check_space

    def check_space(*arguments, **keywords):
        with monkeypatch.context() as patch:
            patch.setattr(ranks, "TIMEOUT", 1.0)
            yield from real(*arguments, **keywords)

    monkeypatch.setattr(doctor, "check_space", check_space)
    monkeypatch.setattr(ranks.os, "_exit", codes.append)
    _, rows = examine(tmp_path)
    end.set()
    assert codes == [1]
    [row] = rows_of(rows, "free space", FAIL)
    assert "1 s" in row["figure"] and row["ranks"] == "0"


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problems"),
    [
        (["--run-folder", "x"], [("--run-folder", "usage")]),
        (["epochs=1"], [("epochs=1", "usage")]),
        (["--world-size", "0"], [("--world-size", "range")]),
        (["--json", "nowhere/health.json"], [("--json", "missing")]),
        (["--json", "nowhere/a", "--world-size", "0"], [("--json", "missing"), ("--world-size", "range")]),
    ],
)
def test_a_bad_command_line_is_refused(words, problems, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(tmp_path)
    assert refused(lambda: doctor.main(words)) == problems


def test_a_report_that_cannot_be_written_is_refused(tmp_path, monkeypatch, refused):
    monkeypatch.setattr(doctor, "examine", lambda *arguments: [])
    assert refused(lambda: doctor.main(["--json", str(tmp_path)])) == [("--json", "unwritable")]


def test_the_reference_losses_are_those_of_this_trainer(tmp_path, monkeypatch):
    before = json.loads(reference.FILE.read_text())
    monkeypatch.setattr(doctor, "FILE", tmp_path / "reference.json")
    assert doctor.main(["--write-reference"]) == 0
    after = json.loads((tmp_path / "reference.json").read_text())
    assert before.keys() == after.keys() and before["losses"].keys() == after["losses"].keys()
    assert before["command"] == after["command"]
    for name, losses in after["losses"].items():
        assert losses == pytest.approx(before["losses"][name], rel=reference.REFERENCES[name].tolerance)


def test_several_processes_cannot_write_the_reference(monkeypatch, refused):
    monkeypatch.setattr(doctor, "Ranks", lambda state: SimpleNamespace(size=2))
    assert refused(lambda: doctor.main(["--write-reference"])) == [("--write-reference", "world")]


# --- two processes ------------------------------------------------------------------------------------------------

PROGRAM = """
import os, sys, time
from mnist_dist.cli import run_command
from mnist_dist.doctor import __main__ as doctor, checks, measurements, ranks, training
from tests.doctor.test_doctor import alone, distributed
if {no_training}:
    training.train_alone, training.train_distributed = alone, distributed
{on_both}
if os.environ["RANK"] == "1":
{on_rank_1}
sys.exit(run_command(doctor.main))
"""


def examine_two(tmp_path: Path, on_rank_1: str = "pass", on_both: str = "", no_training: bool = True):
    """Runs the command in two processes, with code that puts a fault into them.

    Returns:
        The exit codes, what rank 0 printed, and the rows of the report.
    """
    program = PROGRAM.format(
        no_training=no_training,
        on_both=textwrap.dedent(on_both),
        on_rank_1=textwrap.indent(textwrap.dedent(on_rank_1).strip(), "    "),
    )
    words = ["--run-dir", tmp_path / "runs", "--json", tmp_path / "health.json"]
    port, processes = free_port(), []
    for rank in (0, 1):
        variables = os.environ | rank_variables(rank, 2, port) | {"TORCHELASTIC_RUN_ID": "none"}
        command = [sys.executable, "-c", program, *words]
        processes.append(popen(command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    printed = [process.communicate(timeout=300) for process in processes]
    output = "".join(printed[0])
    assert "verdict" in output and "verdict" not in "".join(printed[1]), printed
    assert [path.name for path in tmp_path.iterdir()] == ["health.json"]
    rows = json.loads((tmp_path / "health.json").read_text())["checks"]
    return [process.returncode for process in processes], output, rows


def test_two_healthy_processes_print_one_table(tmp_path):
    codes, output, rows = examine_two(tmp_path, no_training=False)
    assert codes == [0, 0], output
    assert output.count("verdict") == 1 and output.count("fit to train") == 1
    assert "\x1b" not in output and "…" not in output
    assert list(dict.fromkeys(row["check"] for row in rows)) == CHECKS
    assert not [row for row in rows if row["verdict"] == FAIL]
    assert "64 MB" in rows_of(rows, "peer to peer")[0]["figure"]
    world = rows_of(rows, "world")[0]["figure"]
    assert "2 processes" in world and "torchrun" in world and "1 node" in world


def test_the_rank_with_a_fault_is_named_by_each_check(tmp_path):
    codes, output, rows = examine_two(
        tmp_path,
        """
        versions, train_alone, now = checks.versions, training.train_alone, time.time
        checks.versions = lambda: versions() | {"torch": "0.4.1"}
        def fail(self, target):
            raise OSError(30, "Read-only file system")
        measurements.Path.replace = fail
        measurements.time.time = lambda: now() - 5
        def wrong_loss(device, *name):
            result = train_alone(device, *name)
            result["losses"][1] += 0.0 if name else 0.01
            return result
        training.train_alone = wrong_loss
        """,
    )
    assert codes == [1, 1]
    assert output.count("verdict") == 1
    assert "\nnot fit to train: versions (ranks 1), run folder (ranks 1)" in output
    failed = {row["check"]: (row["figure"], row["ranks"]) for row in rows if row["verdict"] == FAIL}
    assert failed.keys() == {"versions", "run folder", "training, each rank alone"}
    assert {named for _, named in failed.values()} == {"1"}
    assert "torch 0.4.1" in failed["versions"][0]
    assert "Read-only file system" in failed["run folder"][0]
    assert "step 2:" in failed["training, each rank alone"][0]
    assert rows_of(rows, "clocks", WARN)[0]["ranks"] == "1"


def test_a_rank_that_hangs_is_named_and_the_other_rank_does_not_wait_for_it(tmp_path):
    started = time.monotonic()
    codes, _, rows = examine_two(
        tmp_path,
        "checks.measure_all_reduce = lambda ranks: time.sleep(1000)",
        on_both="""
        check_all_reduce = doctor.check_all_reduce
        def limited(world):
            before, ranks.TIMEOUT = ranks.TIMEOUT, 5.0
            try:
                yield from check_all_reduce(world)
            finally:
                ranks.TIMEOUT = before
        doctor.check_all_reduce = limited
        """,
    )
    assert codes == [1, 1]
    assert time.monotonic() - started < 200
    [row] = rows_of(rows, "all-reduce")
    assert (row["verdict"], row["ranks"]) == (FAIL, "1")
    assert "5 s" in row["figure"]
    assert rows_of(rows, "training, distributed")[0]["verdict"] == FAIL, "not run"
    assert rows_of(rows, "training, each rank alone")[0]["verdict"] == OK
