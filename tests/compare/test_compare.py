"""The table of runs: from run folders and from kept summaries, printed and in Markdown."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from mnist_dist import load_recipe
from mnist_dist.compare import __main__ as compare
from mnist_dist.compare import table as run_table
from mnist_dist.compare.table import MARKS, SHORT_COLUMNS, to_markdown
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


def test_seeds_share_a_row_with_mean_and_deviation():
    [row] = rows_of([summary(seed=0, last=99.4), summary(seed=1, last=99.6)])
    assert cell(row, "last epoch") == "99.50 ± 0.14"
    assert cell(row, "n") == "2"
    assert cell(row, "parameters") == "8,650"


def test_another_precision_device_or_length_is_another_row():
    others = [summary(), summary(mixed_precision="bf16"), summary(device="H200"), summary(epochs=1.0)]
    assert len(rows_of(others)) == 4


def test_a_row_names_the_commits_of_its_runs():
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
        ({"recipe": "mnistnet", "epochs": 1.0, "last": 97.0}, "met: 98.00 in training"),
        ({"recipe": "not_shipped"}, ""),
    ],
)
def test_a_verdict_compares_the_claim_with_last_and_best_accuracy(values, verdict):
    [row] = rows_of([summary(**values)])
    assert cell(row, "verdict") == verdict


# --- Markdown -----------------------------------------------------------------------------------------------------

SELECTION = "<!-- results of {}: made by mnist_dist.compare -->"


@pytest.fixture
def kept(tmp_path) -> Path:
    path = tmp_path / "kept.jsonl"
    rows = [summary(), summary(recipe="lenet5", last=99.1), summary(recipe="my_own", last=98.5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def recipes_in(table: str) -> list[str]:
    """The first column of a Markdown table, without its heading."""
    return [line.split("|")[1].strip() for line in table.strip().splitlines()[2:]]


def test_the_table_is_written_between_the_marks_only(tmp_path, kept, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{MARKS[0]}\nan older table\n{MARKS[1]}\nafter\n")
    assert compare.main([str(kept), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{MARKS[0]}\n| recipe |") and text.endswith(f"{MARKS[1]}\nafter\n")
    assert "an older table" not in text and "99.50" in text and "99.50" in capsys.readouterr().out
    assert compare.main([str(kept), "--markdown", str(page)]) == 0
    assert page.read_text() == text


def test_a_mark_selects_recipes_and_every_marked_table_is_rewritten(tmp_path, kept):
    page = tmp_path / "page.md"
    blocks = [SELECTION.format("my_own, model_v3_onecycle"), MARKS[0], SELECTION.format("lenet5")]
    page.write_text("\n".join(f"text {n}\n{mark}\nold {n}\n{MARKS[1]}" for n, mark in enumerate(blocks)) + "\nend\n")
    assert compare.main([str(kept), "--markdown", str(page)]) == 0
    text = page.read_text()
    tables = [text.partition(mark)[2].partition(MARKS[1])[0] for mark in blocks]
    assert recipes_in(tables[0]) == ["my_own", "model_v3_onecycle"]
    assert recipes_in(tables[1]) == ["lenet5", "model_v3_onecycle", "my_own"]
    assert recipes_in(tables[2]) == ["lenet5"]
    heads = [[cell.strip() for cell in table.strip().splitlines()[0].strip("|").split("|")] for table in tables]
    assert tuple(heads[0]) == tuple(heads[2]) == SHORT_COLUMNS
    assert {"best epoch", "precision", "ran on", "commit"} == set(heads[1]) - set(heads[0])
    outside = text
    for table in tables:
        outside = outside.replace(table, "")
    assert outside == "\n".join(f"text {n}\n{mark}{MARKS[1]}" for n, mark in enumerate(blocks)) + "\nend\n"


def test_recipes_in_a_page_of_the_repository_link_to_their_files():
    repository = Path(compare.__file__).parents[2]
    rows = rows_of([summary(recipe="plus_8k"), summary(recipe="lenet5"), summary(recipe="my_own")])
    pages = {repository: "configs/", repository / "configs": "", repository / "launch": "../configs/"}
    for folder, prefix in pages.items():
        table = to_markdown(rows, SHORT_COLUMNS, folder)
        links = [f"[lenet5]({prefix}lenet5.yaml)", f"[plus_8k]({prefix}plus/plus_8k.yaml)", "my_own"]
        assert recipes_in(table) == links
        assert all((folder / link.split("(")[1].strip(")")).is_file() for link in links[:2])


def test_a_new_markdown_file_holds_the_marks_and_the_table(tmp_path, kept):
    assert compare.main([str(kept), "--markdown", str(tmp_path / "new.md")]) == 0
    text = (tmp_path / "new.md").read_text()
    assert text.startswith(MARKS[0] + "\n") and text.endswith(MARKS[1] + "\n")
    table = text.removeprefix(MARKS[0]).removesuffix(MARKS[1] + "\n")
    assert recipes_in(table) == ["lenet5", "model_v3_onecycle", "my_own"]


@pytest.mark.parametrize(
    "content",
    [
        "no marks\n",
        f"{MARKS[0]}\n",
        f"{MARKS[0]}\n{SELECTION.format('lenet5')}\n{MARKS[1]}\n",
        f"{MARKS[0]}\n{MARKS[1]}\n{MARKS[0]}\n",
        f"{SELECTION.format('lenet5, lenet_6')}\n{MARKS[1]}\n",
    ],
)
def test_a_page_with_wrong_marks_is_refused_and_not_changed(tmp_path, kept, refused, content):
    page = tmp_path / "page.md"
    page.write_text(content)
    assert refused(lambda: compare.main([str(kept), "--markdown", str(page)])) == [("--markdown", "missing")]
    assert page.read_text() == content


# --- head comments of recipes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "measured"),
    [
        ([summary(epochs=10.0, last=99.4), summary(epochs=1.0, last=97.0)], "99.40"),
        ([summary(epochs=15.0, last=99.5), summary(epochs=30.0, last=99.7)], "99.50"),
        ([summary(last=99.5, seed=0), summary(last=99.7, seed=1), summary(last=90.0, device="H200")], "99.60 ± 0.14"),
        ([summary(last=99.5), summary(last=99.6, device="H200")], "99.60"),
        ([summary(last=99.5), summary(last=99.6, device="H200"), summary(last=99.55)], "99.55"),
    ],
    ids=["nearly all epochs", "the recipe's epochs", "more seeds", "newer", "repeated"],
)
def test_the_measured_line_prefers_all_epochs_then_more_seeds_then_newer_runs(tmp_path, monkeypatch, rows, measured):
    notes = {}
    monkeypatch.setattr(run_table, "note_measured", lambda path, text: notes.update({path.stem: text}))
    (tmp_path / "kept.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert compare.main([str(tmp_path / "kept.jsonl"), "--recipes"]) == 0
    assert notes["model_v3_onecycle"].startswith(f"{measured} % last epoch")


def test_the_measured_line_prefers_runs_without_overrides(tmp_path, monkeypatch):
    notes = {}
    monkeypatch.setattr(run_table, "note_measured", lambda path, text: notes.update({path.stem: text}))
    for name, words, last in (("a", [], 99.4), ("b", ["optimizer.lr=0.5"], 99.9)):
        path = write_run(tmp_path / name, recipe={"name": "debug"}, last=last)
        (path / "recipe.yaml").write_text(load_recipe("debug", *words).to_yaml())
    assert compare.main([str(tmp_path), "--recipes", "--no-html"]) == 0
    assert notes["debug"].startswith("99.40 % last epoch")


# --- run folders --------------------------------------------------------------------------------------------------


def lines(count: int, start: int = 0) -> str:
    """Lines of metrics.jsonl: a training line for each tenth of an epoch, an evaluation line for each epoch."""
    found = []
    for step in range(start + 1, start + count + 1):
        rates = {"train/lr": 0.1 / step, "train/images_per_second": 5000.0 + step}
        found.append({"step": step, "epoch": step / 10, "train/loss": 2.3 / step, "train/accuracy": 90.0, **rates})
        if step % 10 == 0:
            accuracy = 99 + step / 1000
            found.append({"step": step, "epoch": step / 10, "eval/loss": 1 / step, "eval/accuracy": accuracy})
    return "".join(json.dumps(line) + "\n" for line in found)


def write_run(path: Path, *, status: str = "done", steps: int = 30, recipe: dict | None = None, **more) -> Path:
    """Writes a run folder as training leaves it; a run that is done has a summary."""
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


def test_runs_of_one_recipe_share_a_row_and_other_overrides_are_another_row(tmp_path):
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
def test_an_unfinished_run_is_a_separate_row_with_its_latest_values(tmp_path, status):
    write_run(tmp_path / "done")
    write_run(tmp_path / "later", status=status, steps=20, recipe={"seed": 1})
    finished, unfinished = compared(tmp_path)
    assert cell(finished, "status") == "done" and cell(finished, "n") == "1"
    assert cell(unfinished, "status") == f"{status} at 2 of 3 epochs"
    assert (cell(unfinished, "last epoch"), cell(unfinished, "images/s")) == ("99.02", "5,020")


def test_the_status_mentions_a_long_time_without_output(tmp_path):
    path = write_run(tmp_path / "run", status="running")
    for file in path.iterdir():
        os.utime(file, (0, 1e9))
    status = RunReader(path).status
    assert status.startswith("running at 3 of 3 epochs") and "2001-09-09" in status


@pytest.mark.parametrize(
    ("file", "content", "status"),
    [
        ("summary.json", b'{"recipe": "wi', ("damaged", "summary.json")),
        ("summary.json", b'["not", "a", "summary"]', ("damaged", "summary.json")),
        ("recipe.yaml", b"\xff\xfe", ("damaged", "recipe.yaml")),
        ("STATUS", b"\xff", ("no STATUS",)),
        ("STATUS", None, ("no STATUS",)),
        ("metrics.jsonl", None, ("done",)),
        ("metrics.jsonl", b'{"epoch": 1, "train/loss": NaN}\nno JSON\n[1]\n{"epoch": "x"}\n{"epo', ("done",)),
    ],
)
def test_a_damaged_run_is_a_row_with_its_status(tmp_path, file, content, status):
    path = write_run(tmp_path / "run") / file
    path.unlink() if content is None else path.write_bytes(content)
    [row] = compared(tmp_path)
    assert all(word in cell(row, "status") for word in status)
    assert ("damaged" in status) == ("damaged" in cell(row, "status"))


@pytest.mark.parametrize("option", ["--keep", "--markdown"])
def test_without_a_finished_run_nothing_is_written(tmp_path, refused, option):
    write_run(tmp_path / "run", status="running")
    words = [str(tmp_path / "run"), option, str(tmp_path / "file")]
    assert refused(lambda: compare.main(words)) == [(option, "missing")]
    assert not (tmp_path / "file").exists()


def test_only_finished_runs_are_kept(tmp_path):
    write_run(tmp_path / "runs" / "running", status="running")
    words = [str(tmp_path / "runs"), "--no-html", "--keep", str(tmp_path / "kept.jsonl")]
    write_run(tmp_path / "runs" / "done")
    assert compare.main(words) == 0
    assert [json.loads(line)["recipe"] for line in (tmp_path / "kept.jsonl").read_text().splitlines()] == ["wide"]


# --- following a file ---------------------------------------------------------------------------------------------


def test_a_reader_follows_metrics_also_after_a_resume(tmp_path):
    path = tmp_path / "metrics.jsonl"
    reader = JSONLReader(path)
    assert reader.read() == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a":')
    assert reader.read() == [{"a": 1}, {"a": 2}]
    with path.open("a") as file:
        file.write(' 3}\n{"a": 4}\n')
    assert [line["a"] for line in reader.read()] == [1, 2, 3, 4]
    path.write_text('{"a": 1}\n{"b": 22}\n{"b": 33}\n{"b": 44}\n{"b": 55}\n')  # longer than before, with other lines
    assert reader.read() == [{"a": 1}, *({"b": value} for value in (22, 33, 44, 55))]
    path.write_text('{"a": 1}\n')
    assert reader.read() == reader.read() == [{"a": 1}]


def test_only_new_lines_are_parsed(tmp_path, monkeypatch):
    path, parsed = tmp_path / "metrics.jsonl", []
    monkeypatch.setattr(json, "loads", lambda line, load=json.loads: parsed.append(line) or load(line))
    path.write_text(lines(50))
    reader = JSONLReader(path)
    reader.read()
    parsed.clear()
    with path.open("a") as file:
        file.write('{"epoch": 9}\n')
    assert len(reader.read()) == 56 and parsed == [b'{"epoch": 9}\n']


# --- bad input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("content", ["no JSON\n", "[]\n", '{"recipe": "wide"}\n', "\ud800"])
def test_a_file_without_kept_summaries_is_refused(tmp_path, refused, content):
    path = tmp_path / "kept.jsonl"
    path.write_bytes(content.encode(errors="surrogatepass"))
    assert refused(lambda: compare.main([str(path)])) == [(str(path), "damaged")]


def test_a_path_without_a_run_is_refused(tmp_path, refused):
    for path in (tmp_path, tmp_path / "nowhere"):
        assert refused(lambda path=path: compare.main([str(path)])) == [(str(path), "missing")]


@pytest.mark.parametrize(
    "words",
    [["--html", "."], ["--html", ""], ["--html", "no/page.html"], ["--keep", "no/kept"], ["--markdown", "no/md"]],
)
def test_a_file_that_cannot_be_written_is_refused(tmp_path, monkeypatch, refused, words):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert refused(lambda: compare.main(["run", *words])) == [(words[0], "unwritable")]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_the_data_set_of_each_run_is_named(colour_run, debug_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    own = colour_run.folder.recipe
    text = own.read_text()
    assert "dataset: synthetic\n" in text and "root: null\n" in text
    own.write_text(
        text.replace("dataset: synthetic\n", "dataset: folder\n").replace("root: null\n", "root: /x/birds\n")
    )
    assert compare.main([str(colour_run.folder.path), str(debug_run), "--html", "page.html"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any("folder birds" in line and "100.00" in line for line in lines)
    assert any(" synthetic " in line for line in lines)
    assert "folder birds" in Path("page.html").read_text()


@pytest.mark.parametrize(
    ("recipe", "data", "counts"),
    [
        ("lenet5", {"dataset": "mnist"}, True),
        ("lenet5", {"dataset": "kmnist"}, False),
        ("cifar10_quick", {"dataset": "folder", "root": "data/cifar10-jpeg"}, True),
        ("cifar10_quick", {"dataset": "folder", "root": "data/birds"}, False),
        ("cifar10_quick", {"dataset": "cifar10"}, False),  # its head comment names another copy
    ],
)
def test_a_run_on_other_data_does_not_count_for_the_claim_of_its_recipe(tmp_path, recipe, data, counts):
    write_run(tmp_path / "run", recipe={"name": recipe, "data": data})
    [row] = compare.group(compare.Comparison([tmp_path / "run"]).read())
    assert bool(row.verdict()) == bool(cell(row, "claim")) == counts
    assert bool(run_table.representative_rows([row])) == counts
