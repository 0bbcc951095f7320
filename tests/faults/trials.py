"""Trials: a run is disturbed, resumes with the same command, and must end with the bytes of the undisturbed run."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
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
    start_launcher,
)
from tests.faults.victim import POINTS

T = TypeVar("T")

PHASES = ("start", "step", "evaluation", "saving", "writing", "ending", "exit")
"""From the last step to STATUS done is the ending; after it comes the exit of the processes."""
BLOWS_PER_RUN = 5
SECONDS_TO_STOP = 60.0
DURATIONS = {
    "start": 1.0,
    "step": 0.05,
    "evaluation": 0.1,
    "saving": 0.003,
    "writing": 0.03,
    "ending": 0.2,
    "exit": 0.5,
}
"""Seconds that each phase last took. A blow at any moment of a phase comes this long after its start, or earlier."""


class Place(NamedTuple):
    """Where a blow hits the run: at a chosen point, or at any moment of a phase."""

    phase: str
    point: str | None = None

    @property
    def only_at_the_end(self) -> bool:
        return self.phase in ("ending", "exit") or "last.safetensors" in (self.point or "")

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
    """The point, the outcome or the kind of damage; the table counts these."""
    detail: str


@dataclass
class Trial:
    """One run: its blows, and the problem with its end; None if it survived."""

    blows: list[Blow] = field(default_factory=list)
    problem: str | None = None

    def __str__(self) -> str:
        return " · ".join(blow.detail for blow in self.blows) + f" -> {self.problem or 'the same bytes'}"


class Notes(NamedTuple):
    """The phase and step of rank 0 at one moment, from its notes."""

    phases: list[str]
    """The current phases of the main thread, outermost first."""
    step: int
    held: bool
    writing: bool = False
    """Whether the thread writes a file at the same time."""

    @property
    def phase(self) -> str:
        """The innermost phase; all that the run does between its last step and STATUS done counts as its ending.

        "writing" while the thread writes during the training.
        """
        if self.phases[0] in ("ending", "exit"):
            return self.phases[0]
        return "writing" if self.writing else self.phases[-1]

    @property
    def before_the_loop(self) -> bool:
        """Whether the run has not made its first step."""
        return self.phases[0] == "start"


# --- a run that is watched ----------------------------------------------------------------------------------------


class Watched:
    """A run that was started and whose processes write notes."""

    def __init__(self, run_dir: Path, world_size: int, hold: tuple[int, str] | None = None, *words: str):
        self.run_dir, self.world_size = run_dir, world_size
        self._notes = run_dir.with_name(f"{run_dir.name}.notes.{time.monotonic_ns()}")
        variables = {"FAULTS_NOTES": str(self._notes)}
        if hold:
            variables["FAULTS_HOLD"] = f"{hold[0]} {hold[1]}"
        starter: Callable[..., Any] = start if world_size == 1 else start_launcher
        self.process = starter(command(run_dir, world_size, *words, module="tests.faults.victim"), **variables)

    def ranks(self, rank: str = "*") -> list[Path]:
        """Returns the notes of the training processes, oldest first. Each file name ends with rank and process id."""
        return sorted(self._notes.parent.glob(f"{self._notes.name}.{rank}.*"), key=lambda path: path.stat().st_ctime_ns)

    def lines(self) -> list[tuple[int, str, str, int]]:
        """Returns the notes of the newest process of rank 0."""
        text = self.ranks("0")[-1].read_text() if self.ranks("0") else ""
        parts = (line.split() for line in text.splitlines())
        return [(int(when), sign, phase, int(step)) for when, sign, phase, step in parts]

    def wait_for(self, phase: str, step: int) -> bool:
        """Waits until that phase starts after at least `step` updates.

        Returns:
            Whether it has started. False if the run was completed before: the last epochs need not bring a better
            accuracy, so the best weights may not be written again.

        Raises:
            AssertionError: the run ended with an error, or two minutes have passed.
        """
        deadline, problem = time.monotonic() + 120, f"{phase} at step {step} or later was not reached"
        read = -1
        while True:
            written = sum(path.stat().st_size for path in self.ranks("0"))
            begun = [(name, at) for _, sign, name, at in self.lines() if sign == "+"] if written != read else []
            if any(name == phase and at >= step for name, at in begun):
                return True
            if self.process.poll() == 0:
                return False
            if self.process.poll() is not None:
                raise AssertionError(f"{problem}; exit code {self.process.returncode}:\n{self.end()}")
            assert time.monotonic() < deadline, f"{problem} in two minutes"
            read = written
            time.sleep(0.001)

    def where(self, nanoseconds: int | None = None) -> Notes:
        """Returns the phase and step of rank 0 at a moment of the monotonic clock; None for now."""
        phases, last, held, writing = ["start"], 0, False, False
        for when, sign, phase, step in self.lines()[1:]:
            if nanoseconds is not None and when > nanoseconds:
                break
            last = step
            if phase == "held":
                held = True
            elif phase == "writing":
                writing = sign == "+"
            elif sign == "+":
                phases.append(phase)
            else:
                phases.pop()
        return Notes(phases or ["exit"], last, held, writing)

    def _note_durations(self) -> None:
        begun: dict[str, int] = {}
        for when, sign, phase, _ in self.lines():
            if sign == "+":
                begun[phase] = when
            elif phase in begun:
                DURATIONS[phase] = (when - begun[phase]) / 1e9
        if self.process.returncode == 0 and "exit" in begun:
            DURATIONS["exit"] = (time.monotonic_ns() - begun["exit"]) / 1e9

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: object) -> None:
        """Kills every process that is left."""
        if self.processes():
            self.kill()

    def processes(self) -> list[psutil.Process]:
        """Returns the processes of this run.

        The workers of torchrun have sessions of their own; they are found by their environment.
        """
        return [each for each in psutil.process_iter() if self._is_own(each)]

    def _is_own(self, process: psutil.Process) -> bool:
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if os.getsid(process.pid) == self.process.pid:
                return True
            return process.environ().get("FAULTS_NOTES") == str(self._notes)
        except (psutil.Error, OSError):
            return False

    def kill(self) -> None:
        """Kills every process. The workers come first: the launcher would otherwise signal the other workers."""
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self.process.pid)
            for each in [*reversed(launcher.children(recursive=True)), launcher]:
                _kill(each)
        while left := [each for each in self.processes() if each.pid != self.process.pid]:
            for each in left:  # started while the others were killed
                _kill(each)
            time.sleep(0.01)
        self.end()

    def end(self, seconds: float = 120) -> str:
        """Waits until every process has ended and returns what they printed.

        Raises:
            subprocess.TimeoutExpired: a process still runs after that number of seconds.
        """
        deadline = time.monotonic() + seconds
        output, _ = self.process.communicate(timeout=seconds)  # the workers write into the same pipe
        while self.processes():
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(self.process.args, seconds, output)
            time.sleep(0.01)
        self._note_durations()
        return output


def _kill(process: psutil.Process) -> None:
    with suppress(psutil.NoSuchProcess):
        process.kill()


# --- trials -------------------------------------------------------------------------------------------------------


def kills_of(seed: int, count: int = BLOWS_PER_RUN) -> list[tuple[Place, signal.Signals]]:
    """Returns `count` kills. Consecutive seeds take turns through all of `PLACES`."""
    return _ordered([(_turn(PLACES, seed, number), signal.SIGKILL) for number in range(count)])


def signals_of(seed: int, count: int = BLOWS_PER_RUN) -> list[tuple[Place, signal.Signals]]:
    """Returns `count` signals. Consecutive seeds take turns through every signal in every phase."""
    pairs = [(place, number) for number in SIGNALS for place in ANYWHERE]
    return _ordered([_turn(pairs, seed, number) for number in range(count)])


def _turn(values: Sequence[T], seed: int, number: int) -> T:
    return values[(seed * BLOWS_PER_RUN + number) % len(values)]


def _ordered(blows: list[tuple[Place, signal.Signals]]) -> list[tuple[Place, signal.Signals]]:
    """Returns the blows in the order in which a run reaches their places."""
    return sorted(blows, key=lambda blow: blow[0].only_at_the_end)


def steps_of(places: Sequence[Place], chance: random.Random) -> list[int]:
    """Returns an increasing step for each place. Between two of them the run saves a checkpoint."""
    room = STEPS / len(places)
    return [_step_of(place, room * number + chance.uniform(0, max(room - 7, 0))) for number, place in enumerate(places)]


def _step_of(place: Place, step: float) -> int:
    if place.phase == "start":
        return 0
    return STEPS if place.only_at_the_end else int(step)


def strike(run: Watched, place: Place, step: int, chance: random.Random) -> bool:
    """Waits until the run is where the blow hits it. Returns whether it came there."""
    if place.point:
        return run.wait_for("held", step)
    if not run.wait_for(place.phase, step):
        return False
    time.sleep(chance.uniform(0, DURATIONS[place.phase]))
    return run.process.poll() != 0


def blow_trial(
    home: Path,
    reference: dict[str, Any],
    seed: int,
    world_size: int,
    blows: Sequence[tuple[Place, signal.Signals]],
    words: Sequence[str] = (),
) -> Trial:
    """Kills or stops one run several times, resumes it each time with the same command, and lets it end.

    Args:
        home: gets the run folder.
        reference: the values of the undisturbed run.
        seed: seed of the moments.
        world_size: the number of processes.
        blows: where the run is hit, in the order in which it reaches these places, and the signal.
        words: overrides that leave the bytes as they are.
    """
    chance, run_dir, trial = random.Random(f"blows {seed}"), home / f"blows-{seed}", Trial()
    steps, newest = steps_of([place for place, _ in blows], chance), 0
    with survived(trial, run_dir, reference, world_size, words):
        for (place, number), step in zip(blows, steps, strict=True):
            with Watched(run_dir, world_size, (step, place.point) if place.point else None, *words) as run:
                if not strike(run, place, step, chance):
                    break  # the run ended before the blow: it does not count
                if number == signal.SIGKILL:
                    run.kill()
                    where = run.where()
                    struck = place if where.held else Place(where.phase)
                    trial.blows.append(Blow("SIGKILL", struck.phase, struck.how, f"{struck} (step {where.step})"))
                else:
                    ask_to_stop(run, number, chance, trial)
            newest = check_published(run_dir, reference, newest)
            if status_of(run_dir) == "done":
                break  # it was asked to stop when it had nothing left to do
    return trial


def ask_to_stop(run: Watched, number: signal.Signals, chance: random.Random, trial: Trial) -> None:
    """Sends a signal and waits until the run has ended.

    Raises:
        AssertionError: the run neither ended with exit code 0 or 75 and a STATUS that says so, nor in time.
    """
    target, whom = run.process.pid, ""
    if run.world_size > 1:
        whom = " to the launcher"
        # A launcher forwards a signal; a batch system may send it to one process.
        if run.ranks() and chance.random() < 0.5:
            path = chance.choice(run.ranks())
            target, whom = pid_of(path), f" to {rank_of(path)}"
    sent = time.monotonic_ns()
    with suppress(ProcessLookupError):  # it has just ended
        os.kill(target, number)
    output = run.end()
    seconds, where, code = (time.monotonic_ns() - sent) / 1e9, run.where(sent), run.process.returncode
    word = status_of(run.run_dir)
    detail = f"{number.name}{whom} in {where.phase} (step {where.step}): exit {code}, {word}, {seconds:.1f} s"
    trial.blows.append(Blow("a signal", where.phase, f"{number.name}{whom}: exit {code}, {word}", detail))
    saved = code == PREEMPTED and word == "preempted"
    not_begun = code == PREEMPTED and where.before_the_loop and word != "failed"  # STATUS is that of the attempt before
    # A launcher that is stopped while its processes exit does not know that they were done.
    at_its_end = word == "done" and code in ((0, PREEMPTED) if whom == " to the launcher" else (0,))
    assert saved or not_begun or at_its_end, f"{detail}:\n{output}"
    assert seconds < SECONDS_TO_STOP, detail


def status_of(run_dir: Path) -> str:
    status = RunFolder(run_dir).status
    return status.read_text().strip() if status.is_file() else "none"


def pid_of(notes: Path) -> int:
    return int(notes.suffix[1:])


def rank_of(notes: Path) -> str:
    return f"rank {notes.suffixes[-2][1:]}"


def damage_trial(home: Path, reference: dict[str, Any], seed: int, world_size: int, kinds: Sequence[str]) -> Trial:
    """Damages files of a killed run, resumes it with the same command, and lets it end."""
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
        assert not scene.harm.exists(), "code in a checkpoint was executed"
        for name in scene.named:
            assert name in output, f"{name} is not named:\n{output}"
            aside = list(scene.newest.parent.glob(f"damaged-{name}-*"))
            assert aside or not name.startswith("step-"), f"{name} was not renamed:\n{output}"
        number = scene.used.name.removeprefix("step-") if scene.used else ""
        resumed = f"resumed from the checkpoint at step {number}"
        assert (resumed in output) == bool(scene.used), f"the run did not resume from {scene.used}:\n{output}"
    return trial


KEEP_THREE = ("checkpoint.keep=3",)


def _stopped_run(home: Path, seed: int, world_size: int) -> Path:
    """Returns a killed run with three checkpoints. Four such runs serve all damages."""
    chance, run_dir = random.Random(f"stopped {seed % 4}"), home / f"stopped-{seed % 4}"
    if not run_dir.exists():
        run = Watched(run_dir, world_size, None, *KEEP_THREE)
        with run:
            assert strike(run, Place("step"), chance.randrange(STEPS // 2, STEPS - 2), chance)
            run.kill()
    return run_dir


def restart_trial(home: Path, reference: dict[str, Any], seed: int, world_size: int) -> Trial:
    """Kills one worker; torchrun must restart the group without any other action."""
    chance, run_dir, trial = random.Random(f"restart {seed}"), home / f"restart-{seed}", Trial()
    with survived(trial, run_dir, reference, world_size, finished=True):
        run = Watched(run_dir, world_size, None, "--max_restarts=1")
        with run:
            assert strike(run, Place("step"), chance.randrange(8, STEPS - 2), chance)
            path, where = chance.choice(run.ranks()), run.where()
            os.kill(pid_of(path), signal.SIGKILL)
            rank = rank_of(path)
            trial.blows.append(Blow("SIGKILL of one worker", where.phase, rank, f"{rank} (step {where.step})"))
            output = run.end(seconds=300)
            assert run.process.returncode == 0, f"torchrun ended with {run.process.returncode}:\n{output}"
            assert len(run.ranks("0")) == 2, f"the group was not restarted:\n{output}"
            assert "resumed from the checkpoint at step" in output, f"the run did not resume:\n{output}"
    return trial


@contextmanager
def survived(
    trial: Trial,
    run_dir: Path,
    reference: dict[str, Any],
    world_size: int,
    words: Sequence[str] = (),
    finished: bool = False,
) -> Iterator[None]:
    """Surrounds the blows: afterwards lets the run end and compares it; stores a problem in the trial.

    Args:
        trial: gets the problem.
        run_dir: the run folder.
        reference: the values of the undisturbed run.
        world_size: the number of processes.
        words: overrides of the run.
        finished: the blows include the end of the run.
    """
    try:
        yield
        if not finished and status_of(run_dir) != "done":
            finish(run_dir, world_size, *words)
        check_end(run_dir, reference)
    except (AssertionError, OSError, ValueError, subprocess.TimeoutExpired) as error:
        trial.problem = str(error) or repr(error)


def check_published(run_dir: Path, reference: dict[str, Any], newest: int) -> int:
    """Checks that the newest checkpoint is valid, not older than `newest`, and equal to the undisturbed run's.

    Returns:
        The checkpoint's step; 0 without a checkpoint.

    Raises:
        AssertionError: the check failed.
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
    """Checks that a run ended with the same bytes and left no file half written.

    Raises:
        AssertionError: the check failed.
    """
    wrong = differences(bytes_of(run_dir), reference)
    assert not wrong, f"{len(wrong)} values differ from the undisturbed run: {wrong[:3]}"
    left = [path.name for path in [*run_dir.glob("*.tmp"), *run_dir.glob("checkpoints/.*.staged")]]
    assert not left, f"left over: {left}"
