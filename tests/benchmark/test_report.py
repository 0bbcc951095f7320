"""Floors and the picture of a sweep."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mnist_dist.benchmark import __main__ as benchmark
from mnist_dist.benchmark import report, sweep_plot


def test_results_are_compared_with_the_floors(tmp_path, capsys):
    speeds = {"mnist_dist": {"median": 600_000.0}}
    ratios = {"Accelerate + DataLoader": 19.9, "plain loop, device tensors": 5.5}
    trained = {"recipe": "v1", "model": "model_v1", "images_per_second": speeds, "ratio_of_mnist_dist_to": ratios}
    trained |= {"share_of_bare_step": {"mnist_dist": 0.91}}
    backends = {"ONNX Runtime (CPU), fp32": {"median": 0.1}, "captured, fp32": {"median": 2.0}}
    answered = {"recipe": "ms_ran", "model": "ms_ran", "ms_per_call": {"1": backends}}
    found = {name: measured >= floor for each in (trained, answered) for name, floor, measured in report.floors(each)}
    assert found == {
        "share of the bare step": True,
        "÷ Accelerate + DataLoader": False,
        "÷ plain loop, device tensors": True,
        "images/s": True,
        "single images/s, synchronized": False,
    }
    assert not list(report.floors(trained | {"model": "lenet5"}))
    for name, content in (("a.json", {"sweep": "x=1", "results": [trained]}), ("b.json", answered)):
        (tmp_path / name).write_text(json.dumps(content))
    assert benchmark.main(["--floors", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not met") == 2 and "500,000" in printed


@pytest.mark.parametrize(
    ("values", "scale"), [(["32", "128"], "log"), (["no", "bf16"], "linear"), (["0", "1"], "linear")]
)
def test_the_picture_of_a_sweep_has_a_line_for_every_loop(values, scale, tmp_path, monkeypatch):
    figures: list[Any] = []
    monkeypatch.setattr(sweep_plot.style, "write_png", lambda figure, path: figures.append(figure) or path)
    speed = {"median": 30.0, "min": 20.0, "max": 35.0}
    speeds = [
        dict.fromkeys("abcdefghij", speed),
        {"a": speed},
    ]  # more loops than LOOKS; the second value has one
    sweep_plot.plot_sweep(values, speeds, tmp_path / "a.png", key="batch_size", title="a")
    [axes] = figures[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == (scale, "log")
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == list("abcdefghij")
    assert [label.get_text() for label in axes.get_xticklabels()] == values
