"""The pictures show the right numbers, their texts fit, and the caller's matplotlib settings do not change."""

from __future__ import annotations

import itertools
import struct
import sys
import threading

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex

from mnist_dist.plots import confusion, curves, style
from mnist_dist.plots import images as grids
from mnist_dist.plots.explanation import plot_explanation
from mnist_dist.plots.timeline import LOOKS, plot_timelines
from tests import processes

pytestmark = pytest.mark.pictures

DIGITS = [str(digit) for digit in range(10)]
CLOTHES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]


@pytest.fixture
def figures(monkeypatch):
    """The figures written during the test, in order."""
    written = []
    write = style.write_png

    def keep(figure, path):
        written.append(figure)
        return write(figure, path)

    monkeypatch.setattr(style, "write_png", keep)
    return written


def training_line(step, epoch, loss, accuracy, lr=0.1):
    return {"step": step, "epoch": epoch, "train/loss": loss, "train/accuracy": accuracy, "train/lr": lr}


def evaluation_line(step, epoch, loss, accuracy):
    return {"step": step, "epoch": epoch, "eval/loss": loss, "eval/accuracy": accuracy}


def history(epochs=5, lines_per_epoch=20):
    """The accuracy rises from 10 % to 99 % in the first epoch; the loss falls from 2.3 to 0.02."""
    lines = []
    for step in range(1, epochs * lines_per_epoch + 1):
        epoch = step / lines_per_epoch
        remaining = np.exp(-8 * (epoch - 1 / lines_per_epoch))
        lines.append(training_line(step, epoch, 0.02 + 2.28 * remaining, 99 - 89 * remaining, 0.1 / step))
        if step % lines_per_epoch == 0:
            lines.append(evaluation_line(step, epoch, 0.05 / epoch, 99.5 - 1 / epoch))
    return lines


def predictions_for(images, labels, wrong, classes=DIGITS):
    """Predictions that are right with confidence 0.99, except for {index: (guess, confidence)}."""
    probabilities = torch.full((len(labels), len(classes)), 0.001)
    probabilities[torch.arange(len(labels)), labels] = 0.99
    for index, (guess, confidence) in wrong.items():
        probabilities[index] = 0.001
        probabilities[index, guess] = confidence
    return grids.Predictions.read(images, labels, probabilities, classes)


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (100, 1, 28, 28), dtype=torch.uint8, generator=generator)


@pytest.fixture
def labels():
    return torch.arange(100) % 10


def png_size(path):
    """Returns width and height in pixels from the header of a PNG."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def captions(figure):
    """Returns (text, colour, weight) of the captions above the images, in order."""
    marked = [text for text in figure.axes[0].texts if "✓" in text.get_text() or "✗" in text.get_text()]
    return [(text.get_text(), to_hex(text.get_color()).upper(), text.get_fontweight()) for text in marked]


def all_text(figure):
    return " ".join(text.get_text() for axes in figure.axes for text in axes.texts)


def assert_texts_fit(figure):
    """Checks that no two texts on the sheet overlap and that none is cut at the edge."""
    renderer = figure.canvas.get_renderer()
    boxes = [(text.get_text(), text.get_window_extent(renderer)) for text in figure.axes[0].texts]
    width, height = figure.get_size_inches() * figure.dpi
    for text, box in boxes:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, f"{text!r} is cut"
    for (one, box), (other, its_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(its_box), f"{one!r} and {other!r} overlap"


# --- curves ----------------------------------------------------------------------------------------------------------


def test_history_draws_the_lines_of_the_file_on_labelled_axes(tmp_path, figures):
    lines = history()
    path = curves.plot_training_history(
        lines, tmp_path / "plots" / "history.png", title="A run", eval_name="validation"
    )
    assert path == tmp_path / "plots" / "history.png"
    assert png_size(path) == (1200, 1275)

    (figure,) = figures
    loss, accuracy, rate = figure.axes
    assert figure.get_suptitle() == "A run"
    labels = [axes.get_ylabel() for axes in figure.axes]
    assert labels == ["loss (nats)", "accuracy (%)", "learning rate"]
    assert rate.get_xlabel() == "epoch"

    training = [line for line in lines if "train/loss" in line]
    evaluation = [line for line in lines if "eval/loss" in line]
    for axes, key in ((loss, "loss"), (accuracy, "accuracy")):
        for curve, kind, split in zip(axes.lines, ("train", "eval"), (training, evaluation), strict=True):
            np.testing.assert_array_equal(curve.get_xdata(), [line["epoch"] for line in split])
            np.testing.assert_array_equal(curve.get_ydata(), [line[f"{kind}/{key}"] for line in split])
        # Colour is not the only difference.
        assert axes.lines[0].get_linestyle() != axes.lines[1].get_linestyle()
    np.testing.assert_array_equal(rate.lines[0].get_ydata(), [line["train/lr"] for line in training])
    names = [text.get_text() for text in accuracy.get_legend().get_texts()]
    assert names == ["training", "validation (best 99.30 % at epoch 5)"]


def test_the_first_points_do_not_set_the_range_of_the_accuracy(tmp_path, figures):
    lines = history()
    curves.plot_training_history(lines, tmp_path / "history.png", title="A run")
    accuracy = figures[0].axes[1]
    low, high = accuracy.get_ylim()
    assert 90 < low < 98.5 and 99.3 < high <= 101
    hidden = sum(line["train/accuracy"] < low for line in lines if "train/accuracy" in line)
    assert hidden > 0
    assert accuracy.get_legend().get_title().get_text() == f"{hidden} points below {low:.1f} % not shown"


def test_history_shows_every_point_of_a_slow_run(tmp_path, figures):
    lines = [evaluation_line(epoch, float(epoch), 1.0, 40.0 + 5 * epoch) for epoch in range(1, 8)]
    lines += [training_line(epoch, float(epoch), 1.0, 60.0) for epoch in range(1, 8)]
    curves.plot_training_history(lines, tmp_path / "history.png", title="A run")
    low, high = figures[0].axes[1].get_ylim()
    assert low < 45 and high > 75
    assert figures[0].axes[1].get_legend().get_title().get_text() in ("", "None")


@pytest.mark.parametrize("kept", ["eval/loss", "train/loss"])
def test_history_works_with_one_line_of_one_kind(tmp_path, figures, kept):
    (last,) = [line for line in history() if kept in line][-1:]
    curves.plot_training_history([last], tmp_path / "history.png", title="A run")
    loss, _, rate = figures[0].axes
    (curve,) = loss.lines
    assert curve.get_ydata() == [last[kept]]
    assert curve.get_marker() == "o", "one point without a marker is invisible"
    assert loss.get_xlim()[1] > last["epoch"]
    assert ("nothing recorded" in [text.get_text() for text in rate.texts]) == (kept == "eval/loss")


def test_history_without_any_line_is_marked_as_empty(tmp_path, figures):
    path = curves.plot_training_history([], tmp_path / "history.png", title="A run")
    png_size(path)
    assert all_text(figures[0]) == "nothing recorded nothing recorded nothing recorded"


def test_per_batch_loss_draws_each_interval_and_its_mean(tmp_path, figures):
    lines = [training_line(step, step / 10, 1.0 + step % 2, 50.0) for step in range(1, 21)]
    lines.insert(5, training_line(99, 0.1, float("nan"), 50.0))
    lines.insert(9, evaluation_line(10, 1.0, 0.5, 90.0))
    path = curves.plot_per_batch_loss(lines, tmp_path / "loss.png", title="A run")
    assert png_size(path) == (1200, 675)
    (axes,) = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("step", "training loss (nats)")
    each, mean = axes.lines
    np.testing.assert_array_equal(each.get_xdata(), range(1, 21))
    np.testing.assert_array_equal(each.get_ydata(), [1.0 + step % 2 for step in range(1, 21)])
    # Two neighbours on either side: 2 1 2 1 2 has the mean 1.6, and 2 1 2 at the start 5/3.
    assert mean.get_ydata()[0] == pytest.approx(5 / 3)
    assert mean.get_ydata()[2] == pytest.approx(1.6)
    assert mean.get_ydata()[3] == pytest.approx(1.4)
    assert mean.get_label() == "mean of 5 intervals"


@pytest.mark.parametrize(("lowest", "scale"), [(0.5, "linear"), (0.05, "log"), (0.0, "linear")])
def test_per_batch_loss_is_logarithmic_beyond_a_decade(tmp_path, figures, lowest, scale):
    lines = [training_line(1, 0.1, 2.0, 50.0), training_line(2, 0.2, lowest, 50.0)]
    curves.plot_per_batch_loss(lines, tmp_path / "loss.png", title="A run")
    assert figures[0].axes[0].get_yscale() == scale


def test_losses_in_a_narrow_range_are_below_the_upper_edge(tmp_path, figures):
    lines = [training_line(step, step / 4, 2.3 + step / 100, 10.0) for step in range(1, 5)]
    curves.plot_training_history([*lines, evaluation_line(4, 1.0, 2.34, 10.0)], tmp_path / "history.png", title="A run")
    low, high = figures[0].axes[0].get_ylim()
    assert low == 0 and high > 1.04 * 2.34


@pytest.mark.parametrize("around", [1, 3, 50])
def test_running_mean_equals_the_mean_of_each_window(around):
    values = np.random.default_rng(0).normal(size=40)
    expected = [values[max(i - around, 0) : i + around + 1].mean() for i in range(40)]
    np.testing.assert_allclose(curves.running_mean(values, around), expected, rtol=1e-12)


# --- images ----------------------------------------------------------------------------------------------------------


def test_predictions_mark_right_and_wrong_in_colour_and_in_grey(tmp_path, figures, images, labels):
    wrong = {99: (4, 0.93), 0: (6, 0.5)}
    images[0] //= 4
    path = grids.plot_predictions(predictions_for(images, labels, wrong), tmp_path / "p.png", title="A run")
    width, height = png_size(path)
    assert 1000 < width < 1600 and 1000 < height < 1600
    shown = captions(figures[0])
    # Four rows of six over the whole set with its first and last image; then both mistakes, the more confident first.
    assert len(shown) == 24 + 2
    green, red = (style.GREEN, "normal"), (style.VERMILLION, "bold")
    assert shown[1] == ("4 ✓", *green)
    assert shown[0] == shown[25] == ("✗ 6 (true 0) 0.50", *red)
    assert shown[23] == shown[24] == ("✗ 4 (true 9) 0.93", *red)
    tiles = figures[0].axes[0].images
    np.testing.assert_array_equal(tiles[23].get_array(), images[99, 0].numpy())
    np.testing.assert_array_equal(tiles[25].get_array(), images[0, 0].numpy())
    assert tiles[0].get_clim() == (0, 255), "a dark image must stay dark"
    assert "All 2 mistakes in 100 images" in all_text(figures[0])


def test_predictions_of_a_small_perfect_set(tmp_path, figures, images, labels):
    grids.plot_predictions(predictions_for(images[:7], labels[:7], {}), tmp_path / "p.png", title="A run")
    assert [text for text, *_ in captions(figures[0])] == [f"{digit} ✓" for digit in range(7)]
    assert "No mistakes: all 7 images are classified correctly" in all_text(figures[0])


def test_misclassified_shows_the_most_confident_mistakes_first(tmp_path, figures, images, labels):
    wrong = {index: ((int(labels[index]) + 1) % 10, 0.3 + index / 200) for index in range(0, 100, 2)}
    grids.plot_misclassified(predictions_for(images, labels, wrong), tmp_path / "m.png", title="A run", count=10)
    expected = [f"✗ {wrong[i][0]} (true {labels[i]}) {wrong[i][1]:.2f}" for i in range(98, 78, -2)]
    assert [text for text, *_ in captions(figures[0])] == expected
    np.testing.assert_array_equal(figures[0].axes[0].images[0].get_array(), images[98, 0].numpy())
    assert "The 10 most confident of 50 mistakes in 100 images" in all_text(figures[0])


def test_misclassified_without_a_mistake_has_a_heading_only(tmp_path, figures, images, labels):
    path = grids.plot_misclassified(predictions_for(images, labels, {}), tmp_path / "m.png", title="A run")
    png_size(path)
    assert not figures[0].axes[0].images
    assert "No mistakes: all 100 images are classified correctly" in all_text(figures[0])


def test_long_names_are_captioned_on_two_lines(tmp_path, figures, images, labels):
    predictions = predictions_for(images, labels, {10: (3, 0.97)}, CLOTHES)
    grids.plot_misclassified(predictions, tmp_path / "m.png", title="A run")
    assert captions(figures[0]) == [("✗ Dress 0.97\n(true T-shirt/top)", style.VERMILLION, "bold")]


LONG = [f"number {digit} of ten classes" for digit in range(10)]


@pytest.mark.parametrize("classes", [DIGITS, CLOTHES, LONG], ids=["digits", "clothes", "long"])
def test_captions_neither_overlap_nor_leave_the_page(tmp_path, figures, images, labels, classes):
    wrong = {index: (int(9 - labels[index]), 0.99) for index in range(50)}
    predictions = predictions_for(images, labels, wrong, classes)
    title = "A long title of a run, as users write it if a recipe has many changes that the title should mention " * 2
    grids.plot_predictions(predictions, tmp_path / "p.png", title=title, count=12)
    grids.plot_misclassified(predictions, tmp_path / "m.png", title=title, count=16)
    grids.plot_augmented_samples(images[:12], images[:12], tmp_path / "a.png", title=title)
    for figure in figures:
        assert_texts_fit(figure)


@pytest.mark.parametrize("lengths", [(3, 2, 3), (3, 3, 2), (0, 0, 0)])
def test_predictions_refuse_lengths_that_differ(images, labels, lengths):
    first, second, third = lengths
    with pytest.raises(ValueError, match=f"{first}, {second} and {third}"):
        grids.Predictions.read(images[:first], labels[:second], torch.full((third, 10), 0.1), DIGITS)


def test_augmented_samples_are_below_their_originals(tmp_path, figures, images):
    augmented = 255.0 - images[:12].float()
    grids.plot_augmented_samples(images[:12], augmented, tmp_path / "a.png", title="Turned")
    (sheet,) = figures[0].axes
    assert [text.get_text() for text in sheet.texts] == ["Turned"] + ["original", "augmented"] * 2
    assert len(sheet.images) == 24
    for index, (above, below) in enumerate(zip(sheet.images[::2], sheet.images[1::2], strict=True)):
        np.testing.assert_array_equal(above.get_array(), images[index, 0].numpy())
        np.testing.assert_array_equal(below.get_array(), augmented[index, 0].numpy())
        assert above.get_extent()[:2] == below.get_extent()[:2]
        assert above.get_extent()[2] < below.get_extent()[3], "y runs down the sheet"
    with pytest.raises(ValueError, match=r"\(3, 1, 28, 28\), \(2, 1, 28, 28\)"):
        grids.plot_augmented_samples(images[:3], augmented[:2], tmp_path / "a.png", title="Turned")


# --- colour and other shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 32, 32), (3, 24, 40), (3, 300, 200), (1, 40, 24)])
def test_images_of_any_shape_keep_their_colours_and_proportions(tmp_path, figures, labels, shape):
    images = torch.randint(0, 256, (100, *shape), dtype=torch.uint8)
    predictions = grids.Predictions.read(images, labels, torch.eye(10)[labels], DIGITS, inverted=False)
    grids.plot_predictions(predictions, tmp_path / "p.png", title="A run")
    grids.plot_augmented_samples(images[:4], images[:4].float() + 9, tmp_path / "a.png", title="A run", inverted=False)
    for figure in figures:
        tiles = figure.axes[0].images
        found = tiles[0].get_array()
        expected = images[0].movedim(0, -1).numpy() if shape[0] == 3 else images[0, 0].numpy()
        np.testing.assert_array_equal(found, expected)
        left, right, low, high = tiles[0].get_extent()
        assert (right - left) / (low - high) == pytest.approx(shape[2] / shape[1])
        assert max(right - left, low - high) <= style.TILE + 1e-9
        assert shape[0] == 3 or tiles[0].get_cmap().name == "gray", "a photo must not be shown as its negative"
        assert_texts_fit(figure)
    brighter = figures[1].axes[0].images[1].get_array()
    assert brighter.max() <= 255 if shape[0] == 3 else brighter.max() == int(images[0].max()) + 9


def test_pixels_of_small_images_have_one_width(tmp_path, figures):
    images = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    grids.plot_augmented_samples(images, images, tmp_path / "a.png", title="A run")
    left, right, *_ = figures[0].axes[0].images[0].get_extent()
    assert (right - left) * style.DPI / 32 == pytest.approx(4)


@pytest.mark.parametrize(("length", "most"), [(3, 5), (5, 5), (6, 5), (200, 30)])
def test_long_names_keep_their_ends(length, most):
    name = "".join(chr(97 + position % 26) for position in range(length))
    found = style.shorten(name, most)
    assert len(found) == min(length, most)
    start, _, end = found.partition("…")
    assert name.startswith(start) and name.endswith(end)


@pytest.mark.parametrize(("channels", "ground"), [(1, "dark"), (1, "light"), (1, "none"), (3, "none")])
def test_the_explanation_shows_what_raises_the_score(tmp_path, figures, channels, ground):
    picture = torch.full((channels, 24, 40), 100, dtype=torch.uint8)
    gradient = torch.zeros(channels, 24, 40)
    gradient[0, :, :20], gradient[-1, :, 30:] = 2, -1
    top = [("a class with a name of more than forty letters", 0.9), ("b", 0.1)]
    plot_explanation(
        picture, gradient, top, {"0": torch.rand(3, 5, 7)}, tmp_path / "e.png", title="A run", ground=ground
    )
    (sheet,) = figures[0].axes
    first, second, third = (image.get_array()[12] for image in sheet.images[:3])
    assert_texts_fit(figures[0])
    if channels == 3:
        assert first.shape == (40, 3) and (second[:20] == 255).all() and (second[20:30] == 0).all()
        assert (third[:20] == 100).all() and (third[20:30] == 255).all(), "a pixel without effect is white"
        assert (second[30:] > 100).all()
        return
    more, less = (third, second) if ground == "light" else (second, third)
    assert (more[:20] == 255).all() and (more[20:] == 0).all()
    assert (less[30:] == 127.5).all() and (less[:30] == 0).all()
    assert sheet.images[0].get_cmap().name == ("gray_r" if ground == "dark" else "gray")


@pytest.mark.parametrize("count", [12, 60, 300])
def test_confusions_of_many_classes_with_long_names_are_readable(tmp_path, figures, count):
    matrix = np.eye(count, dtype=int) * 9
    matrix[0, 1] = 3
    classes = [f"{position} is a name of a class with more than fifty letters" for position in range(count)]
    confusion.plot_confusion_matrix(matrix, tmp_path / "c.png", classes=classes, title="A run")
    axes, renderer = figures[0].axes[0], figures[0].canvas.get_renderer()
    page = figures[0].bbox
    names = [tick.get_window_extent(renderer) for tick in (*axes.get_yticklabels(), *axes.get_xticklabels())]
    heading = axes.title if axes.title.get_text() else axes._left_title
    for box in (*names, heading.get_window_extent(renderer)):
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= page.x1 and box.y1 <= page.y1
    down = names[: len(names) // 2]
    assert len(down) == (count if count < 100 else 100)
    assert not any(one.overlaps(other) for one, other in itertools.pairwise(down))
    assert "(3)" in axes.get_title(loc="left")


# --- confusion matrix ------------------------------------------------------------------------------------------------


def test_confusion_matrix_colours_the_mistakes_and_writes_every_count(tmp_path, figures):
    matrix = torch.diag(torch.full((10,), 1000))
    matrix[4, 9], matrix[2, 7] = 16, 3
    path = confusion.plot_confusion_matrix(matrix, tmp_path / "c.png", classes=DIGITS, title="A run")
    assert png_size(path) == (1275, 1140)
    axes, bar = figures[0].axes
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("prediction (class)", "truth (class)")
    assert bar.get_ylabel() == "misclassified (images)"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == DIGITS
    numbers = {(text.get_position()[1], text.get_position()[0]): text.get_text() for text in axes.texts}
    assert numbers == {(i, i): "1,000" for i in range(10)} | {(4, 9): "16", (2, 7): "3"}
    (image,) = axes.images
    assert image.get_clim() == (0, 16), "the diagonal must not set the scale"
    assert image.get_array().mask.tolist() == np.eye(10, dtype=bool).tolist()
    assert axes.get_title(loc="left") == (
        "99.81 % of 10,019 images correct (grey), 19 wrong (blue)\n"
        "most often, truth → prediction:  4 → 9 (16),  2 → 7 (3)"
    )


def test_confusion_matrix_of_many_classes_has_no_numbers(tmp_path, figures):
    matrix = np.random.default_rng(0).integers(0, 5, (47, 47)) + 300 * np.eye(47, dtype=int)
    classes = [chr(ord("A") + i) for i in range(47)]
    width, height = png_size(
        confusion.plot_confusion_matrix(matrix, tmp_path / "c.png", classes=classes, title="A run")
    )
    assert width == 1500 and height == 1380
    axes = figures[0].axes[0]
    assert not axes.texts
    renderer = figures[0].canvas.get_renderer()
    boxes = [tick.get_window_extent(renderer) for tick in axes.get_xticklabels()]
    assert len(boxes) == 47
    assert not any(left.overlaps(right) for left, right in itertools.pairwise(boxes))


def test_confusion_matrix_of_a_perfect_model_and_of_a_wrong_shape(tmp_path, figures):
    confusion.plot_confusion_matrix(np.eye(10, dtype=int), tmp_path / "c.png", classes=DIGITS, title="A run")
    assert figures[0].axes[0].get_title(loc="left") == "100.00 % of 10 images correct (grey), 0 wrong (blue)"
    with pytest.raises(ValueError, match="10 × 10"):
        confusion.plot_confusion_matrix(np.eye(9), tmp_path / "c.png", classes=DIGITS, title="A run")


# --- style and files -------------------------------------------------------------------------------------------------


def test_the_callers_settings_have_no_effect_and_are_restored(tmp_path, figures):
    lines = history()
    with matplotlib.style.context("dark_background"):
        before = dict(matplotlib.rcParams)
        curves.plot_training_history(lines, tmp_path / "dark.png", title="A run")
        assert dict(matplotlib.rcParams) == before
    curves.plot_training_history(lines, tmp_path / "light.png", title="A run")
    assert (tmp_path / "dark.png").read_bytes() == (tmp_path / "light.png").read_bytes()
    assert to_hex(figures[0].get_facecolor()) == "#ffffff"


def test_threads_may_draw_at_the_same_time(tmp_path):
    before, lines = dict(matplotlib.rcParams), history(epochs=1)
    paths = [tmp_path / f"{index}.png" for index in range(4)]
    threads = [
        threading.Thread(target=curves.plot_per_batch_loss, args=(lines, path), kwargs={"title": "A run"})
        for path in paths
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({path.read_bytes() for path in paths}) == 1
    assert dict(matplotlib.rcParams) == before


def test_matplotlib_is_imported_late_and_pyplot_never():
    code = (
        "import sys; import mnist_dist.run.model_summary; assert 'matplotlib' not in sys.modules;"
        "from mnist_dist.plots import confusion, curves, images; assert 'matplotlib.pyplot' not in sys.modules"
    )
    processes.run([sys.executable, "-c", code], check=True)


def test_a_failed_write_keeps_the_old_picture_and_leaves_no_other_file(tmp_path, monkeypatch):
    path = tmp_path / "loss.png"
    curves.plot_per_batch_loss(history(), path, title="A run")
    before = path.read_bytes()

    def write_half(figure, target, **_):
        target.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(style.Figure, "savefig", write_half)
    with pytest.raises(OSError, match="disk full"):
        curves.plot_per_batch_loss(history(), path, title="A run")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["loss.png"]


def test_mathematical_signs_in_titles_and_names_are_literal(tmp_path, figures):
    classes = ["$", "_^{"]
    confusion.plot_confusion_matrix(np.ones((2, 2)), tmp_path / "c.png", classes=classes, title="$x^ at lr_max=$1")
    assert figures[0].get_suptitle() == "$x^ at lr_max=$1"


# --- timelines --------------------------------------------------------------------------------------------------------

PHASES = ("data", "forward", "backward", "waiting", "optimizer", "logging", "idle")


def draw_timelines(tmp_path, ranks, gap=0.0):
    """Rank r starts r ms late; each of two steps has 1 ms of every phase, and a gap."""
    rows, starts = {}, {}
    for rank in range(ranks):
        step = 6000 + 1000 * gap
        begin = 1e15 + 1000 * rank
        starts[f"rank {rank}"] = [begin, begin + step, begin + 2 * step]
        rows[f"rank {rank}"] = [
            (phase, begin + number * step + 1000 * index, begin + number * step + 1000 * (index + 1))
            for number in range(2)
            for index, phase in enumerate(PHASES[:-1])
        ]
    return plot_timelines(rows, starts, tmp_path / "timelines.png", phases=PHASES, title="A title")


@pytest.mark.parametrize("ranks", [1, 2, 8])
def test_timelines_lie_under_one_another_on_one_axis(ranks, tmp_path, figures):
    png_size(draw_timelines(tmp_path, ranks))
    [axes] = figures[0].axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"rank {rank}" for rank in range(ranks)]
    boxes = [path.get_extents() for bars in axes.collections for path in bars.get_paths() if len(path.vertices) > 2]
    drawn = [box for box in boxes if box.width == pytest.approx(1, abs=1e-3)]
    assert len(drawn) == ranks * 2 * 6
    for rank in range(ranks):
        spans = sorted(box.x0 for box in drawn if box.y0 < rank < box.y1)
        assert spans == pytest.approx([rank + each for each in range(12)], abs=1e-3)
    assert axes.get_ylim()[0] > axes.get_ylim()[1], "rank 0 is at the top"


def test_the_legend_of_timelines_names_what_is_drawn(tmp_path, figures):
    draw_timelines(tmp_path, 1)
    draw_timelines(tmp_path, 1, gap=2)
    names = [[text.get_text() for text in figure.legends[0].get_texts()] for figure in figures]
    assert names == [list(PHASES[:-1]), list(PHASES)]


def test_no_two_phases_of_timelines_have_one_look():
    assert len({(look["facecolor"], look.get("hatch")) for look in LOOKS}) == len(LOOKS)
    assert len({look.get("hatch") for look in LOOKS}) >= len(LOOKS) - 1
