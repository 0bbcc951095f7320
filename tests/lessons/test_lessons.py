"""Every lesson runs and prints what its page shows. `python -m tests.lessons` rewrites the outputs."""

from __future__ import annotations

import re

import pytest

from tests.lessons.lesson import BLOCK, FOLDER, PAGES, REAL, differences, is_equal, masked, rewrite, run

TEXTS = {page: page.read_text(encoding="utf-8") for page in PAGES}
PARAMETERS = [pytest.param(page, marks=pytest.mark.launch if REAL in text else ()) for page, text in TEXTS.items()]


@pytest.mark.parametrize("page", PARAMETERS, ids=lambda page: page.stem)
def test_a_lesson_prints_what_its_page_shows(page):
    changed = differences(TEXTS[page], run(page, real=REAL in TEXTS[page]))
    assert not changed, "to accept: python -m tests.lessons; look at the diff before you commit"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_lesson_has_its_parts(page):
    text = TEXTS[page]
    lines = text.splitlines()
    assert len(lines) <= 80
    assert re.fullmatch(r"# Lesson \d+: .+\?", lines[0]) and int(lines[0].split()[2][:-1]) == int(page.name[:2])
    assert text.index("```bash") < text.index("## Change and try") < text.index("## In the code")
    assert "../../mnist_dist/" in text.partition("## In the code")[2]
    assert any(block["output"] for block in BLOCK.finditer(text))
    assert f"]({page.name})" in (FOLDER / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_functions_and_classes_that_a_lesson_names_exist(page):
    code = TEXTS[page].partition("## In the code")[2]
    sources = [(FOLDER / link).read_text(encoding="utf-8") for link in re.findall(r"\]\(([^)\s#]+\.py)\)", code)]
    for name in re.findall(r"`([\w.]+)`", code):
        assert any(all(re.search(rf"\b{part}\b", text) for part in name.split(".")) for text in sources), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_lesson_quotes_its_scripts(page):
    """The lines of a Python block are lines of one script or module that the page names, in this order."""
    named = [FOLDER / link for link in re.findall(r"\]\(([^)\s#]+\.py)\)", TEXTS[page])]
    sources = [[line.strip() for line in path.read_text(encoding="utf-8").splitlines()] for path in named]
    for quoted in re.findall(r"^```python\n(.*?)^```", TEXTS[page], flags=re.DOTALL | re.MULTILINE):
        wanted = [line.strip() for line in quoted.splitlines() if line.strip() not in ("", "...")]
        assert any(is_subsequence(wanted, source) for source in sources), quoted


def is_subsequence(wanted: list[str], source: list[str]) -> bool:
    rest = iter(source)
    return all(line in rest for line in wanted)


# --- the comparison -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shown", "printed", "equal"),
    [
        ("loss 2.3026", "loss 2.3027", True),
        ("loss 2.3026", "loss 2.3926", False),
        ("difference: 1.2e-07", "difference: 0.0e+00", True),
        ("difference: 3.1e-02", "difference: 3.2e-02", True),
        ("difference: 3.1e-02", "difference: 3.3e-02", False),
        ("step  10", "step 10", True),
        ("step 10", "step 11", False),
        ("exit code 0", "exit code 1", False),
        ("61,706 parameters", "61,707 parameters", False),
        ("the same", "not the same", False),
        ("one line", "one line\nanother line", False),
        ("rank0.json", "rank1.json", False),
    ],
)
def test_words_and_counts_must_be_equal_and_other_numbers_close(shown, printed, equal):
    assert is_equal(shown, printed) is equal


def test_numbers_that_vary_are_not_compared_but_words_are():
    assert is_equal("waiting 31.0 %", "waiting 7.9 %", numbers_vary=True)
    assert not is_equal("waiting 31.0 %", "logging 31.0 %", numbers_vary=True)


def test_what_differs_between_runs_is_masked(tmp_path):
    text = f"done in 1.5 s, 2,314 images/s\nfolder {tmp_path}/runs/a, 2026-01-31 12:30:59 by pid 4711  \nstep 5\n"
    assert masked(text, tmp_path) == "done in … s, … images/s\nfolder runs/a, … by pid …\nstep 5\n"


PAGE = "# A\n\n```bash\necho 1\n```\n\n<!-- numbers vary -->\n```bash\ndate\n```\n\n```text\nnow 7\n```\n\nEnd.\n"


def test_outputs_are_written_behind_their_blocks():
    changed = rewrite(PAGE, ["1\n", "now 8\n"])
    assert changed == PAGE.replace("echo 1\n```\n", "echo 1\n```\n\n```text\n1\n```\n")
    assert differences(changed, ["1\n", "now 9\n"]) == []
    assert differences(changed, ["2\n", "then 7\n"]) == [("1\n", "2\n"), ("now 7\n", "then 7\n")]
    assert rewrite(changed, ["", "now 9\n"]) == PAGE
    assert rewrite(PAGE, ["", "now 9\n"], keep=False) == PAGE.replace("now 7", "now 9")


def test_a_block_that_fails_is_an_error(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```bash\necho before\nfalse\n```\n")
    with pytest.raises(AssertionError, match="before"):
        run(page, real=True)
