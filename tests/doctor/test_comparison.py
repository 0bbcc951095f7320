"""What became slower since an earlier report: noise is no finding, a slower step or message is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mnist_dist.doctor import __main__ as doctor
from mnist_dist.doctor.checks import FAIL, OK, Finding, Row
from mnist_dist.doctor.comparison import compare, find_mismatch, read_report, times_of

STEP, MESSAGES = "training, each rank alone", "all-reduce"
BEFORE = {STEP: {"step": 0.010}, MESSAGES: {"1 KB": 30e-6, "64 MB": 0.020}, "run folder": {"write": 0.004}}


def verdicts(now: dict, second: dict | None = None) -> tuple[list[str], list[str]]:
    """Returns the verdicts and the checks that were measured again."""
    measured: list[str] = []

    def again(check: str) -> dict:
        measured.append(check)
        return {check: (second or now)[check]}

    return [row.verdict for row in compare(BEFORE, now, again, "before.json")], measured


@pytest.mark.parametrize(
    "now",
    [
        BEFORE,
        {STEP: {"step": 0.0149}},
        {MESSAGES: {"1 KB": 85e-6, "64 MB": 0.055}},  # messages vary by up to a factor of two
        {MESSAGES: {"1 KB": 49e-6}},
        {"run folder": {"write": 0.039}},
        {STEP: {"step": 0.001}},
        {"a new check": {"step": 9.0}},
        {},
    ],
)
def test_noise_is_no_finding(now):
    assert verdicts(now) == ([OK], [])


@pytest.mark.parametrize(
    ("now", "check"),
    [
        ({STEP: {"step": 0.016}}, STEP),
        ({MESSAGES: {"1 KB": 30e-6, "64 MB": 0.065}}, MESSAGES),
        ({"run folder": {"write": 0.05}}, "run folder"),
    ],
)
def test_a_slower_time_fails_if_a_second_measurement_agrees(now, check):
    assert verdicts(now) == ([FAIL], [check])
    assert verdicts(now, BEFORE) == ([OK], [check]), "a moment of other load"


def test_the_row_names_what_became_slower_by_how_much():
    now = {STEP: {"step": 0.030}, MESSAGES: BEFORE[MESSAGES]}
    [row] = compare(BEFORE, now, lambda check: now, "before.json")
    assert "before.json" in row.check
    assert all(word in row.figure for word in (STEP, "30 ms", "10 ms", "3.0 times"))
    [row] = compare(BEFORE, {MESSAGES: {"1 KB": 60e-6}}, lambda check: {}, "before.json")
    assert "2.00" in row.figure and "1 KB" in row.figure


# --- the report of before -----------------------------------------------------------------------------------------


def test_times_are_those_of_the_rows():
    rows = [Row("a", OK, "", "", {"x": 1.0}), Row("a", OK, "", "", {"y": 2.0}), Row("b", OK, "", "")]
    assert times_of(rows) == {"a": {"x": 1.0, "y": 2.0}}


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"checks": [{"a": 1}]}', '{"checks": []}', '{"checks": 1}'])
def test_another_file_is_refused(content, tmp_path):
    (tmp_path / "file").write_text(content)
    assert read_report(tmp_path / "file")["kind"] == "damaged"
    assert read_report(tmp_path / "missing")["kind"] == "missing"


def test_reports_of_other_worlds_and_devices_are_not_compared():
    before = {"world_size": 2, "device": "H100"}
    assert find_mismatch(before, 2, "H100") is None
    assert "4" in (find_mismatch(before, 4, "H100") or "") and "A100" in (find_mismatch(before, 2, "A100") or "")


@pytest.fixture
def examination(monkeypatch, tmp_path):
    """Runs the command with checks that measure these times; returns exit code and report."""

    def run(step: float, *words: str) -> tuple[int, dict]:
        def check(ranks):
            yield Finding(OK, "", "", {"step": step})

        monkeypatch.setattr(doctor, "list_checks", lambda *arguments: {STEP: check})
        file = tmp_path / f"{step}.json"
        code = doctor.main(["--json", str(file), *words])
        return code, json.loads(file.read_text())

    return run


def test_the_command_compares_with_its_own_report(examination, tmp_path, capsys):
    assert examination(0.010)[0] == 0
    before = str(tmp_path / "0.01.json")
    assert examination(0.011, "--compare", before)[0] == 0
    code, report = examination(0.050, "--compare", before)
    assert code == 1 and not report["fit"]
    assert [row["verdict"] for row in report["checks"]] == [OK, FAIL]
    assert "not fit to train: compared with 0.01.json" in capsys.readouterr().out
    assert Path(before).is_file()


@pytest.mark.parametrize("change", [{"world_size": 7}, {"device": "another"}])
def test_a_report_of_another_machine_is_refused_before_anything_is_measured(change, examination, tmp_path, refused):
    _, report = examination(0.010)
    (tmp_path / "other.json").write_text(json.dumps(report | change))
    words = ["--compare", str(tmp_path / "other.json")]
    assert refused(lambda: doctor.main(words)) == [("--compare", "conflict")]
    assert refused(lambda: doctor.main(["--compare", str(tmp_path / "missing")])) == [("--compare", "missing")]
