"""Runs all lessons and rewrites their outputs: `python -m tests.lessons`, or of some: `python -m tests.lessons 3 5`."""

from __future__ import annotations

import argparse
import time

from tests.lessons.lesson import PAGES, rewrite, run


def main(argv: list[str] | None = None) -> None:
    """Runs the lessons with the real programs and writes the pages whose outputs have changed."""
    parser = argparse.ArgumentParser("python -m tests.lessons", description=__doc__)
    parser.add_argument("numbers", nargs="*", type=int, metavar="N", help="default: all lessons")
    parser.add_argument("--all", action="store_true", help="also rewrite outputs that differ only where they may")
    arguments = parser.parse_args(argv)
    for page in PAGES:
        if arguments.numbers and int(page.name[:2]) not in arguments.numbers:
            continue
        started, text = time.perf_counter(), page.read_text(encoding="utf-8")
        new = rewrite(text, run(page, real=True), keep=not arguments.all)
        page.write_text(new, encoding="utf-8")
        print(f"{page.name}: {'unchanged' if new == text else 'written'} ({time.perf_counter() - started:.0f} s)")


if __name__ == "__main__":
    main()
