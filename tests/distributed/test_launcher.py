"""The processes and settings of a launcher are checked against its options and variables."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from mnist_dist import load_run
from mnist_dist.distributed.launcher import check_engine, check_size
from mnist_dist.errors import RecipeError
from mnist_dist.train import main
from tests.distributed.training import WITHOUT_TRACKING, train_in_world, weights_and_metrics
from tests.processes import ROOT

ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch"]
LAUNCHER_VARIABLES = [
    *("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID", "WORLD_SIZE"),
    *("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_ID", "SLURM_NTASKS"),
]


def accelerate_launch(*words: object, **variables: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [*ACCELERATE, *map(str, words)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def test_accelerate_launch_that_starts_one_cpu_process_is_refused_with_a_command_that_starts_two():
    words = ["--quiet", "--cpu", "--num_processes", "2", "-m", "mnist_dist.train", "--recipe", "debug"]
    done = accelerate_launch(*words)
    message = done.stderr.partition("Traceback")[0]  # of `accelerate launch` itself, which raises for an exit code
    assert done.returncode != 0
    assert "the launcher: --num_processes" in message
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2" in message


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("variables", "processes", "key"),
    [
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, 1, "SLURM_NTASKS"),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, 2, None),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2", "WORLD_SIZE": "1"}, 1, None),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, "OMPI_COMM_WORLD_SIZE"),
        ({"PMI_SIZE": "1"}, 2, "PMI_SIZE"),
        # mpirun started torchrun, which started the processes: the variable counts the torchruns.
        ({"PMI_SIZE": "1", "TORCHELASTIC_RUN_ID": "none"}, 2, None),
        ({}, 2, None),
    ],
)
def test_the_number_of_processes_is_compared_with_the_launcher_s_variables(
    variables, processes, key, monkeypatch, no_launcher, refused
):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    state = SimpleNamespace(num_processes=processes, device=torch.device("cpu"))
    if key is None:
        check_size(state)
    else:
        assert refused(lambda: check_size(state)) == [(key, "world")]


@pytest.mark.parametrize(
    ("device", "processes", "expected", "command"),
    [
        ("cpu", 1, 4, "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 4 --num_machines 1 "),
        ("cuda", 1, 8, "accelerate launch --multi_gpu --num_processes 8 -m mnist_dist.train"),
        ("cuda", 2, 1, "python -m mnist_dist.train"),
    ],
)
def test_the_message_names_the_command_for_the_device(device, processes, expected, command):
    with pytest.raises(RecipeError) as found:
        check_size(SimpleNamespace(num_processes=processes, device=torch.device(device)), expected)
    assert command in str(found.value)


def test_train_refuses_another_world_size_than_expected(tmp_path, no_launcher, refused):
    words = ["--recipe", "debug", "--run-dir", str(tmp_path / "run"), "--world-size", "4"]
    assert refused(lambda: main(words)) == [("--world-size", "world")]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("variables", "keys"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, ["ACCELERATE_USE_DEEPSPEED"]),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, ["ACCELERATE_USE_MEGATRON_LM"]),
        ({"ACCELERATE_USE_FSDP": "true"}, ["FSDP_VERSION"]),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_OFFLOAD_PARAMS": "true"},
            ["FSDP_VERSION", "FSDP_OFFLOAD_PARAMS"],
        ),
    ],
)
def test_an_unsupported_engine_is_refused(variables, keys, monkeypatch, refused):
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert refused(check_engine) == [(key, "unsupported") for key in keys]


CACHED_CONFIGURATION = """\
compute_environment: LOCAL_MACHINE
distributed_type: 'NO'
mixed_precision: bf16
num_machines: 1
num_processes: 1
use_cpu: true
machine_rank: 0
debug: false
dynamo_config: {dynamo_backend: INDUCTOR}
"""


def test_a_cached_configuration_of_accelerate_is_printed_and_recorded_and_changes_nothing_else(tmp_path):
    cache = tmp_path / "home" / "accelerate" / "default_config.yaml"
    cache.parent.mkdir(parents=True)
    cache.write_text(CACHED_CONFIGURATION)
    words = ["--recipe", "debug", "mixed_precision=no"]
    launch = ["--gradient_accumulation_steps", "4", "-m", "mnist_dist.train", "--run-dir", tmp_path / "launched"]
    done = accelerate_launch(*launch, *WITHOUT_TRACKING, *words, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert "default_config.yaml" in done.stdout
    launch_settings = load_run(tmp_path / "launched").summary["launch"]
    assert launch_settings["launcher"] == "accelerate launch"
    assert launch_settings["dynamo_backend"].lower() == "inductor"
    assert launch_settings["config_file"] == str(cache)
    train_in_world(1, tmp_path / "plain", *words)
    assert weights_and_metrics(tmp_path / "launched") == weights_and_metrics(tmp_path / "plain")
