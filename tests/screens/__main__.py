"""Rewrites all screens: `python -m tests.screens`, or some of them: `python -m tests.screens NAME …`."""

from __future__ import annotations

import sys

from tests.screens.render import FOLDER, path_of, render
from tests.screens.screens import SCREENS

if __name__ == "__main__":
    names = sys.argv[1:] or list(SCREENS)
    for name in names:
        text, path = render(name), path_of(name)
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")
            print(f"written: {path}")
    for path in FOLDER.glob("*.txt"):
        if path.stem not in SCREENS:
            path.unlink()
            print(f"removed: {path}")
