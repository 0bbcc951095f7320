"""The benchmark: its loops do the same work, its figures fit together, and its report leaves nothing unsaid."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torchvision import transforms

from mnist_dist.benchmark import __main__ as benchmark
from mnist_dist.benchmark import baselines, frameworks, inference
from mnist_dist.benchmark import report as speed_table
from mnist_dist.benchmark import sweep_plot as speed_plot
from mnist_dist.benchmark.baselines import BenchmarkSetup, TimedLoop
from mnist_dist.cli import run_command
from mnist_dist.errors import RunError
from mnist_dist.recipe.loading import load_recipe

ROOT = Path(__file__).parents[2]
LOADERS = [frameworks.plain_loader, frameworks.accelerate_loader, frameworks.lightning_loader]
NAMES = ["mnist_dist", "bare step", "plain loop, device tensors", "PyTorch + DataLoader", "Accelerate + DataLoader"]
NAMES += ["Lightning + DataLoader"] * frameworks.HAS_LIGHTNING + ["PyTorch + DataLoader, channels last"]


@pytest.fixture(autouse=True)
def _state_of_its_own() -> Iterator[None]:
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def task_of(*overrides: str) -> BenchmarkSetup:
    words = ["schedule.name=constant", "schedule.max_lr=null", "schedule.cycle_momentum=null", "optimizer.lr=0.003"]
    return BenchmarkSetup.prepare(load_recipe("debug", "batch_size=64", *words, *overrides))


def needs(loader: Any) -> None:
    if loader is frameworks.lightning_loader:
        pytest.importorskip("lightning", reason="Lightning is not installed: pip install -e '.[frameworks]'")


# --- loops -----------------------------------------------------------------------------------------------------


def losses_of(loop: TimedLoop, monkeypatch, steps: int = 40) -> list[float]:
    """The loss of each step; the first steps are a round of their own."""
    seen: list[float] = []
    compute = BenchmarkSetup.loss

    def loss(task: BenchmarkSetup, *arguments: Any) -> torch.Tensor:
        value = compute(task, *arguments)
        seen.append(float(value.detach()))
        return value

    with monkeypatch.context() as patch:
        patch.setattr(BenchmarkSetup, "loss", loss)
        assert loop.run(4) > 0
        assert len(seen) == 4
        assert loop.run(steps - 4) > 0
        loop.close()
    assert len(seen) == steps
    return seen


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("loader", LOADERS)
def test_a_loader_peer_trains_as_plain_pytorch_does(loader, precision, monkeypatch):
    needs(loader)
    task = task_of(f"mixed_precision={precision}", "clip_grad_norm=0.5", "label_smoothing=0.1")
    found = losses_of(loader(task, 0), monkeypatch)
    assert np.mean(found[-4:]) < found[0] - 0.2, "it does not learn"
    assert found == pytest.approx(losses_of(frameworks.plain_loader(task, 0), monkeypatch), rel=1e-5)


@pytest.mark.parametrize("loop", [baselines.bare_step, baselines.tensor_loop])
def test_what_loads_no_data_trains_too(loop, monkeypatch):
    found = losses_of(loop(task_of()), monkeypatch)
    assert np.mean(found[-4:]) < found[0] - 0.2


def test_the_tensor_loop_cuts_each_batch_among_the_processes(monkeypatch):
    task, seen = task_of(), []
    images = task.dataset.train.images

    class Rank:
        device, num_processes = torch.device("cpu"), 4

        def __init__(self, rank: int):
            self.process_index = rank

    monkeypatch.setattr(baselines, "plain_step", lambda task: lambda images, labels: seen.append(images))
    for rank in range(4):
        baselines.tensor_loop(BenchmarkSetup(task.recipe, "no", task.dataset, Rank(rank))).run(
            8
        )  # an epoch of 512 images
    assert {len(batch) for batch in seen} == {16}
    flat = torch.cat(seen).flatten(1).sum(dim=1)
    assert len(flat) == len(images) == len(flat.unique()), "some image was seen twice"


@pytest.mark.parametrize("loader", [frameworks.lightning_loader])
def test_what_breaks_in_lightnings_thread_is_raised_here(loader, monkeypatch):
    needs(loader)
    loop = loader(task_of(), 0)
    monkeypatch.setattr(BenchmarkSetup, "loss", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.run(1)
    loop.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "lightning"]


def test_peers_are_free_in_their_kernels_and_leave_no_trace(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    seen: list[tuple[bool, bool]] = []

    def step() -> None:
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        task_of().peer("", step, iter(lambda: (), None)).run(1)
        step()
    finally:
        torch.use_deterministic_algorithms(False)
    assert seen == [(False, True), (True, False)]


def test_a_captured_step_trains_as_an_eager_one(gpu, monkeypatch):
    def weights(is_captured: bool) -> list[torch.Tensor]:
        made: list[torch.nn.Module] = []
        build = BenchmarkSetup.module
        with monkeypatch.context() as patch:
            patch.setattr(BenchmarkSetup, "module", lambda task: made.append(build(task)) or made[-1])
            patch.setattr(BenchmarkSetup, "is_captured", is_captured)
            # Three steps warm the capture up; capturing itself computes nothing.
            baselines.bare_step(task_of()).run(2 if is_captured else 5)
        return [parameter.detach().cpu() for parameter in made[0].parameters()]

    for captured, eager in zip(weights(True), weights(False), strict=True):
        torch.testing.assert_close(captured, eager, rtol=1e-3, atol=1e-4)


# --- measuring ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> dict[str, Any]:
    """One run of the door: two batch sizes, with what could end a round early and what brings a loop more."""
    folder = tmp_path_factory.mktemp("sweep")
    words = ["--recipe", "debug", "--rounds", "1", "--steps", "2", "--sweep", "batch_size=32,64"]
    words += ["data.limit_train=128", "data.limit_test=16", "max_steps=3", "early_stopping.patience=1"]
    words += ["mixed_precision=bf16", "logical_shards=2", *(f"--{kind}={folder / kind}" for kind in ("json", "plot"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "SHORTEST_ROUND", 0.001)
        patch.setattr(benchmark, "best_workers", lambda task, steps: 0)
        assert benchmark.main([*words, f"--markdown={folder / 'markdown'}"]) == 0
    return {"json": json.loads((folder / "json").read_text()), "folder": folder}


def test_a_sweep_measures_every_contender_at_every_value(sweep):
    results = sweep["json"]["results"]
    assert [(each["sweep"], each["batch_size"]) for each in results] == [("batch_size=32", 32), ("batch_size=64", 64)]
    names = {*NAMES, "mnist_dist without logical shards", "PyTorch + DataLoader, fp32"}
    assert [set(each["images_per_second"]) for each in results] == [names, names]
    assert (sweep["folder"] / "plot").read_bytes().startswith(b"\x89PNG")


def test_the_figures_of_one_round_fit_together(sweep):
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


def test_the_markdown_says_how_to_make_it_again(sweep):
    text, [result, _] = (sweep["folder"] / "markdown").read_text(), sweep["json"]["results"]
    assert text.count("`python -m mnist_dist.benchmark --recipe debug --rounds 1") == 2
    assert text.count("### debug batch_size=") == 2
    row = next(line for line in text.splitlines() if line.startswith("| plain loop"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1] == f"{result['images_per_second']['plain loop, device tensors']['median']:,.0f}"
    assert cells[5] == f"{result['share_of_bare_step']['plain loop, device tensors']:.2f}"


def test_training_that_breaks_off_is_a_word_and_no_figure(tmp_path):
    task = task_of("optimizer.name=sgd", "optimizer.lr=1e30")
    loop, _ = benchmark.trainer(task, tmp_path)
    with pytest.raises(RunError, match=r"try a lower optimizer.lr") as caught:
        loop.run(5)
    assert "goes on from it" not in str(caught.value)  # the folder is gone when this is read
    loop.close()


def test_two_processes_are_one_group(tmp_path):
    words = ["--recipe", "debug", "--rounds", "1", "--steps", "1", "batch_size=16", "tracking.wandb.mode=disabled"]
    launch = ["accelerate", "launch", "--quiet", "--config_file", str(ROOT / "launch" / "accelerate" / "cpu.yaml")]
    command = [*launch, "--num_processes", "2", "-m", "mnist_dist.benchmark", *words, "data.limit_train=32"]
    variables = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    json_file = tmp_path / "two.json"
    done = subprocess.run(
        [*command, f"--json={json_file}"], env=os.environ | variables | {"PATH": path}, cwd=ROOT, timeout=240,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result = json.loads(json_file.read_text())
    assert result["world_size"] == 2 and list(result["images_per_second"]) == NAMES
    assert done.stdout.count("mnist_dist ÷ it") == 1, "every process prints"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--recipe --time-to-accuracy --floors is required"),
        (["--recipe", "debug", "--sweep", "batch_size"], "expected a key and its values"),
        (["--recipe", "debug", "--sweep", "batch_size=1,,2"], "expected a key and its values"),
        (["--recipe", "debug", "--sweep", "batch_size=32,x"], "batch_size\n      expected a whole number"),
        (["--recipe", "debug", "--sweep", "epochs=1,2"], "makes no difference"),
        (["--recipe", "debug", "--sweep", "batch_size=8,16", "--inference"], "makes no difference"),
        (["--recipe", "debug", "--plot", "x.png"], "--plot draws a --sweep"),
        (["--recipe", "debug", "--inference", "--batches", "1,0"], "expected numbers of images"),
        (["--recipe", "debug", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--recipe", "debug", "--json", "/"], "is a folder"),
        (["--recipe", "debug", "--rounds", "0"], "at least 1"),
        (["--time-to-accuracy", "debug", "--seeds", "0"], "at least 1"),
        (["--time-to-accuracy", "debug", "--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--time-to-accuracy", "debug", "--sweep", "batch_size=8,16"], "neither a --sweep nor --inference"),
        (["--time-to-accuracy", "debug", "--inference"], "neither a --sweep nor --inference"),
        (["--time-to-accuracy", "debug", "--plot", "x.png"], "--plot draws a --sweep"),
        (["--recipe", "debug", "--note"], "--note is of --time-to-accuracy"),
        (["--recipe", "debug", "batch_size=513"], "but 512 training images"),
        (["--recipe", "plus_8k"], "distill.from"),
        (["--floors", "no_such.json"], "no_such.json"),
        (["--floors", str(ROOT / "setup.cfg")], "holds no figures"),
    ],
)
def test_what_cannot_be_measured_is_refused_at_once(words, message, capsys):
    assert run_command(lambda: benchmark.main(words)) == 2
    assert message in capsys.readouterr().err


# --- inference ------------------------------------------------------------------------------------------------------


def test_every_way_gives_the_same_answer():
    task = task_of()
    images = task.dataset.test.normalize(task.dataset.test.images[:3]).to(task.state.device)
    eager = inference.ways_to_answer(task, images)["eager, fp32"]()
    assert eager.shape == (3, 10)
    others = {
        name: answer() for name, answer in inference.ways_to_answer(task, images).items() if "captured" not in name
    }
    if inference.HAS_ONNX:
        session = inference.onnx_session(task)  # exported with two images
        [(name, answer)] = inference.in_onnx_runtime(session, images).items()
        others[name] = torch.from_numpy(answer()[0]).to(eager.device)
    for found in others.values():
        torch.testing.assert_close(found, eager, rtol=1e-3, atol=1e-4)


def test_inference_is_timed_at_each_batch_size(tmp_path):
    files = [f"--json={tmp_path / 'a.json'}", f"--markdown={tmp_path / 'a.md'}"]
    words = ["--recipe", "debug", "--inference", "--batches", "1,300", "--rounds", "2", "--steps", "2", *files]
    assert benchmark.main(words) == 0
    result = json.loads((tmp_path / "a.json").read_text())
    assert list(result["ms_per_call"]) == ["1", "300"]
    for ways in result["ms_per_call"].values():
        assert "eager, fp32" in ways and any("ONNX" in name for name in ways) == inference.HAS_ONNX
        assert all(0 < ms["min"] <= ms["median"] <= ms["max"] for ms in ways.values())
    eager = result["ms_per_call"]["300"]["eager, fp32"]["median"]
    assert f"| 300 | eager, fp32 | {eager:,.3f} |" in (tmp_path / "a.md").read_text()
    assert f"| {1000 * eager / 300:,.1f} |" in (tmp_path / "a.md").read_text()


def test_a_network_that_cannot_be_exported_is_timed_in_pytorch(tmp_path, monkeypatch, capsys):
    (tmp_path / "nets_of_choice.py").write_text(
        "from torch import nn\n\nclass Chooses(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.out = nn.Linear(784, 10)\n\n    def forward(self, images):\n"
        "        logits = self.out(images.flatten(1))\n        return logits if logits.sum() > 1e9 else 2 * logits\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    words = ["--inference", "--batches", "2", "--rounds", "1", "--steps", "1", f"--json={tmp_path / 'a.json'}"]
    assert benchmark.main(["--recipe", "debug", "model.name=nets_of_choice:Chooses", *words]) == 0
    assert list(json.loads((tmp_path / "a.json").read_text())["ms_per_call"]["2"]) == ["eager, fp32"]
    assert ("no ONNX Runtime" in capsys.readouterr().err) == inference.HAS_ONNX


@pytest.mark.parametrize("sigma", [3.0, 5.0])
def test_a_loader_s_elastic_warps_are_as_large_as_the_trainer_s(sigma):
    task = task_of("data.augment.elastic=1.4", f"data.augment.elastic_sigma={sigma}")
    [elastic] = [
        each
        for each in frameworks._PerImage(task.recipe, task.dataset.train)._transform.transforms
        if isinstance(each, transforms.ElasticTransform)
    ]
    torch.manual_seed(0)
    moved = torch.stack([elastic.get_params(elastic.alpha, elastic.sigma, [28, 28]) for _ in range(300)])
    pixels = moved[:, :, 10:18, 10:18] * 14  # of a grid from -1 to 1; towards the edge its noise is mirrored
    assert float(pixels.std()) == pytest.approx(1.4, rel=0.15)


# --- what is made of the figures ------------------------------------------------------------------------------------


def test_floors_are_held_beside_the_figures(tmp_path, capsys):
    speeds = {"mnist_dist": {"median": 600_000.0}}
    ratios = {"Accelerate + DataLoader": 19.9, "plain loop, device tensors": 5.5}
    trained = {"recipe": "v1", "model": "model_v1", "images_per_second": speeds, "ratio_of_mnist_dist_to": ratios}
    trained |= {"share_of_bare_step": {"mnist_dist": 0.91}}
    ways = {"ONNX Runtime (CPU), fp32": {"median": 0.1}, "captured, fp32": {"median": 2.0}}
    answered = {"recipe": "ms_ran", "model": "ms_ran", "ms_per_call": {"1": ways}}
    found = {
        what: measured >= least for each in (trained, answered) for what, least, measured in speed_table.floors(each)
    }
    assert found == {
        "share of the bare step": True,
        "÷ Accelerate + DataLoader": False,
        "÷ plain loop, device tensors": True,
        "images/s": True,
        "single images/s, each waited for": False,
    }
    assert not list(speed_table.floors(trained | {"model": "lenet5"}))
    for name, content in (("a.json", {"sweep": "x=1", "results": [trained]}), ("b.json", answered)):
        (tmp_path / name).write_text(json.dumps(content))
    assert benchmark.main(["--floors", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not met") == 2 and "500,000" in printed


@pytest.mark.parametrize(
    ("values", "scale"), [(["32", "128"], "log"), (["no", "bf16"], "linear"), (["0", "1"], "linear")]
)
def test_the_picture_has_a_line_for_every_contender(values, scale, tmp_path, monkeypatch):
    written: list[Any] = []
    monkeypatch.setattr(speed_plot.style, "write_png", lambda figure, path: written.append(figure) or path)
    speed = {"median": 30.0, "min": 20.0, "max": 35.0}
    speeds = [dict.fromkeys("abcdefghij", speed), {"a": speed}]  # more than there are looks; some missing at the second
    speed_plot.plot_sweep(values, speeds, tmp_path / "a.png", key="batch_size", title="a")
    [axes] = written[0].axes
    assert (axes.get_xscale(), axes.get_yscale()) == (scale, "log")
    assert [text.get_text() for text in written[0].legends[0].get_texts()] == list("abcdefghij")
    assert [label.get_text() for label in axes.get_xticklabels()] == values


# --- the report -----------------------------------------------------------------------------------------------------

PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
for word in "$@"; do
    case $word in *.json) case "$*" in *--floors*) ;; *) echo '{}' >"${word#--json=}" ;; esac ;; esac
done
case "$*" in *$FAILS*) exit 3 ;; esac
"""


def report(tmp_path: Path, *words: str | Path, fails: str = "nothing") -> subprocess.CompletedProcess[str]:
    """launch/gpu_report.sh with a `python` that notes how it was called, and fails where the words say so."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    variables = {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "CALLS": str(tmp_path / "calls"), "FAILS": fails}
    command = ["bash", ROOT / "launch" / "gpu_report.sh", *words]
    return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, timeout=60, cwd=tmp_path)


def test_the_report_has_every_part_and_ends_well(tmp_path):
    done = report(tmp_path, "out", "mixed_precision=bf16")
    assert done.returncode == 0, done.stdout + done.stderr
    calls = (tmp_path / "calls").read_text()
    for recipe in ("model_v1_onecycle", "model_v3_onecycle", "simple_cnn", "mnistnet", "ms_ran", "resnet152"):
        assert f"--recipe {recipe} --rounds" in calls
        assert (tmp_path / "out" / f"speed_{recipe}.json").is_file()
    for word in (
        "tests/engine/test_cuda_graph.py",
        "--time-to-accuracy configs/speed/mnist_99.yaml --seeds 30",
        "--inference",
        "doctor",
    ):
        assert word in calls
    assert calls.count("mixed_precision=bf16") == 17  # 11 recipes, 3 records and one of them again, 2 networks' answers
    assert "0 part(s) failed" in (tmp_path / "out" / "summary.txt").read_text()


def test_a_part_that_fails_stops_nothing_and_is_named(tmp_path):
    done = report(tmp_path, "--rehearse", "out", fails="--time-to-accuracy")
    assert done.returncode == 1
    summary = (tmp_path / "out" / "summary.txt").read_text()
    assert summary.count("FAILED") == 4 and "4 part(s) failed" in summary
    assert "record_mnist_99_5" in summary and "ok" in summary.split("floors")[1]
    assert "resnet152" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize("words", [["--help"], ["--rehearse", "--no"]])
def test_the_report_takes_no_flag_for_a_folder(words, tmp_path):
    done = report(tmp_path, *words)
    assert done.returncode == 2 and "launch/gpu_report.sh [--rehearse]" in done.stderr
    assert not (tmp_path / "calls").exists()


def test_the_report_overwrites_nothing(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "README.md").write_text("mine")
    done = report(tmp_path, "mine")
    assert done.returncode == 2 and "name a new folder" in done.stderr
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["README.md"]
    assert not (tmp_path / "calls").exists()
