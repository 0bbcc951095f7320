"""Text for people: consoles, Markdown tables, printable paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console


def table_console(**keywords: Any) -> Console:
    """Returns a rich console that never truncates a table. Without a terminal rich would assume 80 columns."""
    console = Console(**keywords)
    return console if console.is_terminal else Console(width=200, **keywords)


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """Returns rows of cells as a Markdown table. The first row holds the column headings."""
    heads, *lines = ([cell.replace("|", "\\|") for cell in row] for row in rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in (heads, ["---"] * len(heads), *lines))


def printable(path: Path) -> str:
    """Returns a path as text that any console can print. A file name on disk need not be valid text."""
    return str(path).encode(errors="replace").decode()
