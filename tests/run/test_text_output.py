"""Tables in Markdown files."""

from __future__ import annotations

from mnist_dist.run.text_output import markdown_table, replace_between_marks

MARKS = ("<!-- figures -->", "<!-- end of figures -->")


def test_a_bar_in_a_cell_does_not_end_the_cell():
    assert markdown_table([["a", "b"], ["1|2", "3"]]) == "| a | b |\n| --- | --- |\n| 1\\|2 | 3 |"


def test_text_between_marks_is_replaced_in_every_block(tmp_path):
    path = tmp_path / "page.md"
    path.write_text(f"one\n{MARKS[0]}\nold\n{MARKS[1]}\ntwo\n{MARKS[0]}{MARKS[1]}\nthree\n")
    for _ in range(2):
        replace_between_marks(path, r"new \1", MARKS)
        block = f"{MARKS[0]}\nnew \\1\n{MARKS[1]}\n"
        assert path.read_text() == f"one\n{block}two\n{block}three\n"


def test_a_new_file_holds_the_marks_and_the_text(tmp_path):
    replace_between_marks(tmp_path / "new.md", "text", MARKS)
    assert (tmp_path / "new.md").read_text() == f"{MARKS[0]}\ntext\n{MARKS[1]}\n"


def test_a_file_without_a_pair_of_marks_is_not_changed(tmp_path, refused):
    path = tmp_path / "page.md"
    for content in ("no marks\n", f"{MARKS[0]}\n", f"{MARKS[1]}\n{MARKS[0]}\n"):
        path.write_text(content)
        assert refused(lambda: replace_between_marks(path, "text", MARKS)) == [("--markdown", "missing")]
        assert path.read_text() == content
