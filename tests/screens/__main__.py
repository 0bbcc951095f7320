"""Rewrites all screens: `python -m tests.screens`, or some of them: `python -m tests.screens NAME …`."""

from __future__ import annotations

import argparse

from tests.screens.render import FOLDER, path_of, render
from tests.screens.screens import SCREENS


def main(argv: list[str] | None = None) -> None:
    """Writes the screens that changed, and removes the files of screens that no longer exist."""
    parser = argparse.ArgumentParser("python -m tests.screens", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="default: all screens")
    for name in parser.parse_args(argv).names or SCREENS:
        text, path = render(name), path_of(name)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path}")
    for path in FOLDER.glob("*.txt"):
        if path.stem not in SCREENS:
            path.unlink()
            print(f"removed: {path}")


if __name__ == "__main__":
    main()
