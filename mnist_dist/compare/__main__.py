"""Run folders -> one table and one page: what was claimed, what was measured, over seeds.

`python -m mnist_dist.compare runs` prints the table and writes the page, curves and all; `--live` serves the page and
follows the runs that are still training. `--keep FILE` adds the runs' summaries to a file of JSON lines, which can
stand in for run folders in the table, and `--markdown FILE` writes the table between a Markdown file's marks.
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from mnist_dist.cli import answer_early, parser_of, run_command
from mnist_dist.compare.live import LiveServer
from mnist_dist.compare.page import Page, PageRun, embedded, render
from mnist_dist.compare.table import (
    Measured,
    Row,
    group,
    in_order,
    labels,
    note_in_recipes,
    plain,
    print_table,
    replace_between_marks,
    to_markdown,
)
from mnist_dist.engine.files import write_text
from mnist_dist.errors import Problem, RecipeError
from mnist_dist.run.reader import RunReader, find_runs, is_summary

if __name__ == "__main__":
    answer_early("compare")  # before the imports below load torch


# --- the page -----------------------------------------------------------------------------------------------------


class Comparison:
    """Run folders, folders that hold some, and files of kept summaries, to be read as often as one likes.

    Args:
        may_wait: a folder need not hold a run yet.

    Raises:
        RecipeError: a path is none of these.
    """

    def __init__(self, paths: list[Path], *, may_wait: bool = False):
        self._kept = [kept for path in paths if path.is_file() for kept in _read_kept(path)]
        self._folders = [path for path in paths if not path.is_file()]
        self._readers: dict[Path, RunReader] = {}
        for path in self._folders:
            if not path.is_dir():
                raise RecipeError([Problem(str(path), "", "there is no such file or folder")])
            if not may_wait and not any(find_runs(path)):
                what = "not a run folder, and no folder in it is one: what makes one is its recipe.yaml"
                raise RecipeError([Problem(str(path), "", what)])

    def read(self) -> list[Measured]:
        """All runs as they are now, with those that have come into a folder of runs since."""
        paths = dict.fromkeys(path for folder in self._folders for path in find_runs(folder))
        for path in paths:
            if path in self._readers:
                self._readers[path].refresh()
            else:
                self._readers[path] = RunReader(path)
        return [*self._kept, *(Measured(self._readers[path].summary, self._readers[path]) for path in paths)]

    def page_values(self, page: Page) -> dict[str, Any]:
        """The page's values as the runs are now."""
        measured = self.read()
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
            )
            for row in single
            if (run := row.runs[0].run)
        ]
        return page.data(runs, tables={"groups": plain(group(measured)), "single": plain(single)})


def _read_kept(path: Path) -> list[Measured]:
    found = []
    try:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            values = json.loads(line)
            if not is_summary(values):
                raise ValueError(f"line {number} is not the summary of a run")
            found.append(Measured(values))
    except (OSError, ValueError) as error:
        what = f"not a file of kept summaries: {error}\ngive run folders, or a file that --keep has written"
        raise RecipeError([Problem(str(path), "", what)]) from error
    return found


# --- the command line ---------------------------------------------------------------------------------------------


def follow(comparison: Comparison, port: int) -> None:
    """Serves the page until Ctrl-C.

    Raises:
        RecipeError: the port cannot be had.
    """
    try:
        server = LiveServer(port, comparison.page_values)
    except (OSError, OverflowError) as error:
        what = f"cannot serve on port {port}: {getattr(error, 'strerror', None) or error}; give another, or 0 for any"
        raise RecipeError([Problem("command line", "--port", what)]) from error
    with server, suppress(KeyboardInterrupt):
        print(f"{server.url} follows these runs; Ctrl-C ends it", flush=True)
        server.serve_forever()


def main(argv: list[str] | None = None) -> int:
    """The door: exit code 0, or 2 for what is no run, a file that cannot be written, or a port that is taken."""
    parser = parser_of("compare")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.html and arguments.html.is_dir():
        parser.error(f"--html names a file, and {arguments.html} is a folder")
    comparison = Comparison(arguments.runs, may_wait=arguments.live)
    measured = comparison.read()
    print_table(group(measured))
    finished = [each for each in measured if each.is_finished]
    if not finished and (arguments.keep or arguments.markdown or arguments.recipes):
        raise RecipeError([Problem("command line", "", "none of these runs has finished: there is nothing to write")])
    try:
        if arguments.keep:
            with arguments.keep.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(each.summary) + "\n" for each in finished)
        if arguments.markdown:
            replace_between_marks(arguments.markdown, to_markdown(group(finished)))
        if arguments.recipes:
            note_in_recipes(group(finished))
        if arguments.live:
            follow(comparison, arguments.port)
        elif arguments.html or (not arguments.no_html and any(each.run for each in measured)):
            path = arguments.html or Path("compare.html")
            write_text(path, render(comparison.page_values(Page(embedded))))
            print(f"{path}: the table with curves and pictures, for any browser")
    except (OSError, UnicodeError) as error:
        where, why = getattr(error, "filename", None), getattr(error, "strerror", None)
        raise RecipeError([Problem(str(where or "the file"), "", f"cannot be written: {why or error}")]) from error
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
