"""The checks: they turn the figures of the ranks into findings and name the ranks with a fault."""

from __future__ import annotations

import http.server
import math
import threading
from typing import Any

import pytest

from mnist_dist.distributed.launcher import launched_world
from mnist_dist.doctor import checks, gpu, measurements, training
from mnist_dist.doctor.checks import FAIL, NOTE, OK, SLOW, WARN, Finding
from mnist_dist.doctor.ranks import Ranks


def test_a_rank_is_slow_above_a_multiple_of_the_median():
    assert checks.slow_positions([1.0, 1.1, 0.9, 2.9]) == []
    assert checks.slow_positions([1.0, 1.1, 0.9, 3.5]) == [3]
    assert checks.slow_positions([4.0, 1.0]) == [0], "of two ranks the faster one is the reference"
    assert checks.slow_positions([5.0]) == []


def test_values_are_compared_with_the_most_common_one():
    assert checks.most_common(["a", "b", "b"]) == ("b", [0])
    assert checks.most_common(["a", "b"]) == ("a", [1]), "in a tie the value of rank 0 counts"
    assert checks.most_common(["a"]) == ("a", [])


@pytest.mark.parametrize(("ranks", "text"), [([], ""), ([3], "3"), ([2, 0, 1], "0–2"), ([7, 0, 1, 5, 6], "0–1, 5–7")])
def test_ranks_are_formatted_as_ranges(ranks, text):
    assert checks.format_ranks(ranks) == text


REFERENCE = [2.3, 2.2, 2.1, 2.0, 1.9, 1.8]


@pytest.mark.parametrize(
    ("step", "factor", "verdict"),
    [(1, 1 + 9e-6, OK), (1, 1 + 2e-5, FAIL), (6, 1 - 9e-4, OK), (6, 1 - 2e-3, FAIL), (3, math.nan, FAIL)],
)
def test_losses_are_compared_with_the_reference(step, factor, verdict):
    wrong = [loss * (factor if index == step else 1) for index, loss in enumerate(REFERENCE, start=1)]
    [finding] = training.compare_losses([REFERENCE, wrong], REFERENCE)
    assert finding.verdict == verdict
    if verdict == FAIL:
        assert finding.ranks == "1"
        assert f"step {step}:" in finding.figure and f"{REFERENCE[step - 1]:.6f}" in finding.figure


# --- findings from given figures ----------------------------------------------------------------------------------


class FakeRanks:
    """Stands in for `Ranks`: returns given results, one list per call of `run`."""

    rank, device = 0, None

    def __init__(self, *results: list):
        self.results, self.size = list(results), len(results[0])

    def run(self, action, **options) -> Any:
        return self.results.pop(0)


def link(node: str = "a", seconds: float = 1e-4, damaged: tuple = ()) -> dict:
    return {"node": node, "seconds": dict.fromkeys(measurements.SIZES, seconds), "damaged": list(damaged)}


def test_a_slow_link_is_named():
    [finding] = checks.check_links(FakeRanks([link(), link(seconds=1e-3), link(), link()]))
    assert (finding.verdict, finding.ranks) == (SLOW, "1→2 (64 MB 67.1 GB/s)")


def test_links_between_nodes_are_not_compared_with_links_within_a_node():
    findings = list(checks.check_links(FakeRanks([link("a"), link("a", 1e-2), link("b"), link("b", 1e-2)])))
    assert [finding.verdict for finding in findings] == [OK, OK]
    assert [finding.figure.partition(":")[0] for finding in findings] == ["within a node", "between nodes"]


def test_damaged_bytes_and_wrong_sums_fail_and_name_their_ranks():
    finding = next(checks.check_links(FakeRanks([link(), link(damaged=("64 MB",)), link()])))
    assert (finding.verdict, finding.ranks) == (FAIL, "1") and "64 MB" in finding.figure
    sums = [{"seconds": dict.fromkeys(measurements.SIZES, 1e-3), "wrong": wrong} for wrong in ([], [], ["1 MB"])]
    finding = next(checks.check_all_reduce(FakeRanks(sums)))
    assert (finding.verdict, finding.ranks) == (FAIL, "2") and "1 MB" in finding.figure


def written(node: str, seconds: float = 0.01) -> dict:
    return {"name": "file", "node": node, "seconds": seconds}


def test_a_folder_that_nodes_do_not_share_is_a_warning_and_a_missing_file_on_the_same_node_a_failure(tmp_path):
    def check(nodes: str, missing: list) -> Finding:
        return next(checks.check_folder(FakeRanks([*map(written, nodes)], missing, [], []), tmp_path))

    assert check("ab", [[1], [0]]).verdict == WARN
    assert check("abc", [[1], [0, 2], [1]])[::2] == (WARN, "1")
    assert check("aab", [[], [0], []])[::2] == (FAIL, "0–1")
    assert check("aa", [[], []]).verdict == OK


def test_a_slow_disk_a_full_disk_and_a_wrong_clock_are_named(tmp_path):
    ranks = FakeRanks([written("a"), written("a", 3.0)], [[], []], [], [])
    assert next(checks.check_folder(ranks, tmp_path))[::2] == (SLOW, "1")
    free, full = {"memory": 8e9, "disk": 8e9}, {"memory": 8e9, "disk": 5e8}
    memory, disk = checks.check_space(FakeRanks([free, free, full]), tmp_path)
    assert (memory.verdict, disk.verdict, disk.ranks) == (OK, WARN, "2")
    clocks = [[[now, now + 0.001]] for now in (10.0, 10.0, 15.0)]
    assert next(checks.check_clocks(FakeRanks(clocks)))[::2] == (WARN, "2")


def test_different_weights_after_training_are_a_warning():
    results = [{"losses": REFERENCE, "weights": weights} for weights in ("same", "same", "other")]
    findings = list(training.check_training_distributed(FakeRanks(results, [REFERENCE] * 3)))
    assert [finding[::2] for finding in findings] == [(OK, ""), (WARN, "2")]


# --- limits, shared memory, GPUs ----------------------------------------------------------------------------------


def test_limits_of_cores_and_memory_are_reported():
    free = {"cores": 64, "machine": 64, "memory": None}
    [finding] = checks.check_limits(FakeRanks([free, free | {"cores": 4, "memory": 8_000_000_000}]))
    assert (
        finding[::2]
        == (
            OK,
            "1",
        )
        and "4 to 64 of 64 cores" in finding.figure
        and "8.0 GB" in finding.figure
    )
    [finding] = checks.check_limits(FakeRanks([free]))
    assert finding.ranks == "" and "64 of 64 cores" in finding.figure


def test_the_shared_memory_of_a_container_by_default_is_too_small(tmp_path):
    free = {"memory": 8e9, "/dev/shm": 2e9, "disk": 8e9}
    _, shared, _ = checks.check_space(FakeRanks([free, free | {"/dev/shm": 64 * 2**20}]), tmp_path)
    assert (shared.verdict, shared.ranks) == (WARN, "1")


HEALTHY = "550.54.15, 0, No, 0x0000000000000004, 61"
"""The usual power limit is not throttling."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (HEALTHY, {"driver": "550.54.15", "ecc_errors": 0, "needs_reset": False, "throttling": [], "temperature": 61}),
        ("550.54.15, 3, Yes, 0x0000000000000000, 40", {"ecc_errors": 3, "needs_reset": True}),
        ("470.82, [N/A], [N/A], 0x0000000000000068, 93\n", {
            "ecc_errors": None, "needs_reset": False,
            "throttling": ["hardware slowdown", "heat, by software", "heat, by hardware"], "temperature": 93,
        }),
        ("535.1, [Not Supported], [Not Supported], [Not Supported], 50", {"throttling": [], "temperature": 50}),
        ("535.1, 0, No, 0x0000000000000001, 30", {"throttling": []}),  # idle
    ],
)  # fmt: skip
def test_a_line_of_nvidia_smi_is_read(text, expected):
    found = gpu.parse_gpu(text)
    assert {key: found[key] for key in expected} == expected and "problem" not in found


@pytest.mark.parametrize("text", ["", "No devices were found\n", "a, b"])
def test_other_output_of_nvidia_smi_is_a_problem(text):
    assert gpu.parse_gpu(text).keys() == {"problem"}


def test_faults_of_gpus_name_their_ranks():
    sound = gpu.parse_gpu(HEALTHY)
    ranks = FakeRanks(
        [sound, sound | {"ecc_errors": 2}, sound | {"throttling": ["power brake"]}, sound | {"driver": "1"}]
    )
    findings = list(checks.check_gpus(ranks))
    assert [(each.verdict, each.ranks) for each in findings] == [(WARN, "1"), (SLOW, "2"), (WARN, "3")]
    [finding] = checks.check_gpus(FakeRanks([sound, sound | {"temperature": 70}]))
    assert finding.verdict == OK and "70" in finding.figure and "550.54.15" in finding.figure
    assert [each.verdict for each in checks.check_gpus(FakeRanks([{}, {}]))] == [OK]
    problem = checks.check_gpus(FakeRanks([{"problem": "no program"}, sound]))
    assert [each.verdict for each in problem] == [NOTE, OK]
    [unused] = checks.check_gpus(FakeRanks([{}, {"unused": "built without CUDA"}, {"unused": "built without CUDA"}]))
    assert (unused.verdict, unused.ranks) == (WARN, "1–2") and "built without CUDA" in unused.figure


# --- Weights & Biases ---------------------------------------------------------------------------------------------


def test_wandb_is_ok_if_its_server_answers_and_a_note_otherwise(monkeypatch):
    def check() -> Finding:
        [finding] = checks.check_wandb(Ranks(launched_world()))
        return finding

    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert check().verdict == NOTE
    for module in (checks, measurements):  # a busy machine answers late
        monkeypatch.setattr(module, "WANDB_SECONDS", 60.0)
    with http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:  # answers 501
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        found = check()
        server.shutdown()
    assert found.verdict == OK and str(server.server_port) in found.figure
