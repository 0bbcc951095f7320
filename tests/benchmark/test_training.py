"""The measurement of training speed: every loop is measured, and the figures of a result agree with each other."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState

from mnist_dist.benchmark import __main__ as benchmark
from mnist_dist.benchmark import epochs, frameworks, training
from mnist_dist.benchmark.baselines import DDP_STEP
from mnist_dist.errors import RunError
from mnist_dist.run.checkpointing import Checkpointer
from tests import processes

NAMES = [
    "mnist_dist",
    "bare step",
    "bare step, fastest kernels",
    "plain loop, device tensors",
    "PyTorch + DataLoader",
    "Accelerate + DataLoader",
]
NAMES += ["Lightning + DataLoader"] * frameworks.HAS_LIGHTNING + ["PyTorch + DataLoader, channels last"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> dict[str, Any]:
    """Measures two batch sizes, with settings that could end a round early and settings that add a loop."""
    folder = tmp_path_factory.mktemp("sweep")
    words = ["--recipe", "debug", "--rounds", "1", "--steps", "2", "--sweep", "batch_size=8,16"]
    words += ["data.limit_train=32", "data.limit_test=16", "max_steps=3", "early_stopping.patience=1"]
    words += ["mixed_precision=bf16", "logical_shards=2", "tracking.wandb.mode=disabled"]
    words += [f"--{kind}={folder / kind}" for kind in ("json", "plot", "markdown")]
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "SHORTEST_ROUND", 0.001)
        patch.setattr(training, "best_workers", lambda setup, steps: 0)
        assert benchmark.main(words) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return {"json": json.loads((folder / "json").read_text()), "folder": folder}


def test_a_sweep_measures_every_loop_at_every_value(sweep):
    results = sweep["json"]["results"]
    assert [(each["sweep"], each["batch_size"]) for each in results] == [("batch_size=8", 8), ("batch_size=16", 16)]
    names = {*NAMES, "mnist_dist without logical shards", "PyTorch + DataLoader, fp32"}
    assert [set(each["images_per_second"]) for each in results] == [names, names]
    assert (sweep["folder"] / "plot").read_bytes().startswith(b"\x89PNG")


def test_the_figures_of_one_round_agree(sweep):
    for result in sweep["json"]["results"]:
        speeds = {name: speed["median"] for name, speed in result["images_per_second"].items()}
        for name, speed in speeds.items():
            assert result["ms_per_step"][name]["median"] * speed == pytest.approx(1000 * result["batch_size"], rel=1e-3)
            assert result["steps_per_round"][name] >= 2
            if name != "bare step":
                assert result["share_of_bare_step"][name] == pytest.approx(speed / speeds["bare step"], abs=2e-3)
            if name != "mnist_dist":
                ratio = speeds["mnist_dist"] / speed
                assert result["ratio_of_mnist_dist_to"][name] == pytest.approx(ratio, abs=2e-3)
        assert result["threads"] == torch.get_num_threads()
        assert result["capture_seconds"] is result["compile_seconds"] is None
        assert result["peak_memory_mb"] > 50
    first, second = (each["seconds_from_process_start_to_first_step"] for each in sweep["json"]["results"])
    assert first > 0 and second is None


def test_the_markdown_holds_the_command_and_the_table(sweep):
    text, [result, _] = (sweep["folder"] / "markdown").read_text(), sweep["json"]["results"]
    assert text.count("`python -m mnist_dist.benchmark --recipe debug --rounds 1") == 2
    assert text.count("### debug batch_size=") == 2
    row = next(line for line in text.splitlines() if line.startswith("| plain loop"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{result['images_per_second']['plain loop, device tensors']['median']:,.0f}"
    assert cells[5] == f"{result['share_of_bare_step']['plain loop, device tensors']:.2f}"


def test_training_that_fails_gives_a_message_and_no_figure(setup_of, tmp_path):
    setup = setup_of("optimizer.name=sgd", "optimizer.lr=1e30")
    loop, _ = training.trainer_loop(setup, tmp_path)
    with pytest.raises(RunError, match=r"optimizer\.lr") as caught:
        loop.run(5)
    assert str(tmp_path) not in str(caught.value), "the checkpoint is named, but its folder is temporary"
    loop.close()


def test_whole_epochs_include_evaluation_best_weights_and_checkpoints(tmp_path, monkeypatch):
    saved: list[str] = []
    for name in ("save", "save_best", "log_evaluation"):
        real = getattr(Checkpointer, name)

        def counted(self, *arguments, name=name, real=real):
            saved.append(name)
            real(self, *arguments)

        monkeypatch.setattr(Checkpointer, name, counted)
    monkeypatch.setattr(epochs, "best_workers", lambda setup, steps: 0)
    words = ["--recipe", "debug", "--whole-epochs", "--rounds", "2", "batch_size=16", "tracking.wandb.mode=disabled"]
    words += [
        "data.limit_train=40",
        "data.limit_test=24",
        f"--json={tmp_path / 'json'}",
        f"--markdown={tmp_path / 'md'}",
    ]
    assert benchmark.main(words) == 0
    result = json.loads((tmp_path / "json").read_text())
    loops = ["mnist_dist", "bare step + bare evaluation", "Accelerate + DataLoader + bare evaluation"]
    assert list(result["images_per_second"]) == loops and set(result["steps_per_round"].values()) == {3}
    assert list(result["share_of_bare_step"]) == [loops[0], loops[2]] and result["evaluated_images"] == 24
    assert saved.count("log_evaluation") == saved.count("save") == 3, "one warm-up epoch and two rounds"
    assert "save_best" in saved and "everything on" in (tmp_path / "md").read_text()


def test_two_processes_are_measured_as_one_group(tmp_path):
    words = ["--recipe", "debug", "--rounds", "1", "--steps", "1", "batch_size=8", "tracking.wandb.mode=disabled"]
    command = [sys.executable, "-m", "mnist_dist.benchmark", *words, "data.limit_train=16"]
    done = processes.run_ranks(2, [*command, f"--json={tmp_path / 'two.json'}"], cwd=tmp_path)
    result = json.loads(Path(tmp_path / "two.json").read_text())
    assert result["world_size"] == 2 and list(result["images_per_second"]) == [*NAMES[:2], DDP_STEP, *NAMES[2:]]
    assert ["bare step" in rank.stdout for rank in done] == [True, False], "rank 0 alone prints the table"
