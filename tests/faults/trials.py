"""Trials: a run is disturbed, goes on by the same command, and must end in the undisturbed run's bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import psutil

from mnist_dist.distributed.signals import PREEMPTED, SIGNALS
from mnist_dist.engine.checkpoint import list_checkpoints
from mnist_dist.run.folder import RunFolder
from tests.faults.damage import KINDS, Scene
from tests.faults.training import (
    STEPS,
    bytes_of,
    checkpoint_bytes,
    command,
    differences,
    finish,
    start,
)
from tests.faults.victim import POINTS

T = TypeVar("T")

PHASES = ("start", "step", "evaluation", "saving", "ending")
BLOWS_PER_RUN = 5
SECONDS_TO_STOP = 10.0
DURATIONS = {"start": 5.0, "step": 0.05, "evaluation": 0.1, "saving": 0.03, "ending": 2.0}
"""Seconds that a phase last took: how long after its begin a blow may fall."""


class Place(NamedTuple):
    """Where a run is struck: at a chosen point, or at any moment of a phase."""

    phase: str
    point: str | None = None

    @property
    def only_at_the_end(self) -> bool:
        return self.phase == "ending" or "last.safetensors" in (self.point or "")

    @property
    def how(self) -> str:
        return self.point or "any moment"

    def __str__(self) -> str:
        return f"{self.phase}: {self.how}"


ANYWHERE = [Place(phase) for phase in PHASES]
PLACES = [*ANYWHERE * 3, *(Place(point.phase, name) for name, point in POINTS.items())]


@dataclass
class Blow:
    """One kill, signal or damage."""

    what: str
    where: str
    """The phase of the run, or the part of the checkpoint."""
    how: str
    """The point, the outcome or the kind: what the table counts beside where."""
    detail: str


@dataclass
class Trial:
    """One run: what it had to bear, and what is wrong with how it ended; nothing if it survived."""

    blows: list[Blow] = field(default_factory=list)
    problem: str | None = None

    def __str__(self) -> str:
        return " · ".join(blow.detail for blow in self.blows) + f" -> {self.problem or 'the same bytes'}"


class Notes(NamedTuple):
    """Where rank 0 was at one moment, by what its victim wrote down."""

    phases: list[str]
    """The phases under way, outermost first."""
    step: int
    held: bool

    @property
    def phase(self) -> str:
        return self.phases[-1]

    @property
    def in_the_loop(self) -> bool:
        """Whether handlers stand for signals."""
        return self.phases[0] == "step"


# --- a run that is being watched ----------------------------------------------------------------------------------


class Watched:
    """A started run, told by what its processes note down."""

    def __init__(self, run_dir: Path, world_size: int, hold: tuple[int, str] | None = None, *words: str):
        self.run_dir, self.world_size = run_dir, world_size
        self._notes = run_dir.with_name(f"{run_dir.name}.notes.{time.monotonic_ns()}")
        variables = {"FAULTS_NOTES": str(self._notes)}
        if hold:
            variables["FAULTS_HOLD"] = f"{hold[0]} {hold[1]}"
        self._begun = time.monotonic_ns()
        self.process = start(command(run_dir, world_size, *words, module="tests.faults.victim"), **variables)

    def ranks(self, rank: str = "*") -> list[Path]:
        """The notes of the processes that train, oldest first; the last part of each name is a process's number."""
        return sorted(self._notes.parent.glob(f"{self._notes.name}.{rank}.*"), key=lambda path: path.stat().st_ctime_ns)

    def lines(self) -> list[tuple[int, str, str, int]]:
        """What the newest process of rank 0 has noted."""
        text = self.ranks("0")[-1].read_text() if self.ranks("0") else ""
        parts = (line.split() for line in text.splitlines())
        return [(int(when), sign, phase, int(step)) for when, sign, phase, step in parts]

    def wait_for(self, phase: str, step: int) -> None:
        """Until that phase begins, after at least so many updates.

        Raises:
            AssertionError: the run ended before, or nothing happened in two minutes.
        """
        deadline, what = time.monotonic() + 120, f"{phase} at step {step} or later was not reached"
        read = -1
        while True:
            written = sum(path.stat().st_size for path in self.ranks("0"))
            begun = [(name, at) for _, sign, name, at in self.lines() if sign == "+"] if written != read else []
            if any(name == phase and at >= step for name, at in begun):
                return
            if self.process.poll() is not None:
                raise AssertionError(f"{what}; exit code {self.process.returncode}:\n{self.end()}")
            assert time.monotonic() < deadline, f"{what} in two minutes"
            read = written
            time.sleep(0.001)

    def where(self, nanoseconds: int | None = None) -> Notes:
        """Where rank 0 was at that moment of the monotonic clock, or where it is."""
        phases, last, held = ["start"], 0, False
        for when, sign, phase, step in self.lines()[1:]:
            if nanoseconds is not None and when > nanoseconds:
                break
            last = step
            if phase == "held":
                held = True
            elif sign == "+":
                phases.append(phase)
            else:
                phases.pop()
        return Notes(phases or ["ending"], last, held)

    def _note_durations(self) -> None:
        begun = {"start": self._begun}
        for when, sign, phase, _ in self.lines()[1:]:
            if sign == "+":
                begun[phase] = when
            elif phase in begun:
                DURATIONS[phase] = (when - begun[phase]) / 1e9
        if self.process.returncode == 0 and "ending" in begun:
            DURATIONS["ending"] = (time.monotonic_ns() - begun["ending"]) / 1e9

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        """Nothing that was started outlives its trial."""
        if self.processes():
            self.kill()

    def processes(self) -> list[psutil.Process]:
        """All that this run started, found by their environment: workers have sessions of their own."""
        return [each for each in psutil.process_iter() if _environment(each).get("FAULTS_NOTES") == str(self._notes)]

    def kill(self) -> None:
        """SIGKILL to every process, the workers before the launcher, which would tell the others."""
        if self.process.poll() is None:
            launcher = psutil.Process(self.process.pid)
            for each in [*reversed(launcher.children(recursive=True)), launcher]:
                _kill(each)
        while left := [each for each in self.processes() if each.pid != self.process.pid]:
            for each in left:  # started while the others were being killed
                _kill(each)
            time.sleep(0.01)
        self.end()

    def end(self, seconds: float = 60) -> str:
        """Waits until no process is left; returns what they said.

        Raises:
            subprocess.TimeoutExpired: one is left after so long.
        """
        deadline = time.monotonic() + seconds
        output, _ = self.process.communicate(timeout=seconds)  # workers hold its other end too
        while self.processes():
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.process.args, seconds, output)
            time.sleep(0.01)
        self._note_durations()
        return output


def _environment(process: psutil.Process) -> dict[str, str]:
    try:
        return process.environ() if process.status() != psutil.STATUS_ZOMBIE else {}
    except (psutil.Error, OSError):
        return {}


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


# --- trials -------------------------------------------------------------------------------------------------------


def kills_of(seed: int, count: int = BLOWS_PER_RUN) -> list[tuple[Place, signal.Signals]]:
    """So many kills; consecutive seeds go round all of `PLACES`."""
    return _ordered([(_turn(PLACES, seed, number), signal.SIGKILL) for number in range(count)])


def signals_of(seed: int, count: int = BLOWS_PER_RUN) -> list[tuple[Place, signal.Signals]]:
    """So many signals; consecutive seeds go round every signal in every phase."""
    pairs = [(place, number) for number in SIGNALS for place in ANYWHERE]
    return _ordered([_turn(pairs, seed, number) for number in range(count)])


def _turn(values: Sequence[T], seed: int, number: int) -> T:
    return values[(seed * BLOWS_PER_RUN + number) % len(values)]


def _ordered(blows: list[tuple[Place, signal.Signals]]) -> list[tuple[Place, signal.Signals]]:
    """As a run passes the places."""
    return sorted(blows, key=lambda blow: blow[0].only_at_the_end)


def steps_of(places: Sequence[Place], chance: random.Random) -> list[int]:
    """A step for each place, growing, with room for a checkpoint of its own between two."""
    room = STEPS / len(places)
    return [_step_of(place, room * number + chance.uniform(0, max(room - 7, 0))) for number, place in enumerate(places)]


def _step_of(place: Place, step: float) -> int:
    if place.phase == "start":
        return 0
    return STEPS if place.only_at_the_end else int(step)


def strike(run: Watched, place: Place, step: int, chance: random.Random) -> None:
    """Waits until the run is where the blow is to fall."""
    if place.point:
        run.wait_for("held", step)
        return
    if place.phase != "start":
        run.wait_for(place.phase, step)
    time.sleep(chance.uniform(0, DURATIONS[place.phase]))


def blow_trial(
    home: Path, reference: dict[str, Any], seed: int, world_size: int, blows: Sequence[tuple[Place, signal.Signals]]
) -> Trial:
    """Kills one run or asks it to stop, again and again; goes on each time by the same command, and lets it end."""
    chance, run_dir, trial = random.Random(f"blows {seed}"), home / f"blows-{seed}", Trial()
    steps, newest = steps_of([place for place, _ in blows], chance), 0
    with survived(trial, run_dir, reference, world_size):
        for (place, number), step in zip(blows, steps, strict=True):
            with Watched(run_dir, world_size, (step, place.point) if place.point else None) as run:
                strike(run, place, step, chance)
                if run.process.poll() == 0:
                    break  # it was at its end before the blow fell, which is none
                if number == signal.SIGKILL:
                    run.kill()
                    where = run.where()
                    struck = place if where.held else Place(where.phase)
                    trial.blows.append(Blow("SIGKILL", struck.phase, struck.how, f"{struck} (step {where.step})"))
                else:
                    ask_to_stop(run, number, chance, trial)
            newest = check_published(run_dir, reference, newest)
    return trial


def ask_to_stop(run: Watched, number: signal.Signals, chance: random.Random, trial: Trial) -> None:
    """Sends a signal and waits.

    Raises:
        AssertionError: the run did not save and stop in time, although its handlers stood.
    """
    target, whom = run.process.pid, ""
    if run.world_size > 1:
        whom = " to the launcher"
        # torchrun passes on the other two; this one a batch system sends to the workers.
        if run.ranks() and (number == signal.SIGUSR1 or chance.random() < 0.5):
            path = chance.choice(run.ranks())
            target, whom = pid_of(path), f" to {rank_of(path)}"
    sent = time.monotonic_ns()
    os.kill(target, number)
    output = run.end()
    seconds, where, code = (time.monotonic_ns() - sent) / 1e9, run.where(sent), run.process.returncode
    word = status_of(run.run_dir)
    detail = f"{number.name}{whom} in {where.phase} (step {where.step}): exit {code}, {word}, {seconds:.1f} s"
    trial.blows.append(Blow("TERM, INT, USR1", where.phase, f"{number.name}{whom}: exit {code}, {word}", detail))
    # torchrun's exit code is its own.
    saved = word == "preempted" and (code == PREEMPTED or run.world_size > 1)
    at_its_end = word == "done" and code == 0
    assert saved or at_its_end or not where.in_the_loop, f"{detail}:\n{output}"
    assert seconds < SECONDS_TO_STOP, detail


def status_of(run_dir: Path) -> str:
    status = RunFolder(run_dir).status
    return status.read_text().strip() if status.is_file() else "none"


def pid_of(notes: Path) -> int:
    return int(notes.suffix[1:])


def rank_of(notes: Path) -> str:
    return f"rank {notes.suffixes[-2][1:]}"


def damage_trial(home: Path, reference: dict[str, Any], seed: int, world_size: int, kinds: Sequence[str]) -> Trial:
    """Damages what a killed run left, goes on by the same command, and lets it end."""
    chance, run_dir, trial = random.Random(f"damage {seed}"), home / f"damage-{seed}", Trial()
    with survived(trial, run_dir, reference, world_size, finished=True):
        shutil.copytree(_stopped_run(home, seed, world_size), run_dir)
        scene = Scene(run_dir, chance)
        named: list[str] = []
        for name in kinds:
            KINDS[name](scene)
            named += scene.named
            what, _, how = name.partition(": ")
            trial.blows.append(Blow("damage", what, how, name))
        scene.named = named
        output = finish(run_dir, world_size, *KEEP_THREE)
        assert not scene.harm.exists(), "code in a checkpoint was run"
        for name in scene.named:
            assert name in output, f"{name} is not named:\n{output}"
            aside = list(scene.newest.parent.glob(f"damaged-{name}-*"))
            assert aside or not name.startswith("step-"), f"{name} was not set aside:\n{output}"
        goes_on = f"goes on after step {scene.used.name.removeprefix('step-')}" if scene.used else "goes on"
        assert (goes_on in output) == bool(scene.used), f"it did not go on from {scene.used}:\n{output}"
    return trial


KEEP_THREE = ("checkpoint.keep=3",)


def _stopped_run(home: Path, seed: int, world_size: int) -> Path:
    """A run with three checkpoints, killed; a few of them serve all damages."""
    chance, run_dir = random.Random(f"stopped {seed % 4}"), home / f"stopped-{seed % 4}"
    if not run_dir.exists():
        run = Watched(run_dir, world_size, None, *KEEP_THREE)
        with run:
            strike(run, Place("step"), chance.randrange(STEPS // 2, STEPS - 2), chance)
            run.kill()
    return run_dir


def restart_trial(home: Path, reference: dict[str, Any], seed: int, world_size: int) -> Trial:
    """SIGKILLs one worker: torchrun starts the group again, and nobody does anything."""
    # Otherwise torchrun keeps the store of the first attempt, and in it the second finds the addresses of the dead:
    # https://github.com/pytorch/pytorch/issues/135712
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    chance, run_dir, trial = random.Random(f"restart {seed}"), home / f"restart-{seed}", Trial()
    with survived(trial, run_dir, reference, world_size, finished=True):
        run = Watched(run_dir, world_size, None, "--max-restarts=1")
        with run:
            strike(run, Place("step"), chance.randrange(8, STEPS - 2), chance)
            path, where = chance.choice(run.ranks()), run.where()
            os.kill(pid_of(path), signal.SIGKILL)
            rank = rank_of(path)
            trial.blows.append(Blow("SIGKILL of one worker", where.phase, rank, f"{rank} (step {where.step})"))
            output = run.end(seconds=300)
            assert run.process.returncode == 0, f"torchrun ended with {run.process.returncode}:\n{output}"
            assert len(run.ranks("0")) == 2, f"the group was not started again:\n{output}"
            assert "goes on after step" in output, f"it began anew:\n{output}"
    return trial


@contextmanager
def survived(
    trial: Trial, run_dir: Path, reference: dict[str, Any], world_size: int, finished: bool = False
) -> Iterator[None]:
    """Around the blows: afterwards lets the run end, unless it is at its end, and compares; keeps what is wrong."""
    try:
        yield
        if not finished and status_of(run_dir) != "done":
            finish(run_dir, world_size)
        check_end(run_dir, reference)
    except (AssertionError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        trial.problem = str(error) or repr(error)


def check_published(run_dir: Path, reference: dict[str, Any], newest: int) -> int:
    """The newest checkpoint is whole, equal to the undisturbed run's and no older than `newest`; returns its step.

    Raises:
        AssertionError: it is not.
    """
    saved = list_checkpoints(RunFolder(run_dir).checkpoints)
    step = int(saved[-1].name.removeprefix("step-")) if saved else 0
    assert step >= newest, f"there was a checkpoint of step {newest}, now the newest is of {step}"
    if saved:
        found = checkpoint_bytes(saved[-1])
        wrong = [place for place in found if found[place] != reference.get(place)]
        assert not wrong, f"{saved[-1].name} differs from the undisturbed run's in {len(wrong)} places: {wrong[:3]}"
    return step


def check_end(run_dir: Path, reference: dict[str, Any]) -> None:
    """A run has ended in the same bytes, and left nothing half written.

    Raises:
        AssertionError: it has not.
    """
    wrong = differences(bytes_of(run_dir), reference)
    assert not wrong, f"it ended in other bytes, in {len(wrong)} places: {wrong[:3]}"
    left = [path.name for path in [*run_dir.glob("*.tmp"), *run_dir.glob("checkpoints/.*.staged")]]
    assert not left, f"left over: {left}"
