"""The notebook runs from the first cell to the last and prints what it shows."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason='needs pip install -e ".[notebook]"')
pytest.importorskip("nbclient", reason='needs pip install -e ".[notebook]"')
pytest.importorskip("ipykernel", reason='needs pip install -e ".[notebook]"')
if find_spec("sklearn") is None:  # the import takes seconds, in every process of the tests
    pytest.skip("scikit-learn contains the digits", allow_module_level=True)

from tests.lessons.lesson import FOLDER, is_equal  # noqa: E402
from tests.lessons.notebook import NOTEBOOK, execute, pictures, printed  # noqa: E402


def test_the_notebook_prints_what_it_shows(tmp_path: Path) -> None:
    shown, found = nbformat.read(NOTEBOOK, as_version=4), execute(tmp_path)
    for before, now in zip(printed(shown, tmp_path), printed(found, tmp_path), strict=True):
        # Adam amplifies rounding, which differs between processors.
        assert is_equal(before, now, numbers_vary=True), "to accept: python -m tests.lessons.notebook; look at the diff"
    assert pictures(shown) == pictures(found) == 3
    assert any("losses are equal: True" in text for text in printed(found, tmp_path))


def test_the_links_of_the_notebook_lead_somewhere() -> None:
    text = "\n".join(cell.source for cell in nbformat.read(NOTEBOOK, as_version=4).cells)
    links = re.findall(r"\]\(([^)\s#]+)\)", text)
    assert links
    assert not [link for link in links if not (FOLDER / link).exists()]


def test_a_cell_that_raises_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 / 0")])
    nbformat.write(book, tmp_path / "book.ipynb")
    monkeypatch.setattr("tests.lessons.notebook.NOTEBOOK", tmp_path / "book.ipynb")
    with pytest.raises(Exception, match="ZeroDivisionError"):
        execute(tmp_path)
