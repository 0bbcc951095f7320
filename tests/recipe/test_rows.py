"""The comparison of the results' commits with the present code, `python -m tests.rows`."""

from __future__ import annotations

import pytest

from tests import rows


def test_the_table_has_a_line_per_commit_with_the_largest_difference():
    found = {("lenet5", "aaa"): 0.0, ("ms_ran", "bbb"): 2e-7, ("resnet18", "bbb"): 1e-6}
    lines = rows.to_markdown(found).splitlines()
    assert lines[2:] == ["| aaa | `lenet5` | none |", "| bbb | `ms_ran`, `resnet18` | 1e-06 |"]


def test_every_row_of_one_recipe_has_a_recipe_and_a_commit():
    assert ("lenet5", "dd4fd25") in rows.commits()
    assert not [recipe for recipe, commit in rows.commits() if " " in recipe or len(commit) != 7]


@pytest.mark.parametrize("changed", [{}, {(2, "train/loss"): 2.2}, {(20, "eval/loss"): 1.0}], ids=["", "step", "test"])
def test_a_loss_that_differs_is_found(changed, tmp_path, monkeypatch):
    losses = {(step, "train/loss"): 2.0 for step in range(1, rows.STEPS + 1)} | {(20, "eval/loss"): 2.0}
    monkeypatch.setattr(rows, "check_out", lambda commit, folder: folder / commit)
    monkeypatch.setattr(rows, "train", lambda code, *_: losses | (changed if code == rows.ROOT else {}))
    largest = max((abs(value - 2.0) / 2.0 for value in changed.values()), default=0.0)
    assert rows.compare("lenet5", "aaa", tmp_path) == pytest.approx(largest)


def test_runs_of_another_number_of_steps_are_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "check_out", lambda commit, folder: folder / commit)
    monkeypatch.setattr(rows, "train", lambda *_: {(1, "train/loss"): 2.0})
    with pytest.raises(RuntimeError, match="lenet5 at aaa"):
        rows.compare("lenet5", "aaa", tmp_path)


def test_the_rows_of_some_recipes_do_not_replace_the_whole_table(tmp_path, capsys):
    with pytest.raises(SystemExit):
        rows.main(["lenet5", "--markdown", str(tmp_path / "page.md")])
    assert "without the names of recipes" in capsys.readouterr().err
