"""Command `doctor`: checks whether a machine or cluster is fit to train and prints one table, in under a minute.

Start it as `accelerate launch -m mnist_dist.doctor`, with another launcher, or without one. Each check measures on all
ranks (`Ranks.run`). The table names slow and faulty ranks.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("doctor")  # before the imports below load torch

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mnist_dist.distributed.devices import device_name, share_cores
from mnist_dist.distributed.launcher import end_process, launched_world
from mnist_dist.doctor.checks import (
    FAIL,
    OK,
    SLOW,
    WARN,
    Findings,
    Row,
    check_all_reduce,
    check_clocks,
    check_folder,
    check_gpus,
    check_limits,
    check_links,
    check_space,
    check_versions,
    check_wandb,
    check_world,
    format_ranks,
)
from mnist_dist.doctor.comparison import Times, compare, find_mismatch, read_report, times_of
from mnist_dist.doctor.ranks import ActionFailed, Ranks
from mnist_dist.doctor.reference import FILE, REFERENCES, train_alone, train_distributed
from mnist_dist.doctor.training import (
    check_training_alone,
    check_training_captured,
    check_training_distributed,
    check_training_other,
)
from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.run.text_output import table_console

STYLES = {SLOW: "yellow", WARN: "yellow", FAIL: "bold red"}

BETWEEN_RANKS = {"clocks", "peer to peer", "all-reduce"}
"""Checks that need at least two ranks."""

Check = Callable[[Ranks], Findings]


def list_checks(run_dir: Path, world_size: int | None = None) -> dict[str, Check]:
    """Returns all checks by their names in the table, in their order."""
    return {
        "world": partial(check_world, expected=world_size),
        "versions": check_versions,
        "clocks": check_clocks,
        "limits": check_limits,
        "free space": partial(check_space, run_dir=run_dir),
        "run folder": partial(check_folder, run_dir=run_dir),
        "peer to peer": check_links,
        "all-reduce": check_all_reduce,
        "W&B": check_wandb,
        "training, each rank alone": check_training_alone,
        "training, batch norm": partial(check_training_other, name="batch norm"),
        "training, bf16": partial(check_training_other, name="bf16"),
        "training, distributed": check_training_distributed,
        "training, captured": check_training_captured,
        "GPUs": check_gpus,  # after the training: an idle GPU is not throttled
    }


def examine(ranks: Ranks, checks: dict[str, Check]) -> list[Row]:
    """Runs checks. A check that fails on a rank becomes a row, and the next check runs.

    Collective: call on every rank.
    """
    rows = []
    for name, check in checks.items():
        if ranks.size == 1 and name in BETWEEN_RANKS:
            rows.append(Row(name, OK, "one process: nothing to measure", ""))
            continue
        try:
            rows += [Row(name, *finding) for finding in check(ranks)]
        except ActionFailed as failure:
            for message in dict.fromkeys(failure.errors.values()):
                failed = [rank for rank, error in failure.errors.items() if error == message]
                rows.append(Row(name, FAIL, message, format_ranks(failed)))
    return rows


def is_fit(rows: list[Row]) -> bool:
    """Returns whether no check failed."""
    return all(row.verdict != FAIL for row in rows)


# --- the report ---------------------------------------------------------------------------------------------------


def conclude(rows: list[Row]) -> str:
    """Returns one line: fit to train or not, with the checks and ranks that failed or have a warning."""

    def named(*verdicts: str) -> str:
        found: dict[str, list[str]] = {}
        for row in rows:
            if row.verdict in verdicts:
                found.setdefault(row.check, []).extend([row.ranks] if row.ranks else [])
        return ", ".join(f"{check} (ranks {'; '.join(ranks)})" if ranks else check for check, ranks in found.items())

    if failed := named(FAIL):
        return f"not fit to train: {failed}"
    warnings = named(WARN, SLOW)
    return f"fit to train; see {warnings}" if warnings else "fit to train"


def report(rows: list[Row], ranks: Ranks, seconds: float, path: Path | None) -> None:
    """Prints the table and the conclusion, and writes both as JSON to `path` if one is given.

    Args:
        seconds: duration of the examination.
    """
    table = Table("check", "verdict", "figure", "ranks", box=None)
    for column in table.columns:
        column.overflow = "fold"
    for previous, row in zip([None, *rows], rows, strict=False):
        check = "" if previous and previous.check == row.check else row.check
        table.add_row(check, Text(row.verdict, STYLES.get(row.verdict, "")), Text(row.figure), Text(row.ranks))
    console = table_console()
    console.print(table)
    console.print(f"{conclude(rows)} ({seconds:.0f} s)", markup=False, highlight=False, soft_wrap=True)
    if path:
        world = {"world_size": ranks.size, "device": device_name(ranks.device)}
        facts = {"fit": is_fit(rows), **world, "seconds": round(seconds, 1)}
        origin = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions()}
        content = facts | origin | {"checks": [asdict(row) for row in rows]}
        write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def write_reference(ranks: Ranks) -> None:
    """Writes the losses of this machine into the package as the reference for all machines."""
    origin = {
        "command": "python -m mnist_dist.doctor --write-reference",
        "date": datetime.now(timezone.utc).date().isoformat(),
        "device": device_name(ranks.device),
        "versions": versions(),
        "git_commit": git_commit(),
    }
    losses = {name: train_alone(ranks.device, name)["losses"] for name in REFERENCES}
    losses["lenet5"] = train_distributed(ranks.device)["losses"]  # the trainer's own update
    content = {"losses": losses, **origin}
    write_atomically(FILE, json.dumps(content, indent=2) + "\n")


# --- the command line ---------------------------------------------------------------------------------------------


def check_arguments(arguments: argparse.Namespace) -> None:
    """Checks the values of the options.

    Raises:
        RecipeError: with all problems found.
    """
    problems = []
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        message = f"the folder {arguments.json.absolute().parent} does not exist"
        problems.append(Problem("command line", "--json", message, "missing"))
    if arguments.world_size is not None and arguments.world_size < 1:
        message = f"expected at least 1 process, got {arguments.world_size}"
        problems.append(Problem("command line", "--world-size", message, "range"))
    if problems:
        raise RecipeError(problems)


def read_on_rank_0(ranks: Ranks, path: Path) -> Times:
    """Returns the times of an earlier report, which only the node of rank 0 needs to have.

    Collective: call on every rank.

    Raises:
        RecipeError: on every rank, if the report cannot be read or is of another world.
    """
    before = ranks.run(lambda: read_report(path) if ranks.rank == 0 else {})[0]
    if "problem" in before:
        raise RecipeError([Problem("command line", "--compare", before["problem"], before["kind"])])
    device = ranks.run(lambda: device_name(ranks.device))[0]
    if mismatch := find_mismatch(before, ranks.size, device):
        raise RecipeError([Problem("command line", "--compare", mismatch, "conflict")])
    return before["times"]


def main(argv: list[str] | None = None) -> int:
    """Runs the command.

    Returns:
        The exit code: 0 fit to train, 1 not fit or slower than before, 2 bad command line.
    """
    started = time.monotonic()
    arguments = parse("doctor", argv)
    check_arguments(arguments)
    state = launched_world()
    share_cores(state)
    ranks = Ranks(state)
    if arguments.write_reference:
        if ranks.size > 1:
            message = f"{ranks.size} processes are running; start this option in one process"
            raise RecipeError([Problem("command line", "--write-reference", message, "world")])
        write_reference(ranks)
        return 0
    before = read_on_rank_0(ranks, arguments.compare) if arguments.compare else None
    checks = list_checks(arguments.run_dir.absolute(), arguments.world_size)
    rows = examine(ranks, checks)
    if before is not None:

        def again(check: str) -> Times:
            return times_of(examine(ranks, {check: checks[check]}))

        rows += compare(before, times_of(rows), again, arguments.compare.name)

    def report_on_rank_0() -> None:
        if ranks.rank == 0:
            report(rows, ranks, time.monotonic() - started, arguments.json)

    try:
        ranks.run(report_on_rank_0)  # the other ranks wait: a launcher ends all processes once one has ended
    except ActionFailed as failure:
        if 0 in failure.errors:
            message = f"the report cannot be written: {failure.errors[0]}"
            raise RecipeError([Problem("command line", "--json", message, "unwritable")]) from failure
    return ranks.finish(0 if is_fit(rows) else 1)


if __name__ == "__main__":
    end_process(run_command(main))
