"""Formats text for people: rich consoles, Markdown tables, printable paths."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from mnist_dist.engine.files import write_atomically
from mnist_dist.errors import CONTROLS, Problem, RecipeError

LONGEST = 4_096
"""A longer text is cut after this many characters."""


def table_console(**keywords: Any) -> Console:
    """Returns a rich console that never truncates a table. Without a terminal rich would assume 80 columns."""
    keywords = {"markup": False, **keywords}  # "[red]" may be the name of a class
    console = Console(**keywords)
    return console if console.is_terminal else Console(width=200, **keywords)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as a Markdown table. The first row holds the column headings."""
    heads, *lines = ([re.sub(r"(?<!\\)\|", r"\|", cell) for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def markdown_text(text: str) -> str:
    """Escapes untrusted text for a cell of a Markdown table, so that it is read neither as HTML nor as Markdown."""
    text = re.sub(r"&(?=[#\w])", "&amp;", printable(text))
    text = re.sub(r"<(?=[A-Za-z/!?])", "&lt;", text)  # "< 1 ms" does not start a tag
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)


def printable(value: Any) -> str:
    """Returns a value, e.g. a path, as one line of text that any console can print.

    A file name need not be valid text, and untrusted text may hold codes that control the terminal.
    """
    text = str(value).encode(errors="replace").decode()
    return CONTROLS.sub("�", text[:LONGEST])


def replace_between_marks(path: Path, text: str, marks: tuple[str, str]) -> None:
    """Writes `text` between each pair of marks in a Markdown file and keeps the rest. Creates a missing file.

    Raises:
        RecipeError: the file has no such pair of marks; nothing was written.
    """
    content = path.read_text(encoding="utf-8") if path.exists() else "\n".join(marks) + "\n"
    write_atomically(path, fill_between_marks(content, lambda _: text, path, marks))


def fill_between_marks(
    content: str,
    text: Callable[[re.Match[str]], str],
    path: Path,
    marks: tuple[str, str],
    first: re.Pattern[str] | None = None,
) -> str:
    """Returns `content` with new text between each pair of marks.

    Args:
        content: the text of a Markdown file.
        text: called with the match of each first mark; returns the new text between that mark and its second mark.
        path: the file, for the message.
        marks: the first and the second mark.
        first: the pattern of the first mark, if the mark has several forms.

    Raises:
        RecipeError: there is no pair of marks, or a first mark lacks its second mark.
    """
    starts = list((first or re.compile(re.escape(marks[0]))).finditer(content))
    limits = [start.start() for start in starts[1:]] + [len(content)]
    pieces, end = [], 0
    for start, limit in zip(starts, limits, strict=False):
        found = content.find(marks[1], start.end(), limit)
        if found < 0:
            break
        pieces += [content[end : start.end()], f"\n{text(start)}\n"]
        end = found
    else:
        if starts:
            return "".join([*pieces, content[end:]])
    message = f"{path} lacks the two lines between which the table is written: {marks[0]} and {marks[1]}"
    raise RecipeError([Problem("command line", "--markdown", message, "missing")])


def listed(names: Sequence[str], most: int = 8) -> str:
    """Returns the first names as printable text, and how many more there are."""
    return ", ".join(map(printable, names[:most])) + (f" and {len(names) - most} more" if names[most:] else "")
