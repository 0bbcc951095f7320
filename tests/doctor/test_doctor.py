"""The doctor: a fit world passes, and each fault that is put in comes out, with the rank that has it."""

from __future__ import annotations

import http.server
import json
import math
import os
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from mnist_dist.cli import run_command
from mnist_dist.doctor import __main__ as doctor
from mnist_dist.doctor import measurements as probes
from mnist_dist.doctor import ranks
from mnist_dist.doctor.checks import FAIL, NOTE, OK, SLOW, WARN, Finding

NOWHERE = "http://127.0.0.1:9"
CHECKS = [
    *("world", "versions", "clocks", "free room", "write and rename", "peer to peer", "all-reduce", "W&B"),
    *("training, each alone", "training, together"),
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", NOWHERE)


# --- judging ------------------------------------------------------------------------------------------------------


def test_a_slow_rank_is_slower_than_the_middle_one_by_the_factor():
    assert doctor.slow_ones([1.0, 1.1, 0.9, 2.9]) == []
    assert doctor.slow_ones([1.0, 1.1, 0.9, 3.5]) == [3]
    assert doctor.slow_ones([4.0, 1.0]) == [0], "of two, the quicker is the measure"
    assert doctor.slow_ones([5.0]) == []


def test_the_odd_ranks_are_those_unlike_most():
    assert doctor.odd_ones(["a", "b", "b"]) == ("b", [0])
    assert doctor.odd_ones(["a", "b"]) == ("a", [1]), "where opinions are split, rank 0's counts"
    assert doctor.odd_ones(["a"]) == ("a", [])


@pytest.mark.parametrize(
    ("given_ranks", "text"), [([], ""), ([3], "3"), ([2, 0, 1], "0–2"), ([7, 0, 1, 5, 6], "0–1, 5–7")]
)
def test_ranks_are_named_as_spans(given_ranks, text):
    assert doctor.name_ranks(given_ranks) == text


@given(
    skew=st.floats(-100, 100),
    delays=st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0, 0.1)), min_size=1, max_size=8),
)
def test_a_clock_is_known_as_exactly_as_it_says(skew, delays):
    mine, zero, now = [], [], 1000.0
    for late, mine_out, zero_out in delays:  # rank 0 begins, this rank `late` after it; both end after both began
        zero.append((now, now + late + zero_out))
        mine.append((now + late + skew, now + late + mine_out + skew))
        now += 1
    offset, within = probes.clock_offset(mine, zero)
    assert abs(offset - skew) <= within + 1e-9
    assert within <= min(late + mine_out + zero_out for late, mine_out, zero_out in delays) + 1e-9


@pytest.mark.parametrize("size", range(2, 20))
def test_every_link_has_its_turn_and_no_rank_two_at_once(size):
    for turn in range(3 if size % 2 else 2):
        links = [rank for rank in range(size) if probes.link_turn(rank, size) == turn]
        busy = [end for rank in links for end in (rank, (rank + 1) % size)]
        assert links and len(busy) == len(set(busy))


RECORDED = [2.3, 2.2, 2.1, 2.0, 1.9, 1.8]


@pytest.mark.parametrize(
    ("step", "factor", "verdict"),
    [(1, 1 + 9e-6, OK), (1, 1 + 2e-5, FAIL), (6, 1 - 9e-4, OK), (6, 1 - 2e-3, FAIL), (3, math.nan, FAIL)],
)
def test_losses_are_held_against_the_recorded_ones(step, factor, verdict):
    wrong = [loss * (factor if place == step else 1) for place, loss in enumerate(RECORDED, start=1)]
    findings = list(doctor.judge_losses([RECORDED, wrong], RECORDED))
    assert [finding.verdict for finding in findings] == [verdict]
    if verdict == FAIL:
        assert findings[0].ranks == "1"
        assert (
            f"at step {step}: " in findings[0].figure and f"instead of {RECORDED[step - 1]:.6f}" in findings[0].figure
        )


class Answers:
    """Stands in for the ranks: what they would answer, question by question."""

    rank, device = 0, None

    def __init__(self, *answers: list):
        self.answers, self.size = list(answers), len(answers[0])

    def ask(self, action, **options):
        return self.answers.pop(0)


def link(node: str = "a", seconds: float = 1e-4, damaged: tuple = ()) -> dict:
    return {"node": node, "seconds": dict.fromkeys(probes.SIZES, seconds), "damaged": list(damaged)}


def test_a_slow_link_is_named():
    [finding] = doctor.check_links(Answers([link(), link(seconds=1e-3), link(), link()]))
    assert (finding.verdict, finding.ranks) == (SLOW, "1→2 (64 MB 67.1 GB/s)")


def test_links_between_nodes_are_not_held_against_those_within():
    nodes = [link("a"), link("a", 1e-2), link("b"), link("b", 1e-2)]
    findings = list(doctor.check_links(Answers(nodes)))
    assert [finding.verdict for finding in findings] == [OK, OK]
    assert [finding.figure.partition(":")[0] for finding in findings] == ["within a node", "between nodes"]


def test_damaged_bytes_and_wrong_sums_fail_and_name_their_ranks():
    assert next(doctor.check_links(Answers([link(), link(damaged=("64 MB",)), link()]))) == Finding(
        FAIL, "other bytes arrived than were sent (64 MB)", "1"
    )
    sums = [{"seconds": dict.fromkeys(probes.SIZES, 1e-3), "wrong": wrong} for wrong in ([], [], ["1 MB"])]
    assert next(doctor.check_all_reduce(Answers(sums))) == Finding(FAIL, "wrong sums (1 MB)", "2")


def write(node: str, seconds: float = 0.01) -> dict:
    return {"name": "file", "node": node, "seconds": seconds}


def test_a_folder_of_each_node_own_is_a_warning_and_a_blind_rank_on_the_same_node_a_failure(tmp_path):
    def check(nodes: str, sights: list) -> Finding:
        return next(doctor.check_folder(Answers([*map(write, nodes)], sights, [], []), tmp_path))

    apart = check("ab", [[1], [0]])
    assert apart.verdict == WARN
    assert "not shared: checkpoints of a multi-node run need a shared folder" in apart.figure
    assert check("abc", [[1], [0, 2], [1]])[::2] == (WARN, "1")
    assert check("aab", [[], [0], []])[::2] == (FAIL, "0–1")
    assert check("aa", [[], []]).verdict == OK


def test_a_slow_disk_a_full_one_and_a_clock_that_is_off_are_named(tmp_path):
    answers = Answers([write("a"), write("a", 3.0)], [[], []], [], [])
    assert next(doctor.check_folder(answers, tmp_path))[::2] == (SLOW, "1")
    roomy, full = {"memory": 8e9, "disk": 8e9}, {"memory": 8e9, "disk": 5e8}
    memory, disk = doctor.check_room(Answers([roomy, roomy, full]), tmp_path)
    assert (memory.verdict, disk.verdict, disk.ranks) == (OK, WARN, "2")
    clocks = [[[now, now + 0.001]] for now in (10.0, 10.0, 15.0)]
    assert next(doctor.check_clocks(Answers(clocks)))[::2] == (WARN, "2")


def test_weights_that_differ_after_training_are_a_warning():
    ends = [{"losses": RECORDED, "weights": weights} for weights in ("same", "same", "other")]
    assert list(doctor.check_together(Answers([RECORDED] * 3, ends)))[1][::2] == (WARN, "2")


# --- one process --------------------------------------------------------------------------------------------------


def examine(tmp_path: Path, *words: str) -> tuple[int, list[dict]]:
    """Exit code and rows of a whole examination."""
    code = run_command(lambda: doctor.main(["--run-dir", str(tmp_path / "a" / "runs"), *words]))
    file = tmp_path / "health.json"
    return code, json.loads(file.read_text())["checks"] if file.is_file() else []


def rows_of(rows: list[dict], check: str, verdict: str | None = None) -> list[dict]:
    return [row for row in rows if row["check"] == check and verdict in (None, row["verdict"])]


def test_a_fit_process(tmp_path, capsys):
    began = time.monotonic()
    code, rows = examine(tmp_path, "--json", str(tmp_path / "health.json"))
    output = capsys.readouterr().out
    assert code == 0, output
    assert time.monotonic() - began < 60
    assert list(dict.fromkeys(row["check"] for row in rows)) == CHECKS
    assert {row["verdict"] for row in rows} <= {OK, NOTE, WARN}, rows
    assert "\x1b" not in output and "…" not in output, "plain and whole without a terminal"
    assert output.count("verdict") == 1 and "fit to train" in output
    assert output.count("one process: nothing to measure") == 3
    assert [path.name for path in tmp_path.iterdir()] == ["health.json"], "nothing else is left behind"


def test_another_number_of_processes_than_expected_fails(tmp_path, capsys):
    code, rows = examine(tmp_path, "--world-size", "2", "--json", str(tmp_path / "health.json"))
    assert code == 1
    assert "2" in rows_of(rows, "world", FAIL)[0]["figure"]
    assert "not fit to train: world" in capsys.readouterr().out


def test_a_folder_that_cannot_be_written_fails(tmp_path, capsys):
    (tmp_path / "a").write_text("a file where a folder should be")
    assert examine(tmp_path)[0] == 1
    assert "not fit to train: write and rename (0)" in capsys.readouterr().out
    assert (tmp_path / "a").read_text() == "a file where a folder should be"


def test_wrong_losses_fail_at_their_step(tmp_path, monkeypatch):
    recorded = probes.recorded_losses()
    monkeypatch.setattr(doctor, "recorded_losses", lambda: [*recorded[:9], 1.1 * recorded[9], *recorded[10:]])
    code, rows = examine(tmp_path, "--json", str(tmp_path / "health.json"))
    assert code == 1
    for check in ("training, each alone", "training, together"):
        assert "leaves the recorded losses at step 10" in rows_of(rows, check, FAIL)[0]["figure"]


def test_a_check_that_breaks_is_a_row_and_the_others_follow(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "free_room", lambda *arguments: 1 / 0)
    code, rows = examine(tmp_path, "--json", str(tmp_path / "health.json"))
    assert code == 1
    assert [(row["figure"], row["ranks"]) for row in rows_of(rows, "free room")] == [
        ("ZeroDivisionError: division by zero", "0")
    ]
    assert {row["check"] for row in rows if row["verdict"] == FAIL} == {"free room"}


def test_a_check_that_hangs_is_a_row_and_the_process_ends(tmp_path, monkeypatch, capsys):
    end, codes = threading.Event(), []
    monkeypatch.setattr(ranks, "LIMIT", 1.0)
    monkeypatch.setattr(doctor, "free_room", lambda *arguments: end.wait())
    monkeypatch.setattr(doctor, "train_alone", lambda device: {"losses": probes.recorded_losses(), "seconds": 0.01})
    monkeypatch.setattr(doctor, "train_together", lambda device: {"losses": probes.recorded_losses(), "weights": ""})
    monkeypatch.setattr(ranks.os, "_exit", codes.append)
    examine(tmp_path)
    end.set()
    assert codes == [1]
    assert "no answer within 1 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words", [["--run-folder", "x"], ["--world-size", "0"], ["--json", "nowhere/health.json"], ["epochs=1"]]
)
def test_a_bad_command_line_is_refused(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run_command(lambda: doctor.main(words)) == 2
    assert "command line" in capsys.readouterr().err


def test_weights_and_biases_is_found_or_noted(monkeypatch):
    def check() -> Finding:
        [finding] = doctor.check_wandb(ranks.Ranks(doctor.launched_world()))
        return finding

    assert check().verdict == NOTE and "cannot be reached" in check().figure
    for module in (doctor, probes):  # a busy machine answers itself late
        monkeypatch.setattr(module, "WANDB_SECONDS", 30.0)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # answers 501
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        found = check()
        server.shutdown()
    assert found.verdict == OK and "answers in" in found.figure


@pytest.mark.parametrize("training", [probes.train_alone, probes.train_together])
def test_the_reference_training_has_no_tf32_which_would_leave_its_tolerance(training, monkeypatch):
    found = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)

    def loss(*arguments: Any, **keywords: Any) -> torch.Tensor:
        found.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return cross_entropy(*arguments, **keywords)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", loss)
    training(torch.device("cpu"))
    assert found == [(False, False)] * probes.STEPS


def test_a_device_without_a_number_can_be_asked():
    """As Accelerate names the GPU of a single process."""
    state: Any = SimpleNamespace(process_index=0, num_processes=1, device=torch.device("cuda"))
    assert ranks.Ranks(state).ask(lambda: 1) == [1]


def test_the_recorded_losses_are_this_trainer_s_own(tmp_path, monkeypatch):
    before = json.loads(probes.REFERENCE.read_text())
    monkeypatch.setattr(doctor, "REFERENCE", tmp_path / "reference.json")
    assert doctor.main(["--record"]) == 0
    after = json.loads((tmp_path / "reference.json").read_text())
    assert before.keys() == after.keys() and len(before["losses"]) == probes.STEPS
    assert after["losses"] == pytest.approx(before["losses"], rel=doctor.TOLERANCE)
    assert after["losses"][-1] < after["losses"][0], "it learns"


# --- two processes ------------------------------------------------------------------------------------------------


def launch(
    tmp_path: Path, fault: str = "", limit: float = ranks.LIMIT
) -> tuple[subprocess.CompletedProcess, list[dict]]:
    """The doctor in two CPU processes through torchrun, with a fault put into the second; what it printed, its rows."""
    script = tmp_path / "script.py"
    script.write_text(
        "import os, sys, time\n"
        "from mnist_dist.doctor import __main__ as doctor, measurements as probes, ranks\n"
        f"ranks.LIMIT = {limit}\n"
        "if os.environ['RANK'] == '1':\n"
        + textwrap.indent(textwrap.dedent(fault).strip() or "pass", "    ")
        + "\nsys.exit(doctor.run_command(doctor.main))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    command += ["--run-dir", str(tmp_path / "runs"), "--json", str(tmp_path / "health.json")]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert "verdict" in done.stdout, done.stdout + done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["health.json", "script.py"]
    return done, json.loads((tmp_path / "health.json").read_text())["checks"]


def test_two_fit_processes_print_one_table(tmp_path):
    done, rows = launch(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("verdict") == 1 and done.stdout.count("fit to train") == 1
    assert "\x1b" not in done.stdout and "…" not in done.stdout
    assert list(dict.fromkeys(row["check"] for row in rows)) == CHECKS
    assert not [row for row in rows if row["verdict"] == FAIL]
    assert "64 MB" in rows_of(rows, "peer to peer")[0]["figure"]
    assert "2 processes by torchrun on 1 node" in rows_of(rows, "world")[0]["figure"]


def test_the_rank_with_the_faults_is_named_for_each(tmp_path):
    done, rows = launch(
        tmp_path,
        """
        own, sound = doctor.versions, doctor.train_alone
        doctor.versions = lambda: own() | {"torch": "0.4.1"}
        def fail(self, target):
            raise OSError(30, "Read-only file system")
        probes.Path.replace = fail
        now = time.time
        probes.time.time = lambda: now() - 5
        def shifted(device):
            answer = sound(device)
            answer["losses"][1] += 0.01
            return answer
        doctor.train_alone = shifted
        """,
    )
    assert done.returncode == 1
    assert done.stdout.count("verdict") == 1 and "not fit to train: versions (1), write and rename (1)" in done.stdout
    failed = {row["check"]: (row["figure"], row["ranks"]) for row in rows if row["verdict"] == FAIL}
    assert failed.keys() == {"versions", "write and rename", "training, each alone"}
    assert {named for _, named in failed.values()} == {"1"}
    assert "torch 0.4.1 instead of" in failed["versions"][0]
    assert failed["write and rename"][0] == "OSError: [Errno 30] Read-only file system"
    assert "at step 2" in failed["training, each alone"][0]
    assert rows_of(rows, "clocks", WARN)[0]["ranks"] == "1"


def test_a_rank_that_hangs_is_named_and_the_others_do_not_wait_for_it(tmp_path):
    began = time.monotonic()
    done, rows = launch(tmp_path, "doctor.measure_all_reduce = lambda ranks: time.sleep(200)", limit=10)
    assert done.returncode == 1
    assert time.monotonic() - began < 120
    [row] = rows_of(rows, "all-reduce")
    assert (row["verdict"], row["ranks"]) == (FAIL, "1")
    assert row["figure"].startswith("no answer within 10 s")
    assert "not tried" in rows_of(rows, "training, together")[0]["figure"]
    assert rows_of(rows, "training, each alone")[0]["verdict"] == OK


def test_ranks_that_raise_or_die_are_named_on_all_of_them(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            import os, time, torch, torch.distributed as dist
            from mnist_dist.doctor import ranks
            from mnist_dist.distributed.launcher import launched_world
            ranks.LIMIT, ranks.GRACE = 10.0, 1.0
            world = ranks.Ranks(launched_world())

            def fail():
                if world.rank == 1:
                    raise KeyError("no such thing")
                return "fine"

            def meet():
                fail()
                dist.all_reduce(torch.ones(1))

            def ask(action, **options):
                began = time.monotonic()
                try:
                    said = world.ask(action, **options)
                except ranks.Failed as failure:
                    said = failure.errors, failure.values
                print(said, time.monotonic() - began < 6, flush=True)

            ask(lambda: world.rank)
            ask(fail)
            ask(meet, meets=True)
            ask(meet, meets=True)
            ask(lambda: os._exit(9) if world.rank == 1 else None)
            ask(lambda: "alone")
            world.leave(7)
            """
        )
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = []  # without a launcher, which would end the one when the other dies
    for rank in ("0", "1"):
        environment = os.environ | world | {"RANK": rank, "LOCAL_RANK": rank, "ACCELERATE_USE_CPU": "true"}
        command = [sys.executable, str(script)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=200)[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [7, 9]
    error = "{1: \"KeyError: 'no such thing'\"}"
    skipped = "not tried: an earlier meeting of all processes failed"
    assert said[0] == [
        "[0, 1] True",
        f"({error}, {{0: 'fine'}}) True",
        f"({error}, {{}}) True",
        f"({ {0: skipped, 1: skipped} }, {{}}) True",
        "({1: 'not heard of any more'}, {0: None}) False",
        "({1: 'not heard of any more'}, {0: 'alone'}) True",
    ]
    assert said[1] == said[0][:4]
