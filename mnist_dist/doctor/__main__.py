"""Is this cluster fit to train? One table of checks, the slow or wrong ranks named, in under a minute.

`accelerate launch -m mnist_dist.doctor`, or under any other launcher, or none. A check is a question to all ranks
(`Ranks.ask`) and a judgement of their answers, which all of them make alike and rank 0 prints.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

from rich.table import Table
from rich.text import Text

from mnist_dist.cli import answer_early, parser_of, run_command
from mnist_dist.distributed.devices import choose_threads, device_name
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.doctor.checks import (
    FAIL,
    SLOW,
    WARN,
    Findings,
    Row,
    check_all_reduce,
    check_clocks,
    check_each_alone,
    check_folder,
    check_links,
    check_room,
    check_together,
    check_versions,
    check_wandb,
    check_world,
    name_ranks,
)
from mnist_dist.doctor.measurements import (
    REFERENCE,
    train_together,
)
from mnist_dist.doctor.ranks import Failed, Ranks
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.run.provenance import git_commit, versions
from mnist_dist.run.tables import table_console

if __name__ == "__main__":
    answer_early("doctor")  # before the imports below load torch


STYLES = {SLOW: "yellow", WARN: "yellow", FAIL: "bold red"}


def write_reference(ranks: Ranks) -> None:
    """Writes this machine's losses as those that all others are held against."""
    made = {
        "command": "python -m mnist_dist.doctor --write-reference",
        "date": datetime.now(timezone.utc).date().isoformat(),
    }
    code = {"device": device_name(ranks.device), "versions": versions(), "git_commit": git_commit()}
    facts = {"losses": train_together(ranks.device)["losses"], **made, **code}
    REFERENCE.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


# --- the table ----------------------------------------------------------------------------------------------------


def examine(ranks: Ranks, run_dir: Path, world_size: int | None = None) -> list[Row]:
    """All checks in their order; one that fails anywhere is a row, and the next one begins."""
    checks: dict[str, Callable[[Ranks], Findings]] = {
        "world": partial(check_world, expected=world_size),
        "versions": check_versions,
        "clocks": check_clocks,
        "free room": partial(check_room, run_dir=run_dir),
        "write and rename": partial(check_folder, run_dir=run_dir),
        "peer to peer": check_links,
        "all-reduce": check_all_reduce,
        "W&B": check_wandb,
        "training, each alone": check_each_alone,
        "training, together": check_together,
    }
    rows = []
    for name, check in checks.items():
        try:
            rows += [Row(name, *finding) for finding in check(ranks)]
        except Failed as failure:
            for what in dict.fromkeys(failure.errors.values()):
                guilty = [rank for rank, error in failure.errors.items() if error == what]
                rows.append(Row(name, FAIL, what, name_ranks(guilty)))
    return rows


def conclude(rows: list[Row]) -> str:
    """One line: fit or not, and what to look at."""

    def named(*verdicts: str) -> str:
        found: dict[str, list[str]] = {}
        for row in rows:
            if row.verdict in verdicts:
                found.setdefault(row.check, []).extend([row.ranks] if row.ranks else [])
        return ", ".join(f"{check} ({'; '.join(ranks)})" if ranks else check for check, ranks in found.items())

    if failed := named(FAIL):
        return f"not fit to train: {failed}"
    warnings = named(WARN, SLOW)
    return f"fit to train; look at {warnings}" if warnings else "fit to train"


def report(rows: list[Row], world_size: int, seconds: float, path: Path | None) -> None:
    """Prints the table, and writes it to the file that was asked for."""
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
        facts = {"fit": is_fit(rows), "world_size": world_size, "seconds": round(seconds, 1)}
        made = {"date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": versions()}
        content = facts | made | {"checks": [asdict(row) for row in rows]}
        path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def is_fit(rows: list[Row]) -> bool:
    return all(row.verdict != FAIL for row in rows)


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0 fit to train, 1 not fit, 2 bad command line."""
    started = time.monotonic()
    parser = parser_of("doctor")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.json and not arguments.json.absolute().parent.is_dir():
        parser.error(f"--json: there is no folder {arguments.json.absolute().parent}")
    if arguments.world_size is not None and arguments.world_size < 1:
        parser.error("--world-size is at least 1")
    state = launched_world()
    choose_threads(state)
    ranks = Ranks(state)
    if arguments.write_reference:
        if ranks.size > 1:
            parser.error("--write-reference is for one process")
        write_reference(ranks)
        return 0
    rows = examine(ranks, arguments.run_dir.absolute(), arguments.world_size)

    def on_main() -> None:
        if ranks.rank == 0:
            report(rows, ranks.size, time.monotonic() - started, arguments.json)

    try:
        ranks.ask(on_main)  # when one process ends, a launcher ends the others: all wait for the table
    except Failed as failure:
        if 0 in failure.errors:
            raise RecipeError([Problem("the report", "", failure.errors[0])]) from failure
    return ranks.leave(0 if is_fit(rows) else 1)


if __name__ == "__main__":
    sys.exit(run_command(main))
