"""Run folders become one table; the same summaries give the same table."""

from __future__ import annotations

import json

import pytest

from mnist_dist import compare
from mnist_dist.command_line import run_door


def summary(recipe="model_v3_onecycle", seed=0, last=99.5, best=99.6, epochs=15.0, **more):
    return {
        **{"recipe": recipe, "parameters": 8650, "seed": seed, "world_size": 1, "device": "cpu (2 threads)"},
        **{"mixed_precision": "no", "epochs": epochs, "train_seconds": 100.0, "train.last.accuracy": 98.0},
        **{"eval.last.accuracy": last, "eval.best.accuracy": best, **more},
    }


def cell(row: compare.Row, column: str) -> str:
    return row.cells()[compare.COLUMNS.index(column)]


def test_seeds_are_one_row_with_mean_and_deviation():
    [row] = compare.group([summary(seed=0, last=99.4), summary(seed=1, last=99.6)])
    assert cell(row, "last epoch") == "99.50 ± 0.14"
    assert cell(row, "n") == "2"
    assert cell(row, "parameters") == "8,650"


def test_other_precision_device_or_length_are_other_rows():
    others = [summary(), summary(mixed_precision="bf16"), summary(device="H200"), summary(epochs=1.0)]
    assert len(compare.group(others)) == 4


def test_a_seed_that_ran_twice_counts_once():
    [row] = compare.group([summary(last=99.0), summary(last=99.4)])
    assert (cell(row, "n"), cell(row, "last epoch")) == ("1", "99.40")


@pytest.mark.parametrize(
    ("values", "verdict"),
    [
        ({"last": 99.43}, "met"),
        ({"last": 99.42, "best": 99.43}, "met at the best epoch"),
        ({"last": 99.40, "best": 99.42}, "not met"),
        ({"last": 99.90, "epochs": 3.0}, "3 of 15 epochs"),
        ({"recipe": "mnistnet", "epochs": 1.0, "last": 97.0}, "met: 98.00 over the epoch's training batches"),
        ({"recipe": "not_shipped"}, ""),
    ],
)
def test_a_verdict_holds_the_claim_against_both_figures(values, verdict):
    [row] = compare.group([summary(**values)])
    assert cell(row, "verdict") == verdict


def test_the_table_is_written_between_the_marks_and_nowhere_else(tmp_path, capsys):
    kept, page = tmp_path / "kept.jsonl", tmp_path / "page.md"
    kept.write_text(json.dumps(summary()) + "\n")
    page.write_text(f"before\n{compare.MARKS[0]}\nold\n{compare.MARKS[1]}\nafter\n")
    assert compare.main([str(kept), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{compare.MARKS[0]}\n| recipe |") and text.endswith(f"{compare.MARKS[1]}\nafter\n")
    assert "old" not in text and "99.50" in text and "99.50" in capsys.readouterr().out


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert run_door(lambda: compare.main([str(tmp_path)])) == 2
    assert "not a run folder" in capsys.readouterr().err
