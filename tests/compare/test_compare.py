"""Run folders become one table; the same summaries give the same table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from mnist_dist.cli import run_command
from mnist_dist.compare import __main__ as compare
from mnist_dist.run.reader import RunReader
from mnist_dist.tracking import JSONLReader


def summary(recipe="model_v3_onecycle", seed=0, last=99.5, best=99.6, epochs=15.0, **more):
    return {
        **{"recipe": recipe, "parameters": 8650, "seed": seed, "world_size": 1, "device": "cpu (2 threads)"},
        **{"mixed_precision": "no", "epochs": epochs, "train_seconds": 100.0, "train.last.accuracy": 98.0},
        **{"eval.last.accuracy": last, "eval.best.accuracy": best, **more},
    }


def rows_of(summaries: list[dict]) -> list[compare.Row]:
    return compare.group([compare.Measured(each) for each in summaries])


def cell(row: compare.Row, column: str) -> str:
    return row.cells()[column][0]


def test_seeds_are_one_row_with_mean_and_deviation():
    [row] = rows_of([summary(seed=0, last=99.4), summary(seed=1, last=99.6)])
    assert cell(row, "last epoch") == "99.50 ± 0.14"
    assert cell(row, "n") == "2"
    assert cell(row, "parameters") == "8,650"


def test_other_precision_device_or_length_are_other_rows():
    others = [summary(), summary(mixed_precision="bf16"), summary(device="H200"), summary(epochs=1.0)]
    assert len(rows_of(others)) == 4


def test_a_row_says_which_commits_its_runs_are_of():
    commits = ["dd4fd25a33", "dd4fd25a33", "c1c367aa11-dirty", None]
    [row] = rows_of([summary(seed=seed, git_commit=commit) for seed, commit in enumerate(commits)])
    assert cell(row, "commit") == "dd4fd25, c1c367a-dirty"


def test_a_seed_that_ran_twice_counts_once():
    [row] = rows_of([summary(last=99.0), summary(last=99.4)])
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
    [row] = rows_of([summary(**values)])
    assert cell(row, "verdict") == verdict


def test_the_table_is_written_between_the_marks_and_nowhere_else(tmp_path, capsys):
    kept, page = tmp_path / "kept.jsonl", tmp_path / "page.md"
    kept.write_text(json.dumps(summary()) + "\n")
    page.write_text(f"before\n{compare.MARKS[0]}\nold\n{compare.MARKS[1]}\nafter\n")
    assert compare.main([str(kept), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{compare.MARKS[0]}\n| recipe |") and text.endswith(f"{compare.MARKS[1]}\nafter\n")
    assert "old" not in text and "99.50" in text and "99.50" in capsys.readouterr().out


def lines(count: int, start: int = 0) -> str:
    """Lines of metrics.jsonl, ten of training to one of evaluation: a tenth of an epoch each."""
    found = []
    for step in range(start + 1, start + count + 1):
        rates = {"train/lr": 0.1 / step, "train/images_per_second": 5000.0 + step}
        found.append({"step": step, "epoch": step / 10, "train/loss": 2.3 / step, "train/accuracy": 90.0, **rates})
        if step % 10 == 0:
            accuracy = 99 + step / 1000
            found.append({"step": step, "epoch": step / 10, "eval/loss": 1 / step, "eval/accuracy": accuracy})
    return "".join(json.dumps(line) + "\n" for line in found)


def write_run(path: Path, *, status: str = "done", steps: int = 30, recipe: dict | None = None, **more) -> Path:
    """A run folder as training leaves it: whole where `status` is done."""
    path.mkdir(parents=True)
    values = {"name": "wide", "seed": 0, "epochs": 3, "optimizer": {"name": "sgd", "lr": 0.1}, **(recipe or {})}
    (path / "recipe.yaml").write_text(yaml.safe_dump(values, allow_unicode=True))
    (path / "metrics.jsonl").write_text(lines(steps))
    (path / "STATUS").write_text(status + "\n")
    if status == "done":
        measured = summary(recipe=values["name"], seed=values["seed"], epochs=3.0, images_per_second=5000.0, **more)
        (path / "summary.json").write_text(json.dumps(measured))
    return path


def compared(*paths: Path) -> list[compare.Row]:
    return compare.group(compare.Comparison(list(paths)).read())


def test_runs_of_one_recipe_are_one_row_and_other_overrides_another(tmp_path):
    write_run(tmp_path / "a" / "seed0", last=99.4)
    write_run(tmp_path / "a" / "seed1", last=99.6, recipe={"seed": 1, "data": {"root": "/elsewhere"}})
    write_run(tmp_path / "lower", last=99.0, recipe={"optimizer": {"name": "sgd", "lr": 0.01}})
    write_run(tmp_path / "other", recipe={"name": "deep"})
    (write_run(tmp_path / "broken") / "recipe.yaml").write_text("")
    found = {cell(row, "recipe"): (cell(row, "n"), cell(row, "last epoch")) for row in compared(tmp_path)}
    assert found == {
        "wide optimizer.lr=0.1": ("2", "99.50 ± 0.14"),
        "wide optimizer.lr=0.01": ("1", "99.00"),
        "deep": ("1", "99.50"),
        "wide": ("1", "99.50"),
    }


@pytest.mark.parametrize("status", ["running", "failed", "preempted"])
def test_an_unfinished_run_is_a_row_of_its_own_with_what_it_has_so_far(tmp_path, status):
    write_run(tmp_path / "done")
    write_run(tmp_path / "later", status=status, steps=20, recipe={"seed": 1})
    finished, unfinished = compared(tmp_path)
    assert cell(finished, "status") == "done" and cell(finished, "n") == "1"
    assert cell(unfinished, "status") == f"{status} at 2 of 3 epochs"
    assert (cell(unfinished, "last epoch"), cell(unfinished, "images/s")) == ("99.02", "5,020")


def test_a_run_that_is_silent_for_long_is_said_to_be(tmp_path):
    path = write_run(tmp_path / "run", status="running")
    for file in path.iterdir():
        os.utime(file, (0, 1e9))
    assert RunReader(path).status.startswith("running at 3 of 3 epochs, silent for ")


@pytest.mark.parametrize(
    ("file", "content", "status"),
    [
        ("summary.json", b'{"recipe": "wi', "damaged: no whole summary.json"),
        ("summary.json", b'["not", "a", "summary"]', "damaged: no whole summary.json"),
        ("recipe.yaml", b"\xff\xfe", "damaged: recipe.yaml cannot be read"),
        ("STATUS", b"\xff", "no STATUS"),
        ("STATUS", None, "no STATUS"),
        ("metrics.jsonl", None, "done"),
        ("metrics.jsonl", b'{"epoch": 1, "train/loss": NaN}\nno JSON\n[1]\n{"epoch": "x"}\n{"epo', "done"),
    ],
)
def test_a_damaged_run_is_a_row_with_its_status(tmp_path, file, content, status):
    path = write_run(tmp_path / "run") / file
    path.unlink() if content is None else path.write_bytes(content)
    [row] = compared(tmp_path)
    assert cell(row, "status") == status


def test_only_finished_runs_are_kept_and_written(tmp_path, capsys):
    write_run(tmp_path / "runs" / "running", status="running")
    words = [str(tmp_path / "runs"), "--no-html", "--keep", str(tmp_path / "kept.jsonl")]
    assert run_command(lambda: compare.main(words)) == 2
    assert "nothing to write" in capsys.readouterr().err
    write_run(tmp_path / "runs" / "done")
    assert compare.main(words) == 0
    assert [json.loads(line)["recipe"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()] == ["wide"]


def test_metrics_are_followed_also_where_a_run_went_back(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reader = JSONLReader(path)
    assert reader.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    assert reader.read() == [{"a": 1}, {"a": 2}]
    with path.open("a") as file:
        file.write(' 3}\n{"a": 4}\n')
    assert [line["a"] for line in reader.read()] == [1, 2, 3, 4]
    path.write_text('{"a": 1}\n{"b": 22}\n{"b": 33}\n{"b": 44}\n{"b": 55}\n')  # longer than before, and other lines
    assert reader.read() == [{"a": 1}, *({"b": value} for value in (22, 33, 44, 55))]
    path.write_text('{"a": 1}\n')
    assert reader.read() == reader.read() == [{"a": 1}]


def test_only_what_is_new_is_parsed(tmp_path, monkeypatch):
    path, parsed = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(json, "loads", lambda line, load=json.loads: parsed.append(line) or load(line))
    path.write_text(lines(50))
    reader = JSONLReader(path)
    reader.read()
    parsed.clear()
    with path.open("a") as file:
        file.write('{"epoch": 9}\n')
    assert len(reader.read()) == 56 and parsed == [b'{"epoch": 9}\n']


@pytest.mark.parametrize("content", ["no JSON\n", "[]\n", '{"recipe": "wide"}\n', "\ud800"])
def test_what_is_no_kept_summary_is_refused(tmp_path, capsys, content):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(content.encode(errors="surrogatepass"))
    assert run_command(lambda: compare.main([str(path)])) == 2
    assert "not a file of kept summaries" in capsys.readouterr().err


def test_what_is_no_run_is_refused(tmp_path, capsys):
    assert run_command(lambda: compare.main([str(tmp_path)])) == 2
    assert "not a run folder" in capsys.readouterr().err
    assert run_command(lambda: compare.main([str(tmp_path / "nowhere")])) == 2
    assert "no such file or folder" in capsys.readouterr().err


def test_a_file_that_cannot_be_written_is_refused(tmp_path, capsys):
    write_run(tmp_path / "run")
    for words in (["--html", str(tmp_path)], ["--html", ""], ["--html", str(tmp_path / "no" / "page.html")]):
        assert run_command(lambda words=words: compare.main([str(tmp_path / "run"), *words])) == 2
        assert "Traceback" not in capsys.readouterr().err
