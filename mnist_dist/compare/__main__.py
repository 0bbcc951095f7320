"""Prints a table of runs with claimed and measured accuracy over seeds, and writes one HTML page with their curves.

`mnist-dist compare runs` does both; `--live` serves the page and follows runs that are still training. `--keep FILE`
appends the runs' summaries to a file of JSON lines, which can replace run folders as an argument. `--markdown FILE`
rewrites every marked table of a Markdown file.
"""

from __future__ import annotations

from mnist_dist.cli import answer_early, parse, run_command

if __name__ == "__main__":
    answer_early("compare")  # before the imports below load torch

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from mnist_dist.compare.live import LiveServer
from mnist_dist.compare.page import Page, PageRun, embedded, render
from mnist_dist.compare.table import (
    Measured,
    Row,
    group,
    in_order,
    labels,
    note_in_recipes,
    page_rows,
    print_table,
    write_tables,
)
from mnist_dist.compare.watch import watch, watched
from mnist_dist.engine.files import read_regular, write_atomically
from mnist_dist.errors import Kind, Problem, RecipeError
from mnist_dist.run.folder import is_summary
from mnist_dist.run.reader import RunReader, find_runs

MOST_KEPT = 2**28
"""Bytes of the largest file of kept summaries that is read."""

# --- the runs -----------------------------------------------------------------------------------------------------


class Comparison:
    """The runs of the command line: run folders, folders of run folders, and files of kept summaries.

    Args:
        may_wait: a folder may be empty; its first run can appear later.

    Raises:
        RecipeError: a path has another content.
    """

    def __init__(self, paths: list[Path], *, may_wait: bool = False):
        self._kept = [kept for path in paths if path.is_file() for kept in _read_kept(path)]
        self._folders = [path for path in paths if not path.is_file()]
        self._readers: dict[Path, RunReader] = {}
        for path in self._folders:
            if not path.is_dir():
                raise _problem(str(path), "no such file or folder", "missing")
            if not may_wait and not any(find_runs(path)):
                message = "neither this folder nor a folder in it is a run folder: a run folder has a recipe.yaml"
                raise _problem(str(path), message, "missing")

    def read(self) -> list[Measured]:
        """Reads all runs again and returns them, with the runs that have been added to a folder."""
        paths = dict.fromkeys(path for folder in self._folders for path in find_runs(folder))
        for path in paths:
            if path in self._readers:
                self._readers[path].refresh()
            else:
                self._readers[path] = RunReader(path)
        return [*self._kept, *(Measured(self._readers[path].summary, self._readers[path]) for path in paths)]

    def page_values(self, page: Page, *, live: bool = False) -> dict[str, Any]:
        """Reads all runs again and returns the values of the page. A live page shows some of the runs in detail."""
        measured = self.read()
        shown = watched([each.run for each in measured if each.run]) if live else []
        label = labels(measured)
        single = in_order([Row([each], label(each)) for each in measured])
        runs = [
            PageRun(
                name=run.name,
                label=row.label,
                family=run.key,
                recipe=run.result_keys,
                seed=run.summary["seed"],
                status=run.status,
                accuracy=run.summary["eval.last.accuracy"] if run.is_finished else None,
                lines=run.lines,
                changes=run.changes,
                plots=run.folder.plots,
                world=run.world,
                watch=watch(run) if run in shown else None,
            )
            for row in single
            if (run := row.runs[0].run)
        ]
        return page.data(runs, tables={"groups": page_rows(group(measured)), "single": page_rows(single)})


def _read_kept(path: Path) -> list[Measured]:
    found = []
    try:
        for number, line in enumerate(read_regular(path, MOST_KEPT).decode().splitlines(), 1):
            values = json.loads(line)
            if not is_summary(values):
                raise ValueError(f"line {number} is not the summary of a run")
            found.append(Measured(values))
    except (OSError, ValueError, RecursionError) as error:
        message = f"not a file of kept summaries: {error}\ngive run folders, or a file written by --keep"
        raise _problem(str(path), message, "damaged") from error
    return found


def _problem(key: str, message: str, kind: Kind) -> RecipeError:
    return RecipeError([Problem("command line", key, message, kind)])


# --- the command line ---------------------------------------------------------------------------------------------


def follow(comparison: Comparison, port: int) -> None:
    """Serves the live page until Ctrl-C.

    Raises:
        RecipeError: the port cannot be used.
    """
    try:
        server = LiveServer(port, partial(comparison.page_values, live=True))
    except OverflowError as error:
        raise _problem("--port", f"port {port} is not between 0 and 65535", "range") from error
    except OSError as error:
        message = f"cannot serve on port {port}: {error.strerror or error}; give another port, or 0 for any free one"
        raise _problem("--port", message, "conflict") from error
    with server, suppress(KeyboardInterrupt):
        print(f"live page of these runs: {server.url} (Ctrl-C stops the server)", flush=True)
        server.serve_forever()


@contextmanager
def _writing(option: str, path: Path | None = None) -> Iterator[None]:
    """Turns a failed write into a problem of the option that names the file."""
    try:
        yield
    except (OSError, UnicodeError) as error:
        name, reason = getattr(error, "filename", None) or path, getattr(error, "strerror", None) or error
        raise _problem(option, f"{name or 'the file'} cannot be written: {reason}", "unwritable") from error


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns exit code 0.

    Raises:
        RecipeError: a path holds no run, a file cannot be written, or the port cannot be used.
    """
    arguments = parse("compare", argv)
    if arguments.html and arguments.html.is_dir():
        raise _problem("--html", f"{arguments.html} is a folder; name a file", "unwritable")
    comparison = Comparison(arguments.runs, may_wait=arguments.live)
    measured = comparison.read()
    print_table(group(measured))
    finished = [each for each in measured if each.is_finished]
    for option in ("keep", "markdown", "recipes"):
        if getattr(arguments, option) and not finished:
            raise _problem(f"--{option}", "nothing to write: none of these runs has finished", "missing")
    if arguments.keep:
        with _writing("--keep", arguments.keep), arguments.keep.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(each.summary) + "\n" for each in finished)
    if arguments.markdown:
        with _writing("--markdown", arguments.markdown):
            write_tables(arguments.markdown, group(finished))
    if arguments.recipes:
        with _writing("--recipes"):
            note_in_recipes(group(finished))
    if arguments.live:
        follow(comparison, arguments.port)
    elif arguments.html or (not arguments.no_html and any(each.run for each in measured)):
        path = arguments.html or Path("compare.html")
        with _writing("--html", path):
            write_atomically(path, render(comparison.page_values(Page(embedded))))
        print(f"{path}: the table with curves and pictures; open it in a browser")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
