"""`python -m tests.faults --kills 200`: survived / tried, by what was done and where."""

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
from mnist_dist.run.tables import replace_between_marks
from tests.faults.damage import KINDS
from tests.faults.training import EVERY_STATE, bytes_of, finish
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


def main() -> int:
    parser = argparse.ArgumentParser("python -m tests.faults", description=__doc__)
    parser.add_argument("--kills", type=int, default=0, metavar="N", help="SIGKILLs, five to a run")
    parser.add_argument("--signals", type=int, default=0, metavar="N", help="SIGTERM, SIGINT, SIGUSR1, five to a run")
    parser.add_argument("--damages", type=int, default=0, metavar="N", help="damaged checkpoints, one to a run")
    parser.add_argument("--restarts", type=int, default=0, metavar="N", help="killed workers; needs --world-size 2")
    parser.add_argument("--world-size", type=int, choices=[1, 2], default=1)
    parser.add_argument("--seed", type=int, default=0, help="of the first run; the next takes the next")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table between this file's marks")
    arguments = parser.parse_args()
    if not (arguments.kills or arguments.signals or arguments.damages or arguments.restarts):
        parser.error("say how many: --kills N, --signals N, --damages N")
    if arguments.restarts and arguments.world_size == 1:
        parser.error("--restarts needs --world-size 2: one process has no group")
    if arguments.markdown and not all(mark in arguments.markdown.read_text() for mark in MARKS):
        parser.error(f"{arguments.markdown} has no lines {MARKS[0]} and {MARKS[1]} to write between")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the run under way is ended on the way out
    trials, failures, begun = [], [], time.monotonic()
    with tempfile.TemporaryDirectory(prefix="faults-") as folder:
        home = Path(folder)
        finish(home / "undisturbed", arguments.world_size, *EVERY_STATE)
        reference = bytes_of(home / "undisturbed")
        print(
            f"undisturbed run: {len(reference):,} values to compare with, {time.monotonic() - begun:.0f} s", flush=True
        )
        for option, per_run, make in (
            ("kills", BLOWS_PER_RUN, lambda seed, count: partial(blow_trial, blows=kills_of(seed, count))),
            ("signals", BLOWS_PER_RUN, lambda seed, count: partial(blow_trial, blows=signals_of(seed, count))),
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
                    failures.append(f"--{option} {count} --seed {seed} --world-size {arguments.world_size}")
                seed += 1
    command = " ".join(["python -m tests.faults", *strip_markdown(sys.argv[1:])])
    rows, about = table_of(trials), describe(command, arguments.world_size, time.monotonic() - begun)
    show(rows, about)
    if arguments.markdown:
        replace_between_marks(arguments.markdown, to_markdown(rows, about), MARKS)
    for failure in failures:
        print(f"did not survive; once more: python -m tests.faults {failure}")
    return 1 if failures else 0


def damage_of(seed: int) -> str:
    return list(KINDS)[seed % len(KINDS)]


def strip_markdown(words: list[str]) -> list[str]:
    """The command without where the table goes."""
    if "--markdown" in words:
        place = words.index("--markdown")
        return words[:place] + words[place + 2 :]
    return words


# --- the table ----------------------------------------------------------------------------------------------------


def table_of(trials: list[Trial]) -> list[tuple[str, str, str, str]]:
    """A line for each thing done at each place, and a last one. A run that failed loses all its blows."""
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
    order = [*PHASES, *dict.fromkeys(kind.partition(": ")[0] for kind in KINDS)]
    return order.index(where)


def describe(command: str, world_size: int, seconds: float) -> str:
    """Where the figures are from, in one line."""
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
