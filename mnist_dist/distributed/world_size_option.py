"""The number of processes that a command expects, and whether the launcher restarts them. Does not import torch."""

from __future__ import annotations

import argparse
import os
import re


def parse_world_size(text: str) -> range:
    """Returns the accepted numbers of processes: `4` accepts 4, `1:4` accepts 1 to 4.

    Raises:
        ArgumentTypeError: the text has another form, or accepts no number.
    """
    found = re.fullmatch(r"(\d+)(?::(\d+))?", text)
    lowest, highest = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= lowest <= highest:
        raise argparse.ArgumentTypeError(f"expected N or MIN:MAX, at least 1, got {text!r}")
    return range(lowest, highest + 1)


def as_range(expected: int | range) -> range:
    """Returns the accepted numbers of processes for one number, or the range itself."""
    return range(expected, expected + 1) if isinstance(expected, int) else expected


def describe_world_size(expected: range) -> str:
    """Returns the accepted numbers as `--world-size` takes them: 4 or 1:4."""
    return str(expected[0]) if len(expected) == 1 else f"{expected[0]}:{expected[-1]}"


def is_elastic() -> bool:
    """Returns whether torchrun restarts the processes when one fails or a machine joins (`--max-restarts`)."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
