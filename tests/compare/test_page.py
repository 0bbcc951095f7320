"""The page in a browser: it sorts, filters, draws curves, follows runs, uses no network, and fits a phone."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mnist_dist.compare import __main__ as compare
from mnist_dist.compare.live import LiveServer
from mnist_dist.compare.page import POINTS, Page, curves, embedded, render
from mnist_dist.run.text_output import printable
from tests import processes
from tests.compare.test_compare import lines, summary, write_run
from tests.distributed.training import WITHOUT_TRACKING

pytest_plugins = ["tests.browser"]

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "\"q\" 's' & ${x} {{data}}",
    "数字 ✓ \u2028 é",
]


@pytest.fixture
def serve() -> Iterator[Callable[..., str]]:
    """Serves the live page of run folders until the test ends; returns its URL."""
    with ExitStack() as servers:
        yield lambda *paths: servers.enter_context(serving(*paths))


@pytest.fixture
def look(browser, serve) -> Iterator[Callable[..., Any]]:
    """Opens a page. At the end its console must be empty, and it must not have sent a request to another address.

    Pages are closed before the servers of `serve` stop: a refused request would be an error in the console.
    """
    unwanted, contexts = [], []

    def open_page(address: str, **more: Any) -> Any:
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **more}))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: unwanted.append(message.text))
        page.on("pageerror", lambda error: unwanted.append(str(error)))
        page.on("dialog", lambda dialog: (unwanted.append(dialog.message), dialog.dismiss()))
        here = ("data:", address.partition("?")[0])
        page.on("request", lambda request: None if request.url.startswith(here) else unwanted.append(request.url))
        page.goto(address)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert unwanted == []


@pytest.fixture(scope="module")
def runs(_finished_debug_run, tmp_path_factory) -> Path:
    """A run of the trainer, with pictures, and made-up runs of every kind."""
    folder = tmp_path_factory.mktemp("page") / "runs"
    shutil.copytree(_finished_debug_run, folder / "real")
    (folder / "real" / "plots").mkdir(exist_ok=True)
    for name in ("confusion_matrix.png", "misclassified.png"):  # the names that the trainer uses
        Image.new("RGB", (1200, 900), "#0072b2").save(folder / "real" / "plots" / name)
    for seed, last in enumerate((99.4, 99.6)):
        write_run(folder / f"wide-{seed}", last=last, best=last, recipe={"seed": seed}, parameters=900)
    write_run(folder / "lower", last=98.0, recipe={"optimizer": {"name": "sgd", "lr": 0.01}}, parameters=10_000)
    write_run(folder / "stopped", status="preempted", steps=12, recipe={"name": "deep"})
    with (folder / "stopped" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "epo')
    return folder


@pytest.fixture(scope="module")
def address(runs, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("page") / "page.html"
    assert compare.main([str(runs), "--html", str(path)]) == 0
    return path.as_uri()


def column(page: Any, name: str) -> list[str]:
    """The texts of a column of the table, from the top."""
    names = page.locator("#table thead th").evaluate_all("all => all.map(th => th.dataset.column)")
    return page.locator(f"#table tbody tr > :nth-child({names.index(name) + 1})").all_inner_texts()


def drawn(page: Any) -> set[str]:
    """Names of the folders whose curves are drawn."""
    return {Path(name).name for name in page.locator(".run").evaluate_all("all => all.map(g => g.dataset.run)")}


def test_the_page_shows_the_measurements(look, address):
    page = look(address)
    recipes = [text.splitlines()[0] for text in column(page, "recipe")]
    assert recipes == ["debug", "wide optimizer.lr=0.01", "deep", "wide optimizer.lr=0.1"]
    assert column(page, "last epoch")[1:] == ["98.00", "99.01", "99.50 ± 0.14"]
    assert column(page, "status")[1:] == ["done", "preempted at 1.2 of 3 epochs", "done"]
    assert drawn(page) == {"real", "wide-0", "wide-1", "lower", "stopped"}
    titles = page.locator("#charts h3").all_inner_texts()
    assert [title.partition(" (")[0] for title in titles] == [
        *("Training loss", "Evaluation loss", "Training accuracy", "Evaluation accuracy", "Learning rate", "Images/s")
    ]
    assert "optimizer.lr" in page.locator("#differences tbody th").all_inner_texts()
    page.locator("details").evaluate_all("all => all.forEach(each => each.open = true)")
    pictures = page.locator("#pictures img")
    assert pictures.count() == 2
    pictures.evaluate_all("all => all.forEach(image => image.loading = 'eager')")
    pictures.evaluate_all("all => Promise.all(all.map(image => image.decode()))")  # raises for a broken one


def test_the_page_sorts_by_click_and_by_key_with_missing_values_last(look, address):
    page = look(address)
    header, button = page.locator("th[data-column=parameters]"), page.locator("th[data-column=parameters] button")
    assert header.get_attribute("aria-sort") == "none"
    button.click()
    assert column(page, "parameters") == ["61,706", "10,000", "900", ""]
    assert header.get_attribute("aria-sort") == "descending"
    button.press("Enter")
    assert column(page, "parameters") == ["900", "10,000", "61,706", ""]
    assert header.get_attribute("aria-sort") == "ascending"
    page.locator("th[data-column=recipe] button").click()
    assert [text.split()[0] for text in column(page, "recipe")] == ["debug", "deep", "wide", "wide"]
    assert header.get_attribute("aria-sort") == "none"


@pytest.mark.parametrize(
    ("words", "rows", "expected"),
    [
        ("WIDE", 2, {"wide-0", "wide-1", "lower"}),
        ("wide lr=0.01", 1, {"lower"}),
        ("wide-1", 1, {"wide-1"}),
        ("preempted", 1, {"stopped"}),
        ("no such run", 0, set()),
    ],
)
def test_a_filter_selects_rows_and_curves(look, address, words, rows, expected):
    page = look(address)
    page.fill("#filter", words)
    assert page.locator("#table tbody tr").count() == rows
    assert drawn(page) == expected
    assert page.locator("#nothing").is_visible() == (not rows)
    page.fill("#filter", "")
    assert len(drawn(page)) == 5


def test_the_legend_hides_runs_and_the_switches_change_scale_and_rows(look, address):
    page = look(address)
    page.locator("#legend button", has_text="wide optimizer.lr=0.1").last.click()
    assert drawn(page) == {"real", "lower", "stopped"}
    page.locator("#legend button[aria-label$='lr=0.1, seed 1']").click()
    assert drawn(page) == {"real", "lower", "stopped", "wide-1"}
    page.locator("#legend button", has_text="deep").dblclick()
    assert drawn(page) == {"stopped"}
    page.locator("#legend button", has_text="deep").dblclick()  # only this run was drawn: now all are drawn again
    assert len(drawn(page)) == 5
    path = "document.querySelector('.run .line').getAttribute('d')"
    before = page.evaluate(path)
    page.uncheck("#log")
    assert page.evaluate(path) != before
    page.check("#each")
    assert page.locator("#table tbody tr").count() == 5 and set(column(page, "n")) == {"1"}


def test_seeds_share_colour_and_dashes_and_recipes_do_not(look, address):
    looks: dict[str, set] = {}
    read = (
        "all => all.map(g => [g.dataset.run, g.getAttribute('style') + g.firstChild.getAttribute('stroke-dasharray')])"
    )
    for name, found in look(address).locator(".run").evaluate_all(read):
        looks.setdefault(Path(name).name, set()).add(found)
    assert looks["wide-0"] == looks["wide-1"] and all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == 4


def test_the_pointer_shows_the_nearest_value(look, address):
    page = look(address)
    page.fill("#filter", "wide-1")
    page.locator("figure", has_text="Evaluation accuracy").locator("svg[role=img]").hover(position={"x": 500, "y": 60})
    [text] = [text for text in page.locator("output").all_inner_texts() if "%" in text and "99.03" in text]
    assert text == "99.03 % · epoch 3 · wide optimizer.lr=0.1, seed 1"
    assert page.locator("#table tbody tr.lit").count() == 1


def test_a_run_without_mistakes_is_drawn_below_the_highest_grid_line(look, tmp_path):
    run = write_run(tmp_path / "runs" / "perfect")
    lines = [{"step": epoch, "epoch": epoch, "eval/accuracy": 100.0, "eval/loss": 0.0} for epoch in (1, 2, 3)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    values = compare.Comparison([tmp_path / "runs"]).page_values(Page(embedded))
    (tmp_path / "page.html").write_text(render(values))
    figure = look((tmp_path / "page.html").as_uri()).locator("figure", has_text="Evaluation accuracy")
    lines_at = figure.locator("line.grid").evaluate_all("all => all.map(each => +each.getAttribute('y1'))")
    assert len(lines_at) > 1
    assert f",{min(lines_at)}" in figure.locator(".run .line").get_attribute("d").replace(" ", ",")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_a_phone(look, tmp_path, scheme):
    for number, name in enumerate(HOSTILE):
        write_run(tmp_path / "runs" / ("long_" * 20 + str(number)), recipe={"name": name + "x" * 90})
    values = compare.Comparison([tmp_path / "runs"]).page_values(Page(embedded))
    (tmp_path / "page.html").write_text(render(values))
    page = look((tmp_path / "page.html").as_uri(), viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    widths = page.locator("figure svg[role=img]").evaluate_all(
        "all => all.map(svg => svg.getBoundingClientRect().width)"
    )
    assert len(widths) == 6 and min(widths) > 300


def test_every_name_is_shown_as_text(look, tmp_path):
    for seed, name in enumerate(HOSTILE):
        write_run(tmp_path / "runs" / name.replace("/", "∕"), recipe={"name": name, "seed": seed})
    write_run(Path(os.fsdecode(os.fsencode(tmp_path / "runs") + b"/not-utf8-\xff")))
    values = compare.Comparison([tmp_path / "runs"]).page_values(Page(embedded))
    (tmp_path / "page.html").write_text(render(values))
    page = look((tmp_path / "page.html").as_uri())
    page.check("#each")
    shown = [" ".join(text.split()) for text in column(page, "recipe")]
    assert len(shown) == 5
    for name in HOSTILE:
        assert any(text.startswith(" ".join(printable(name).split())[:20]) for text in shown)
    assert any("not-utf8-?" in text for text in shown)
    assert len(drawn(page)) == 5


def test_kept_summaries_make_a_page_only_with_html(look, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("kept.jsonl").write_text(json.dumps(summary()) + "\n")
    assert compare.main(["kept.jsonl"]) == 0
    assert not Path("compare.html").exists()
    assert compare.main(["kept.jsonl", "--html", "page.html"]) == 0
    page = look((tmp_path / "page.html").as_uri())
    assert column(page, "last epoch") == ["99.50"]
    assert not page.locator("#curves").is_visible() and not page.locator("#pictures").is_visible()


def test_the_page_is_written_here_by_default(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_run(tmp_path / "run")
    assert compare.main(["run", "--no-html"]) == 0 and not Path("compare.html").exists()
    assert compare.main(["run"]) == 0 and Path("compare.html").is_file()
    assert "compare.html" in capsys.readouterr().out


def test_curves_are_short_and_hold_no_nan():
    measured = [{"epoch": step, "train/loss": float(step)} for step in range(10 * POINTS)]
    measured[15]["train/loss"] = float("nan")
    epochs, losses = curves(measured)["train/loss"]
    assert len(epochs) == len(losses) == POINTS
    assert (epochs[0], losses[0], losses[1]) == (9, 4.5, None)
    assert epochs[-1] == measured[-1]["epoch"]


# --- live -----------------------------------------------------------------------------------------------------------


@contextmanager
def serving(*paths: Path) -> Iterator[str]:
    comparison = compare.Comparison(list(paths), may_wait=True)
    with LiveServer(0, partial(comparison.page_values, live=True)) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


TOP = "document.querySelector('#charts').getBoundingClientRect().top"


def test_a_live_page_follows_and_keeps_the_users_settings(look, serve, tmp_path):
    folder = tmp_path / "runs"
    write_run(folder / "wide-0", parameters=900)
    growing = write_run(folder / "wide-1", status="running", steps=4, recipe={"seed": 1})
    write_run(folder / "deep", recipe={"name": "deep"}, parameters=5)
    url = serve(folder)
    page = look(url)
    page.locator("th[data-column=recipe] button").dblclick()
    page.locator("#legend button[aria-label$='seed 0']").click()
    page.fill("#filter", "wide")
    page.evaluate("scrollTo(0, 300)")
    top = page.evaluate(TOP)
    assert page.locator("#table tbody tr").count() == 2 and drawn(page) == {"wide-1"}

    def append() -> None:
        for start in range(4, 24):
            with (growing / "metrics.jsonl").open("a") as file:
                file.write(lines(1, start))

    writer = threading.Thread(target=append)
    writer.start()
    writer.join()
    write_run(folder / "later", recipe={"seed": 2})
    page.wait_for_selector("text=running at 2.4 of 3 epochs")
    page.wait_for_function("document.querySelectorAll('.run[data-run$=later]').length")
    assert drawn(page) == {"wide-1", "later"}
    assert column(page, "n") == ["2", "1"] or column(page, "n") == ["1", "2"]
    assert page.locator("th[data-column=recipe]").get_attribute("aria-sort") == "descending"
    assert page.input_value("#filter") == "wide"
    assert page.evaluate(TOP) == pytest.approx(top, abs=2)
    assert "live" in page.inner_text("#note")


def test_a_live_page_waits_for_the_first_run(look, serve, tmp_path):
    url = serve(tmp_path)
    page = look(url)
    assert page.inner_text("#nothing") == "No runs yet."
    write_run(tmp_path / "first", status="running")
    page.wait_for_selector("text=running at 3 of 3 epochs")


class TwoProcesses:
    """Trains a run in two processes, for longer than any test."""

    def __init__(self, folder: Path):
        words = ["--recipe", "debug", "--run-dir", folder, "epochs=100000", "checkpoint.every_steps=3"]
        words += ["batch_size=64", "data.limit_train=512", "data.limit_test=32"]
        self._command = [sys.executable, "-m", "mnist_dist.train", *words, *WITHOUT_TRACKING]
        self._ranks: list[processes.Process] = []

    def start(self) -> None:
        port, base = processes.free_port(), os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        variables = [processes.rank_variables(rank, 2, port) for rank in range(2)]
        self._ranks = [processes.popen(self._command, env=base | each, stdout=subprocess.DEVNULL) for each in variables]

    def end(self, number: int) -> None:
        """Sends a signal to both processes and waits until they have ended."""
        for rank in self._ranks:
            rank.send_signal(number)
        for rank in self._ranks:
            rank.wait(timeout=120)


@pytest.fixture
def two_processes(tmp_path) -> Iterator[TwoProcesses]:
    training = TwoProcesses(tmp_path / "runs" / "watched")
    yield training
    training.end(signal.SIGKILL)


def test_a_phone_watches_a_run_of_two_processes_that_is_killed_and_resumed(look, serve, tmp_path, two_processes):
    (tmp_path / "runs").mkdir()
    url = serve(tmp_path / "runs")
    page = look(url, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)

    def shows(*texts: str) -> None:
        for text in texts:
            page.locator("#watch", has_text=text).wait_for()

    two_processes.start()
    page.wait_for_selector("#watch .state.running")
    shows("images/s", "waiting share", "of training left", "best weights", "/100000  train loss")
    rows = page.locator("#watch h3:text('Processes') + div tr")
    assert [text.split()[0] for text in rows.all_inner_texts()] == ["rank", "0", "1"]
    assert all(row.count("%") == 1 for row in rows.all_inner_texts()[1:])

    two_processes.end(signal.SIGKILL)
    page.wait_for_selector("#watch .state.silent")
    shows("No sign of life since", "resumes it from step", "images/s, last")
    page.locator("#about", has_text="1 without a sign of life").wait_for()

    two_processes.start()
    page.wait_for_selector("#watch .state.running")
    shows("2 processes from step 0", "resumed after a failure", "last log line")

    two_processes.end(signal.SIGTERM)
    page.wait_for_selector("#watch .state.preempted")
    shows("Stopped by a signal", "Rerun the same command")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    touched = "all => all.filter(each => each.checkVisibility()).map(each => each.getBoundingClientRect().height)"
    heights = page.locator("button, summary, #filter, #bar label").evaluate_all(touched)
    assert len(heights) > 8 and min(heights) >= 44


def test_details_stay_as_the_user_left_them(look, serve, tmp_path):
    for name in ("first", "second"):
        write_run(tmp_path / name, status="running", steps=4, recipe={"name": name})
    url = serve(tmp_path)
    page = look(url)
    page.wait_for_selector("#watch details[open] >> nth=1")
    page.locator("#watch summary", has_text="second").click()
    (tmp_path / "second" / "console.log").write_text("<b>a message</b>\n")
    (tmp_path / "first" / "console.log").write_text("<img src=x onerror=alert(1)>\n")
    page.locator("#watch", has_text="<b>a message</b>").wait_for(state="attached")
    assert page.locator("#watch details").evaluate_all("all => all.map(each => each.open)") == [True, False]
    assert page.locator("#watch pre").first.inner_text() == "<img src=x onerror=alert(1)>"
    page.fill("#filter", "second")
    assert page.locator("#watch details").count() == 1


def test_the_process_that_waits_least_is_named_as_the_slowest(look, serve, tmp_path):
    path = write_run(tmp_path / "run", status="running")
    line = {"step": 31, "epoch": 3, "train/loss": 1.0}
    for rank, wait in enumerate((40.0, 5.0, 30.0)):
        line |= {f"process/{rank}/images_per_second": 10.0, f"process/{rank}/waiting_percent": wait}
    (path / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    url = serve(tmp_path)
    look(url).locator("#watch p", has_text="Rank 1 is the slowest").wait_for()


def test_a_page_in_a_file_has_no_details(look, address):
    assert look(address).locator("#watch *").count() == 0


def ask(url: str, path: str, host: str = "") -> tuple[int, bytes]:
    request = urllib.request.Request(url.rstrip("/") + path, headers={"Host": host} if host else {})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def test_the_server_answers_only_this_machine_and_serves_only_the_page(serve, runs):
    url = serve(runs)
    port = url.rpartition(":")[2].rstrip("/")
    assert url.startswith("http://127.0.0.1:")
    assert [ask(url, "/", host)[0] for host in ("", f"localhost:{port}", "localhost")] == [200] * 3
    for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", "127.0.0.1.nip.io", "10.0.0.1"):
        assert ask(url, "/data", host)[0] == 403
    status, text = ask(url, "/data")
    pictures = [found for family in json.loads(text)["families"].values() for _, found in family["pictures"]]
    assert status == 200 and len(pictures) == 2
    assert all(ask(url, found)[1].startswith(b"\x89PNG") for found in pictures)
    bad = ("/etc/passwd", "/picture//etc/passwd", pictures[0].replace("misclassified", "x") + "x", "/../setup.cfg")
    assert {ask(url, path)[0] for path in bad} == {404}


def test_a_browser_finds_the_pictures_of_a_path_with_dots(serve, runs, monkeypatch):
    (runs / "other").mkdir(exist_ok=True)
    monkeypatch.chdir(runs / "other")
    url = serve(Path(".."))
    pictures = [
        found for family in json.loads(ask(url, "/data")[1])["families"].values() for _, found in family["pictures"]
    ]
    assert len(pictures) == 2 and not any("/../" in found for found in pictures)
    assert all(ask(url, found)[1].startswith(b"\x89PNG") for found in pictures)


def test_known_values_are_not_sent_again(serve, runs):
    url = serve(runs)
    with urllib.request.urlopen(url + "data", timeout=60) as answer:
        assert ask(url, "/data?" + answer.headers["X-Version"]) == (204, b"")
        assert ask(url, "/data?other")[0] == 200


def test_a_port_that_cannot_be_used_is_refused(runs, refused):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for port, kind in ((str(taken.getsockname()[1]), "conflict"), ("99999", "range")):
            words = [str(runs), "--live", "--port", port]
            assert refused(lambda words=words: compare.main(words)) == [("--port", kind)]


def test_ctrl_c_stops_the_server_without_an_error(runs):
    command = [sys.executable, "-m", "mnist_dist.compare", runs, "--live", "--port", "0"]
    with processes.popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        url = next(word for line in process.stdout for word in line.split() if word.startswith("http://"))
        assert ask(url, "/")[0] == 200
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
        assert process.stderr.read() == ""
