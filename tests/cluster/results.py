"""Collects the trials of the cluster tests and writes them as a table between two marks of a Markdown file."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mnist_dist.run.text_output import replace_between_marks
from tests.faults.__main__ import describe, to_markdown


class Results:
    """What happened to the jobs: (what was done, when, how the job reacted) -> number of times."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[str, str, str]] = Counter()

    def add(self, what: str, where: str, how: str) -> None:
        """Notes a trial that has passed: the table has no others, because a test that fails writes none."""
        self.counts[what, where, how] += 1

    def rows(self) -> list[tuple[str, str, str, str]]:
        """Returns the rows of the table, with the columns of the fault tables."""
        rows = []
        for what, where in dict.fromkeys((what, where) for what, where, _ in self.counts):
            kinds = {how: n for (*row, how), n in self.counts.items() if row == [what, where]}
            total = sum(kinds.values())
            rows.append((what, where, f"{total} / {total}", ", ".join(f"{n} {how}" for how, n in kinds.items())))
        return [*rows, ("all", "", f"{self.counts.total()} / {self.counts.total()}", "")]


@contextmanager
def written_as_table(
    request: pytest.FixtureRequest, command: str, size: int, marks: tuple[str, str]
) -> Iterator[Results]:
    """Yields the results; writes them to $MNIST_DIST_CLUSTER_TABLE at the end if every test of the session has passed.

    Args:
        request: of the fixture.
        command: the command that repeats the trials.
        size: the number of machines.
        marks: the lines before and after the table.
    """
    begun, found = time.monotonic(), Results()
    yield found
    file = os.environ.get("MNIST_DIST_CLUSTER_TABLE")
    if file and not request.session.testsfailed:
        about = describe(command, size, time.monotonic() - begun)
        replace_between_marks(Path(file), to_markdown(found.rows(), about), marks)
