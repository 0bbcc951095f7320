"""Commands print exactly the files of this folder. `python -m tests.screens` rewrites the files."""

from __future__ import annotations

import re

import pytest

from tests.screens.render import FOLDER, path_of, render
from tests.screens.screens import SCREENS

LINES, COLUMNS = 24, 120


@pytest.mark.parametrize("name", SCREENS)
def test_screen(name):
    assert render(name) == path_of(name).read_text(encoding="utf-8"), "to accept: python -m tests.screens"


def test_every_file_belongs_to_a_screen():
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(SCREENS)


@pytest.mark.parametrize("name", SCREENS)
def test_an_error_fits_on_one_screen(name):
    text = path_of(name).read_text(encoding="utf-8")
    assert "Traceback" not in text
    *lines, last = text.splitlines()
    if re.fullmatch(r"exit code: \d+", last):
        assert sum(1 + len(line) // COLUMNS for line in lines[1:]) <= LINES
