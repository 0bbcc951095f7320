"""The progress bar shows what the training waits for if it has not moved for ten seconds."""

from __future__ import annotations

import io
import threading
from importlib import import_module
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mnist_dist.data import Batches, Images
from mnist_dist.data.loader import Loader
from mnist_dist.plots.curves import plot_per_batch_loss
from mnist_dist.tracking import ConsoleTracker
from mnist_dist.tracking.activity import ACTIVITIES, activity


@pytest.mark.parametrize("module", ACTIVITIES)
def test_the_modules_of_activities_exist(module):
    assert import_module(module)
    assert len(ACTIVITIES[module]) <= 22, "a longer text hides the number of steps on a terminal of 80 columns"


def test_a_thread_that_waits_for_images_is_described():
    reached, go_on = threading.Event(), threading.Event()

    class SlowStore(torch.Tensor):
        def __getitem__(self, rows):
            reached.set()
            assert go_on.wait(60)
            return super().__getitem__(rows)

    images = Images(torch.zeros(8, 1, 4, 4, dtype=torch.uint8), torch.zeros(8, dtype=torch.int64), ("a",), (0.5,), (1,))
    batches = Batches(8, 4, 0, (1, 4, 4))
    object.__setattr__(images, "images", images.images.as_subclass(SlowStore))
    thread = threading.Thread(target=lambda: Loader(images, lambda n: range(n)).load(batches, batches.plan(0), 0))
    thread.start()
    try:
        assert reached.wait(60)
        assert activity(thread.ident) == ACTIVITIES["mnist_dist.data.loader"]
    finally:
        go_on.set()
        thread.join()
    assert activity(thread.ident) == activity(threading.get_ident()) == "the next step"


def test_a_thread_that_draws_is_described():
    seen = []

    class Lines(list):
        def __iter__(self):
            seen.append(activity(threading.get_ident()))
            raise InterruptedError

    with pytest.raises(InterruptedError):
        plot_per_batch_loss(Lines(), Path("unused.png"), title="")
    assert seen == [ACTIVITIES["mnist_dist.plots"]]


def test_the_bar_names_the_activity_after_ten_seconds_without_movement(tmp_path):
    now = made = 0
    tracker = ConsoleTracker(
        100, 1, "test", tmp_path / "console.log", quiet=True, steps=lambda: made, clock=lambda: now
    )
    console = Console(file=io.StringIO(), width=80)

    def bar() -> str:
        with console.capture() as shown:
            console.print(tracker._progress.get_renderable())
        return shown.get()

    figures = {"train/loss": 0.5, "train/accuracy": 90.0, "train/images_per_second": 64.0}
    for made, now, is_named in (
        *((0, 9, False), (0, 11, True), (10, 12, False), (10, 21, False)),
        *((11, 30, False), (11, 39, False), (11, 41, True)),  # step 11 writes no log line
    ):
        if made == 10:
            tracker.log({"step": 10, "epoch": 0.1, **figures})
        assert ("waiting for the next step" in bar()) is is_named, (made, now)
        assert ("90.00 %" in bar() and "64 images/s" in bar()) is (made > 0 and not is_named)
        assert len(bar().splitlines()) == 1
    assert "11 s" in bar()
    tracker.finish()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_line_names_the_activity_and_again_when_the_standstill_has_doubled(tmp_path, monkeypatch, terminal):
    now, made, stream = 0, 0, io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    tracker = ConsoleTracker(100, 1, "test", tmp_path / "console.log", steps=lambda: made, clock=lambda: now)
    tracker._console._force_terminal = terminal
    for now in range(300):
        made = now // 150
        tracker.report_standstill()
    printed = stream.getvalue().splitlines()
    tracker.finish()
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert [line.split()[3] for line in lines] == ["30", "60", "120"] * 2
    assert all("the next step" in line for line in lines)
    assert printed == ([] if terminal else lines)  # a terminal has a bar


def test_the_thread_that_reports_ends_with_the_tracker(tmp_path):
    tracker = ConsoleTracker(100, 1, "test", tmp_path / "console.log", quiet=True)
    tracker.start()
    assert tracker._watcher.is_alive()
    tracker.finish()
    assert not tracker._watcher.is_alive()
