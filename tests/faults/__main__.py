"""Disturbs many runs and prints how many survived: `python -m tests.faults --kills 200`."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mnist_dist.distributed.devices import processor
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.run.text_output import replace_between_marks
from tests.faults.damage import KINDS
from tests.faults.training import EVERY_STATE, bytes_of, finish, use_colour_folder
from tests.faults.trials import (
    BLOWS_PER_RUN,
    PHASES,
    Trial,
    blow_trial,
    damage_trial,
    kills_of,
    restart_trial,
    signals_of,
)

MARKS = ("<!-- faults: made by tests.faults -->", "<!-- end of faults -->")
COLUMNS = ("what", "where", "survived / tried", "of them")

# --- the command line ---------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line."""
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="SIGKILLs, five per run")
    parser.add_argument("--signals", type=int, default=0, metavar="N", help="signals that ask to stop, five per run")
    parser.add_argument("--damages", type=int, default=0, metavar="N", help="damaged checkpoints, one per run")
    restarts = "killed workers, one per run; requires --world-size 2"
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help=restarts)
    parser.add_argument("--world-size", type=int, choices=[1, 2], default=1)
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run; each run adds 1")
    colour = "train from a folder of colour pictures on disk, with mixed labels, instead of grey images in memory"
    parser.add_argument("--colour", action="store_true", help=colour)
    markdown = "write the table between the marks of this file (tests/README.md)"
    parser.add_argument("--markdown", type=Path, metavar="FILE", help=markdown)
    return parser


def parse() -> argparse.Namespace:
    """Parses and checks the command line."""
    parser = build_parser()
    parsed = parser.parse_args()
    if not (parsed.kills or parsed.signals or parsed.damages or parsed.restarts):
        parser.error("nothing to do; give at least one of --kills N, --signals N, --damages N, --restarts N")
    if parsed.restarts and parsed.world_size == 1:
        parser.error("--restarts requires --world-size 2: with one process torchrun has no group to restart")
    if parsed.markdown and not all(mark in parsed.markdown.read_text() for mark in MARKS):
        parser.error(f"{parsed.markdown} lacks the lines {MARKS[0]} and {MARKS[1]}, between which the table is written")
    return parsed


def main() -> int:
    """Runs the trials and prints the table; returns exit code 0 if every run survived, else 1."""
    arguments = parse()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `Watched.__exit__` kills the current run
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        trials, failures = run_trials(arguments, Path(folder))
    command = " ".join(["python -m tests.faults", *strip_markdown(sys.argv[1:])])
    rows, about = table_of(trials), describe(command, arguments.world_size, time.monotonic() - begun)
    show(rows, about)
    if arguments.markdown:
        replace_between_marks(arguments.markdown, to_markdown(rows, about), MARKS)
    for failure in failures:
        print(f"did not survive; repeat it with: python -m tests.faults {failure}")
    return 1 if failures else 0


def run_trials(arguments: argparse.Namespace, home: Path) -> tuple[list[Trial], list[str]]:
    """Makes an undisturbed run, then disturbs as many runs as the arguments ask for.

    Returns:
        All trials; and for each failed trial the arguments that repeat it.
    """
    colour = " --colour" if arguments.colour else ""
    trials, failures, begun = [], [], time.monotonic()
    if arguments.colour:
        use_colour_folder(home / "pictures")
    finish(home / "undisturbed", arguments.world_size, *EVERY_STATE)
    reference = bytes_of(home / "undisturbed")
    print(f"undisturbed run: {len(reference):,} values to compare with, {time.monotonic() - begun:.0f} s", flush=True)
    for option, per_run, make in (
        ("kills", BLOWS_PER_RUN, lambda seed, count: partial(blow_trial, blows=kills_of(seed, count))),
        (
            "signals",
            BLOWS_PER_RUN,
            # with pictures, which are most of the end of an ordinary run
            lambda seed, count: partial(blow_trial, blows=signals_of(seed, count), words=["tracking.plots=true"]),
        ),
        ("damages", 1, lambda seed, count: partial(damage_trial, kinds=[damage_of(seed)])),
        ("restarts", 1, lambda seed, count: restart_trial),
    ):
        wanted, done, seed = getattr(arguments, option), 0, arguments.seed
        (home / option).mkdir()
        while done < wanted:
            count, started = min(per_run, wanted - done), time.monotonic()
            trial: Trial = make(seed, count)(home / option, reference, seed, arguments.world_size)
            trials.append(trial)
            done += max(len(trial.blows), trial.problem is not None)
            seconds = time.monotonic() - started
            print(f"{option} {done}/{wanted}  seed {seed}  {seconds:.0f} s  {trial}", flush=True)
            if trial.problem:
                failures.append(f"--{option} {count} --seed {seed} --world-size {arguments.world_size}{colour}")
            seed += 1
    return trials, failures


def damage_of(seed: int) -> str:
    """Returns the kind of damage; consecutive seeds take turns through all kinds."""
    return list(KINDS)[seed % len(KINDS)]


def strip_markdown(words: list[str]) -> list[str]:
    """Returns the words of the command line without `--markdown FILE`."""
    if "--markdown" in words:
        index = words.index("--markdown")
        return words[:index] + words[index + 2 :]
    return words


# --- the table ----------------------------------------------------------------------------------------------------


def table_of(trials: list[Trial]) -> list[tuple[str, str, str, str]]:
    """Returns a row for each kind of blow in each phase, and a row of totals. No blow of a failed run survived."""
    tried: Counter[tuple[str, str]] = Counter()
    survived: Counter[tuple[str, str]] = Counter()
    how: dict[tuple[str, str], Counter[str]] = {}
    for trial in trials:
        for blow in trial.blows:
            row = (blow.what, blow.where)
            tried[row] += 1
            survived[row] += trial.problem is None
            how.setdefault(row, Counter())[blow.how] += 1
    whats = list(dict.fromkeys(what for what, _ in tried))
    rows = []
    for row in sorted(tried, key=lambda row: (whats.index(row[0]), row_order(row[1]))):
        kinds = ", ".join(f"{count} {kind}" for kind, count in how[row].most_common())
        rows.append((*row, f"{survived[row]} / {tried[row]}", kinds))
    return [*rows, ("all", "", f"{survived.total()} / {tried.total()}", "")]


def row_order(where: str) -> int:
    """Returns the position of a phase or a damaged thing in the table."""
    order = [*PHASES, *dict.fromkeys(kind.partition(": ")[0] for kind in KINDS)]
    return order.index(where)


def describe(command: str, world_size: int, seconds: float) -> str:
    """Returns the origin of the figures in one line: command, versions, commit, machine, duration."""
    installed = versions()
    commit, _, changed = (git_commit() or "unknown").partition("-")
    packages = ", ".join(f"{name} {installed[name]}" for name in ("python", "torch", "accelerate"))
    return (
        f"`{command}`: world size {world_size}, {packages}, commit {commit[:7]}{f', {changed}' * bool(changed)}, "
        f"{os.cpu_count()} cores of {processor()}, {platform.system()}, {seconds / 60:.0f} min"
    )


def to_markdown(rows: list[tuple[str, str, str, str]], about: str) -> str:
    lines = [COLUMNS, tuple("---" for _ in COLUMNS), *rows]
    return "\n".join(["| " + " | ".join(line) + " |" for line in lines] + ["", about])


def show(rows: list[tuple[str, str, str, str]], about: str) -> None:
    table = Table(*COLUMNS, box=None)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    console.print(table)
    console.print(about, highlight=False, markup=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
