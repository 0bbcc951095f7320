"""launch/elastic.sh on three machines: they die, freeze, lose their network, leave and join while a run trains.

With MNIST_DIST_CLUSTER_TABLE=tests/README.md the results are written as a table between the marks of that file.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mnist_dist import load_run
from tests.cluster.machines import MACHINES, Machines, missing
from tests.cluster.results import Results, written_as_table
from tests.cluster.undisturbed import train_undisturbed
from tests.distributed.training import WITHOUT_TRACKING, weights_and_metrics
from tests.processes import ROOT

MARKS = ("<!-- elastic: made by tests/cluster -->", "<!-- end of elastic -->")

WORDS = [
    *("--recipe", "lenet5", "model.name=tests.cluster.slow_network:SlowLeNet", *WITHOUT_TRACKING),
    *("data.dataset=synthetic", "data.limit_train=1600", "data.limit_test=128", "batch_size=64", "log_every=1"),
    *("epochs=40", "optimizer.name=sgd", "optimizer.lr=0.05"),
]
SHARDS = "logical_shards=8"


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    with written_as_table(request, "pytest -m cluster tests/cluster/test_elastic.py", len(MACHINES), MARKS) as found:
        yield found


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[Machines]:
    if reason := missing():
        pytest.skip(reason)
    with Machines(tmp_path) as made:
        yield made


def undisturbed(folder: Path, *words: str) -> tuple[bytes, list[dict]]:
    """Trains in one process; returns the last weights and the metrics."""
    return weights_and_metrics(train_undisturbed(folder, [*WORDS, *words]))


class Job:
    """A run of launch/elastic.sh on several machines, and what its files show."""

    def __init__(self, machines: Machines, run_dir: Path, head: str, *words: str):
        self.machines, self.run_dir, self.log = machines, run_dir, run_dir.with_suffix(".log")
        self.slow = run_dir.with_suffix(".slow")
        self.slow.touch()
        command = [ROOT / "launch" / "elastic.sh", f"{head}:29400", f"1:{len(MACHINES)}", "1"]
        self._command = [*command, *WORDS, *words, "--run-dir", run_dir]
        self.launchers: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, *names: str) -> None:
        """Runs the command on these machines."""
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        variables = {"ACCELERATE_USE_CPU": "true", "GLOO_SOCKET_IFNAME": "eth0", "OMP_NUM_THREADS": "1", "PATH": path}
        variables |= {"PYTHONPATH": str(ROOT), "SLOW_WHILE": str(self.slow)}
        for name in names:
            self.launchers[name] = self.machines.start(name, self._command, self.log, **variables)

    def _lines(self, file: str) -> list[dict]:
        path = self.run_dir / file
        lines = path.read_text().splitlines(keepends=True) if path.is_file() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    @property
    def world(self) -> list[dict]:
        return self._lines("world.jsonl")

    @property
    def step(self) -> int:
        return max((line["step"] for line in self._lines("metrics.jsonl")), default=0)

    def wait_for(self, condition: Callable[[], object], what: str, seconds: float = 180) -> None:
        """Waits until a condition holds; fails with the end of the log after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"not within {seconds:g} s: {what}\n{self.log.read_text()[-6000:]}"
            time.sleep(0.05)

    def change(
        self, what: Callable[[], None], processes: int, cause: str, again: Callable[[], None] = lambda: None
    ) -> tuple[float, int]:
        """Changes the machines and waits until the new world has made its first step, and ten more.

        Args:
            processes: the number of processes in the new world.
            cause: the cause that the history of the world names.
            again: called again and again while the world waits.

        Returns:
            The seconds until that first step, and the number of steps that were lost.
        """
        starts, step = len(self.world), self.step
        what()
        begun = time.monotonic()
        self.wait_for(lambda: again() or len(self.world) > starts, f"a world of {processes} processes")
        first = self.world[starts]
        self.wait_for(lambda: self.step > first["step"], f"the first step of {processes} processes")
        seconds = time.monotonic() - begun
        self.wait_for(lambda: self.step > first["step"] + 10, "ten steps")
        assert [(each["processes"], each["cause"]) for each in self.world[starts:]] == [(processes, cause)], self.world
        return seconds, max(0, step - first["step"])

    def start_again(self, name: str) -> None:
        """Runs the command again if the launcher was cut off for more than a minute and has ended with code 75."""
        if self.launchers[name].poll() is not None:
            assert self.launchers[name].returncode == 75, self.log.read_text()[-6000:]
            self.start(name)

    def finish(self, *names: str) -> None:
        """Lets the run train at full speed and checks that the launchers of these machines end with exit code 0."""
        self.slow.unlink()
        for name in names:
            assert self.launchers[name].wait(timeout=240) == 0, self.log.read_text()[-6000:]


def test_ten_changes_of_the_world_leave_the_bytes_of_an_undisturbed_run(machines, tmp_path, results):
    """a2 holds the rendezvous. a0 has rank 0 while it is there, so the writer of the run changes, too."""
    job = Job(machines, tmp_path / "run", "a2", SHARDS)
    job.start("a0", "a1", "a2")
    job.wait_for(lambda: job.step >= 10, "ten steps of the first world")

    def note(what: str, where: str, change: tuple[float, int]) -> None:
        seconds, lost = change
        results.add(what, where, f"the same bytes; first new step after {seconds:.0f} s, {lost} steps lost")

    def kill(*names: str) -> None:
        for name in names:
            machines.kill(name)

    lost, joined, left = "processes lost", "processes joined", "processes left"
    found = {
        ("a machine dies", "3 → 2"): job.change(lambda: kill("a1"), 2, lost),
        ("a machine joins", "2 → 3"): job.change(lambda: job.start("a1"), 3, joined),
        ("two machines die, with rank 0", "3 → 1"): job.change(lambda: kill("a0", "a1"), 1, lost),
        ("a machine joins", "1 → 2"): job.change(lambda: job.start("a0"), 2, joined),
        ("a machine joins", "2 → 3 again"): job.change(lambda: job.start("a1"), 3, joined),
        ("a process dies", "3 → 3"): job.change(
            lambda: os.kill(machines.trainers("a1")[0], signal.SIGKILL), 3, "resumed after a failure"
        ),
        ("a machine with rank 0 freezes", "3 → 2"): job.change(lambda: machines.signal("a0", signal.SIGSTOP), 2, lost),
        ("it comes back", "2 → 3"): job.change(lambda: machines.signal("a0", signal.SIGCONT), 3, joined),
        ("a machine loses its network", "3 → 2"): job.change(lambda: machines.cut("a1"), 2, lost),
        ("it gets its network back", "2 → 3"): job.change(
            lambda: machines.connect("a1"), 3, joined, lambda: job.start_again("a1")
        ),
        ("a launcher is asked to stop", "3 → 2"): job.change(lambda: job.launchers["a1"].terminate(), 2, left),
    }
    job.finish("a0", "a2")
    expected = undisturbed(tmp_path / "undisturbed", SHARDS)
    assert weights_and_metrics(tmp_path / "run") == expected
    assert (tmp_path / "run" / "STATUS").read_text() == "done\n"
    history = load_run(tmp_path / "run").summary["world_history"]
    assert [each["processes"] for each in history] == [3, 2, 3, 1, 2, 3, 3, 2, 3, 2, 3, 2] and history == job.world
    for (what, where), change in found.items():
        note(what, where, change)


def test_the_same_command_continues_after_the_loss_of_the_machine_that_holds_the_rendezvous(
    machines, tmp_path, results
):
    """Without logical shards: the same steps and rates. Dropout draws its masks in each process, so losses differ."""
    job = Job(machines, tmp_path / "run", "a0")
    job.start("a0", "a1")
    job.wait_for(lambda: job.step >= 30, "30 steps")
    machines.kill("a0")
    assert job.launchers["a1"].wait(timeout=240) == 75, job.log.read_text()[-6000:]
    message = job.log.read_text()
    assert re.search(r"launch: a0:29400.*\n.*same command.*\n.*resumes", message) and "Traceback" not in message
    job.start("a0", "a1")
    job.finish("a0", "a1")
    _, expected = undisturbed(tmp_path / "undisturbed")
    found = load_run(tmp_path / "run").metrics
    keys = ("step", "epoch", "train/lr")
    assert [[line.get(key) for key in keys] for line in found] == [[line.get(key) for key in keys] for line in expected]
    assert found[-1]["eval/accuracy"] == pytest.approx(expected[-1]["eval/accuracy"], abs=5)
    results.add(
        "the machine that holds the rendezvous dies", "2 → 2", "the message says what to do; the same command continued"
    )
