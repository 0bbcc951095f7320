"""The same recipe on any number of CPU processes: the same losses, the same evaluation."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from torch import nn

from mnist_dist import load_run
from mnist_dist.distributed.fsdp import _callable_children
from mnist_dist.distributed.launcher import check_size
from mnist_dist.errors import RecipeError
from mnist_dist.models import build_model


def launch(world_size: int, run_dir: Path, *words: str) -> list[dict]:
    """Trains in `world_size` CPU processes of one thread each; returns the metrics."""
    command = [sys.executable, "-m", "mnist_dist.train"]
    if world_size > 1:
        command = [
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"),
            *("--num_processes", str(world_size), "--mixed_precision", "no", "--dynamo_backend", "no"),
            *("--main_process_port", "0", "-m", "mnist_dist.train"),
        ]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    command += ["--run-dir", str(run_dir), "tracking.wandb.mode=disabled", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert load_run(run_dir).summary["world_size"] == world_size
    return load_run(run_dir).metrics


def test_lenet5_gives_the_same_losses_at_every_world_size(tmp_path):
    """With SGD. Adam divides by the gradient's size: where that is nothing but rounding it makes whole steps of it."""
    words = ["--recipe", "lenet5", "data.dataset=synthetic", "batch_size=128", "max_steps=20", "log_every=1"]
    words += ["optimizer.name=sgd", "optimizer.lr=0.05"]
    alone = launch(1, tmp_path / "1", *words)
    for world_size in (2, 3, 4):  # 128 does not divide by 3
        together = launch(world_size, tmp_path / str(world_size), *words)
        deviations = relative_deviations(alone, together)
        assert len(deviations) == 20 and max(deviations) <= 1e-6, (world_size, deviations)
        assert together[-1]["eval/accuracy"] == alone[-1]["eval/accuracy"]


def run_torch(words: list[str]) -> None:
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path.cwd())}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def relative_deviations(alone: list[dict], together: list[dict]) -> list[float]:
    losses = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in (alone, together)]
    return [abs(many - one) / one for one, many in zip(*losses, strict=True)]


def test_resnet18_with_synchronized_batch_norm_gives_the_same_losses(tmp_path):
    # At the recipe's own rate its chaos makes 1e-2 of a tie within five steps; at a hundredth of it 20 steps stay near.
    words = ["--recipe", "resnet18", "data.dataset=synthetic", "batch_size=32", "max_steps=20", "log_every=1"]
    words += ["sync_batchnorm=true", "optimizer.lr=1e-5", "engine.channels_last=false", "data.limit_test=100"]
    alone, together = (launch(n, tmp_path / str(n), *words) for n in (1, 2))
    assert max(relative_deviations(alone, together)) < 1e-4


SYNCHRONIZED_GRADIENTS = """
import sys
import torch
import torch.distributed as dist
import torch.nn.functional as F
from mnist_dist import build_model
from mnist_dist.distributed.sync_batchnorm import synchronize_batch_norm

dist.init_process_group("gloo")
torch.set_default_dtype(torch.float64)
whole, mine = build_model("ms_ran", dropout=0.0), build_model("ms_ran", dropout=0.0)
mine.load_state_dict(whole.state_dict())
for tensor in [*whole.parameters()]:
    dist.broadcast(tensor.detach(), 0)
mine.load_state_dict(whole.state_dict())
mine = synchronize_batch_norm(mine, torch.device("cpu"))
generator = torch.Generator().manual_seed(0)
images, labels = torch.randn(7, 1, 28, 28, generator=generator), torch.arange(7)
F.cross_entropy(whole(images), labels, reduction="sum").backward()
rows = [slice(0, 5), slice(5, 7), slice(7, 7)][dist.get_rank()]  # uneven, and nothing at all
F.cross_entropy(mine(images[rows]), labels[rows], reduction="sum").backward()
for expected, found in zip(whole.parameters(), mine.parameters()):
    dist.all_reduce(found.grad)
    torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-9)
for expected, found in zip(whole.buffers(), mine.buffers()):
    torch.testing.assert_close(found, expected)
assert list(mine.state_dict()) == list(whole.state_dict())
mine.eval(), whole.eval()
torch.testing.assert_close(mine(images), whole(images))
"""


def test_synchronized_batch_norm_has_the_whole_batchs_gradient(tmp_path):
    script = tmp_path / "gradients.py"
    script.write_text(SYNCHRONIZED_GRADIENTS)
    run_torch(["--nproc_per_node=3", str(script)])


# Batch norm, dropout, augmentation, averaged weights, accumulation, clipping, a short last batch of three samples.
SHARDED = ["--recipe", "model_v1_onecycle", "data.dataset=synthetic", "data.limit_train=323", "data.limit_test=100"]
SHARDED += ["batch_size=64", "epochs=2", "log_every=2", "ema_decay=0.9", "clip_grad_norm=0.5", "micro_batch_size=5"]
SHARDED += ["logical_shards=4"]


def traces(run_dir: Path) -> tuple[bytes, list[dict]]:
    lines = load_run(run_dir).metrics
    return (run_dir / "last.safetensors").read_bytes(), [
        {key: value for key, value in line.items() if key != "train/images_per_second"} for line in lines
    ]


def test_logical_shards_give_the_same_bytes_at_every_world_size(tmp_path):
    for world_size in (1, 2, 4):
        launch(world_size, tmp_path / str(world_size), *SHARDED)
    assert traces(tmp_path / "1") == traces(tmp_path / "2") == traces(tmp_path / "4")

    # Of three samples in eight shards five are empty.
    for world_size in (1, 2):
        launch(world_size, tmp_path / f"eight-{world_size}", *SHARDED[:-1], "logical_shards=8")
    assert traces(tmp_path / "eight-1") == traces(tmp_path / "eight-2")

    # A run that moves to another world size in the middle of an epoch leaves no trace of it either.
    moved = tmp_path / "moved"
    launch_until(3, 2, moved, *SHARDED)
    launch(1, moved, *SHARDED)
    assert traces(moved) == traces(tmp_path / "1")


def launch_until(step: int, world_size: int, run_dir: Path, *words: str) -> None:
    """Trains to `step`, saves and is asked to stop."""
    script = run_dir.parent / "until.py"
    script.write_text(UNTIL)
    run_torch([f"--nproc_per_node={world_size}", str(script), str(step), "--run-dir", str(run_dir), *words])
    assert (run_dir / "STATUS").read_text() == "preempted\n"


UNTIL = """
import os, signal, sys
from mnist_dist.distributed import signals as interrupts
from mnist_dist.engine.train_step import TrainStep
from mnist_dist.train import main

interrupts.AGREE_SECONDS = 0  # processes ask one another at every step
update = TrainStep.__call__
def counted(self, plan, index, step):
    update(self, plan, index, step)
    if step + 1 == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGTERM)
TrainStep.__call__ = counted
assert main([*sys.argv[2:], "tracking.wandb.mode=disabled"]) == 75
"""


def test_gradients_may_travel_in_half_precision(tmp_path):
    words = ["--recipe", "lenet5", "data.dataset=synthetic", "max_steps=5", "log_every=1", "data.limit_test=100"]
    hooks = ("none", "bf16", "fp16")
    plain, *hooked = (launch(2, tmp_path / name, *words, f"ddp.comm_hook={name}") for name in hooks)
    for metrics in hooked:
        assert 0 < max(relative_deviations(plain, metrics)) < 1e-2


def test_the_summary_tells_of_processes_and_of_waiting(tmp_path):
    launch(2, tmp_path / "run", "--recipe", "debug", "epochs=1")
    summary = load_run(tmp_path / "run").summary
    assert summary["nodes"] == 1 and summary["launch"]["launcher"] == "accelerate launch"
    assert len(summary["images_per_second_per_process"]) == 2
    assert all(0 < share < 1 for share in summary["communication_share_per_process"])
    assert summary["wandb_share"] == 0  # disabled in tests


# --- the launcher's world -----------------------------------------------------------------------------------------


def refusal(command: list[str], **environment: str) -> str:
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr.partition("mnist_dist:")[0]
    assert "nothing was done" in done.stderr, done.stdout + done.stderr
    return done.stderr


def test_the_silent_single_process_is_refused_with_the_right_command():
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--cpu", "--num_processes", "2"]
    message = refusal([*launcher, "-m", "mnist_dist.train", "--recipe", "debug"])
    assert "1 process runs, but accelerate launch was given --num_processes 2" in message
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in message


def test_another_world_size_than_expected_is_refused():
    message = refusal([sys.executable, "-m", "mnist_dist.train", "--recipe", "debug", "--world-size", "4"])
    assert "1 process runs, but --world-size says 4" in message


def test_mpirun_s_count_is_not_that_of_a_torchrun_it_started(monkeypatch):
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PMI_SIZE", "1")
    two = SimpleNamespace(num_processes=2, device=torch.device("cpu"))
    with pytest.raises(RecipeError, match="mpirun's PMI_SIZE says 1"):
        check_size(two)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    check_size(two)


def test_lists_of_modules_are_sharded_child_by_child():
    """FSDP2 takes no list, which is never called."""
    network = build_model("separable_cnn")
    children = list(_callable_children(network))
    assert not any(isinstance(child, nn.ModuleList) for child in children)
    held = {id(parameter) for child in children for parameter in child.parameters()}
    assert held == {id(parameter) for parameter in network.parameters()}


def test_srun_without_a_launcher_is_refused():
    message = refusal(
        [sys.executable, "-m", "mnist_dist.train", "--recipe", "debug"], SLURM_STEP_ID="0", SLURM_NTASKS="2"
    )
    assert "1 process runs, but srun's SLURM_NTASKS says 2" in message


def test_a_cached_launch_configuration_changes_nothing_but_what_is_printed_and_recorded(tmp_path):
    home = tmp_path / "home"
    (home / "accelerate").mkdir(parents=True)
    (home / "accelerate" / "default_config.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nmixed_precision: bf16\nnum_machines: 1\n"
        "num_processes: 1\nuse_cpu: true\nmachine_rank: 0\ndebug: false\n"
        "dynamo_config: {dynamo_backend: INDUCTOR}\n"
    )
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--gradient_accumulation_steps", "4"]
    words = ["--recipe", "debug", "mixed_precision=no", "tracking.wandb.mode=disabled", "--run-dir"]
    launched, plain = tmp_path / "launched", tmp_path / "plain"
    environment = os.environ | {"HF_HOME": str(home)}
    command = [*launcher, "-m", "mnist_dist.train", *words, str(launched)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "default_config.yaml" in done.stdout
    assert load_run(launched).summary["launch"]["dynamo_backend"].lower() == "inductor"
    subprocess.run([sys.executable, "-m", "mnist_dist.train", *words, str(plain)], check=True, capture_output=True)
    assert traces(launched) == traces(plain)


def test_an_engine_that_shards_parameters_is_refused(tmp_path):
    launcher = [sys.executable, "-m", "mnist_dist.train", "--recipe", "debug"]
    message = refusal(launcher, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_MIXED_PRECISION="no")
    assert "DEEPSPEED" in message


@pytest.mark.parametrize("launchers_own", [{}, {"OMP_NUM_THREADS": "1"}])
def test_threads_are_this_process_s_share_of_the_cores_unless_somebody_chose(tmp_path, launchers_own):
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one core: nothing to share")
    environment = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"} | launchers_own
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "-m", "mnist_dist.train", "--recipe", "debug"]
    command = [*launcher, "--run-dir", str(tmp_path / "run"), "tracking.wandb.mode=disabled"]
    subprocess.run(command, env=environment, check=True, capture_output=True, timeout=120)
    found = load_run(tmp_path / "run").summary["device"]
    expected = f"{max(1, min(len(os.sched_getaffinity(0)), psutil.cpu_count(logical=False) or 1))} thread"
    assert ("1 thread)" if launchers_own else expected) in found


def test_a_last_batch_smaller_than_the_world_is_trained_on_exactly(tmp_path):
    # 130 samples in batches of 64: the last batch has two samples for three processes.
    words = ["--recipe", "lenet5", "data.dataset=synthetic", "data.limit_train=130", "batch_size=64", "log_every=1"]
    alone, together = launch(1, tmp_path / "1", *words), launch(3, tmp_path / "3", *words)
    losses = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in (alone, together)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_evaluation_is_equal_to_the_image_where_it_depends_on_the_batch(tmp_path):
    # No update worth the name: both worlds evaluate the same weights, with batch statistics of the evaluated batch.
    words = [
        "--recipe",
        "simple_cnn",
        "data.dataset=synthetic",
        "max_steps=1",
        "optimizer.lr=1e-12",
        "eval_batch_size=100",
    ]
    alone, together = (launch(n, tmp_path / str(n), *words)[-1] for n in (1, 3))
    assert together["eval/accuracy"] == alone["eval/accuracy"]
    assert together["eval/loss"] == pytest.approx(alone["eval/loss"], rel=1e-6)


def test_one_run_folder_and_one_set_of_lines(tmp_path):
    launch(2, tmp_path / "run", "--recipe", "debug", "epochs=1")
    steps = [line["step"] for line in load_run(tmp_path / "run").metrics if "eval/loss" in line]
    assert len(steps) == 1
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["world_size"] == 2
