"""The progress bar shows what the training waits for if it has not moved for ten seconds."""

from __future__ import annotations

import io
import threading
from importlib import import_module

import pytest
import torch
from rich.console import Console

from mnist_dist.data import Batches, Images
from mnist_dist.data.loader import Loader
from mnist_dist.tracking import ConsoleTracker
from mnist_dist.tracking.activity import ACTIVITIES, activity


@pytest.mark.parametrize("module", ACTIVITIES)
def test_the_modules_of_activities_exist(module):
    assert import_module(module)


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


def test_the_bar_names_the_activity_after_ten_seconds_without_movement(tmp_path):
    tracker, now = ConsoleTracker(100, 1, "test", tmp_path / "console.log", quiet=True), 0.0
    tracker._progress.get_time = lambda: now
    [task] = tracker._progress.tasks
    task._get_time, task.start_time = tracker._progress.get_time, 0.0
    console = Console(file=io.StringIO(), width=80)

    def bar() -> str:
        with console.capture() as shown:
            console.print(tracker._progress.get_renderable())
        return shown.get()

    figures = {"train/loss": 0.5, "train/accuracy": 90.0, "train/images_per_second": 64.0}
    for step, seconds, is_named in ((0, 9, False), (0, 11, True), (10, 12, False), (10, 21, False), (10, 23, True)):
        now = float(seconds)
        if step:
            tracker.log({"step": step, "epoch": 0.1, **figures})
        assert ("waiting for the next step" in bar()) is is_named, (step, seconds)
        assert ("90.00 %" in bar() and "64 images/s" in bar()) is (step > 0 and not is_named)
        assert len(bar().splitlines()) == 1
    assert "11 s" in bar()
    tracker.finish()
