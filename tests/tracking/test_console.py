"""The console of a run."""

from mnist_dist.tracking import ConsoleTracker


def test_the_time_left_is_by_the_speed_of_this_process_also_after_a_resume(tmp_path):
    tracker, now = ConsoleTracker(1000, 10, "test", tmp_path / "console.log", quiet=True), 0.0
    tracker._progress.get_time = lambda: now
    tracker._last_plain = now
    for step in (720, 740, 760):  # this process resumed at step 700: 20 steps in 40 s
        now += 40.0
        figures = {"train/loss": 0.5, "train/accuracy": 90.0, "train/images_per_second": 64.0}
        tracker.log({"step": step, "epoch": step / 100, **figures})
    tracker.finish()
    lines = (tmp_path / "console.log").read_text().splitlines()
    assert lines == [
        "step 720/1,000  loss 0.5000  acc 90.00 %  64 images/s",
        "step 740/1,000  loss 0.5000  acc 90.00 %  64 images/s  9 min left",
        "step 760/1,000  loss 0.5000  acc 90.00 %  64 images/s  8 min left",
    ]
