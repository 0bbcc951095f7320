"""The variables of each launcher give one world of the right size, or are refused before anything is written."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mnist_dist import load_run
from mnist_dist.distributed.joining import join
from mnist_dist.distributed.launcher_variables import first_host, read_world
from mnist_dist.errors import RecipeError
from tests.distributed.training import WITHOUT_TRACKING
from tests.processes import ROOT, forked_python, free_port, popen, run, run_in_each

LAUNCHERS = ("ACCELERATE_", "SLURM_", "OMPI_", "PMI", "MPI_", "MV2_", "TORCHELASTIC_", "LOCAL_", "MASTER_", "GROUP_")

PROGRAM = """
import torch
from mnist_dist.distributed.launcher import launched_world
state = launched_world()
total = torch.tensor([2.0 ** state.process_index])
if state.num_processes > 1:
    torch.distributed.all_reduce(total)
print(state.num_processes, state.process_index, state.local_process_index, state.backend, int(total))
"""


WAITS = """
from mnist_dist.distributed import joining
from mnist_dist.distributed.launcher import launched_world
from mnist_dist.distributed.signals import exit_on_signals
exit_on_signals()
joining.NOTE_SECONDS = 0
launched_world()
"""


def without_launcher() -> dict[str, str]:
    """Returns the environment without the variables of any launcher and without a chosen device."""
    alone = {"RANK", "WORLD_SIZE"}
    return {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS) and name not in alone}


@pytest.fixture
def cpu_only() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator, and a world without ACCELERATE_USE_CPU uses it")


# --- launchers ----------------------------------------------------------------------------------------------------


def pytorchjob(rank: int, port: int) -> dict[str, str]:
    return {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def open_mpi(rank: int, port: int) -> dict[str, str]:
    name = "OMPI_COMM_WORLD_"
    numbers = {"RANK": str(rank), "SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_SIZE": "2"}
    return {name + key: value for key, value in numbers.items()} | {"PMIX_NAMESPACE": f"prterun-host-{port}@1"}


def mpich(rank: int, port: int) -> dict[str, str]:
    numbers = {"PMI_RANK": str(rank), "PMI_SIZE": "2", "MPI_LOCALRANKID": str(rank), "MPI_LOCALNRANKS": "2"}
    return numbers | {"MASTER_PORT": str(port)}


def srun(rank: int, port: int) -> dict[str, str]:
    numbers = {"PROCID": rank, "LOCALID": rank, "NTASKS": 2, "STEP_NUM_TASKS": 2, "STEP_ID": 0, "JOB_ID": port}
    words = {"STEP_TASKS_PER_NODE": "2", "STEP_NODELIST": "n[01-02]", "NODEID": "0", "NNODES": "1"}
    return {f"SLURM_{key}": str(value) for key, value in (numbers | words).items()}


def srun_with_pmi(rank: int, port: int) -> dict[str, str]:
    return srun(rank, port) | {"PMI_RANK": str(rank), "PMI_SIZE": "2"}


@pytest.mark.parametrize("launcher", [pytorchjob, open_mpi, mpich, srun, srun_with_pmi])
def test_two_processes_of_a_launcher_are_one_world_on_cpus(launcher, cpu_only):
    port = free_port()
    environments = [without_launcher() | launcher(rank, port) for rank in range(2)]
    done = run_in_each(environments, [sys.executable, "-c", PROGRAM], timeout=120)
    assert [each.returncode for each in done] == [0, 0], done
    local = "0" if launcher is pytorchjob else "1"  # a pod holds one process
    assert [each.stdout.strip() for each in done] == ["2 0 0 gloo 3", f"2 1 {local} gloo 3"]
    assert not any("OMP_NUM_THREADS" in each.stderr for each in done), "Accelerate's warning"


def test_two_processes_of_a_pytorchjob_train_one_run(tmp_path, cpu_only):
    words = ["--recipe", "debug", "--run-dir", tmp_path / "run", *WITHOUT_TRACKING, "epochs=1"]
    port = free_port()
    environments = [without_launcher() | pytorchjob(rank, port) for rank in range(2)]
    done = run_in_each(environments, [sys.executable, "-m", "mnist_dist.train", *words])
    assert [each.returncode for each in done] == [0, 0], done
    check_one_run(tmp_path / "run")


def test_two_processes_of_torchrun_train_one_run_on_a_cpu(tmp_path, cpu_only):
    python = forked_python()
    command = [python, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    words = [
        "-m",
        "mnist_dist.train",
        "--recipe",
        "debug",
        "--run-dir",
        tmp_path / "run",
        *WITHOUT_TRACKING,
        "epochs=1",
    ]
    environment = without_launcher() | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([*command, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    check_one_run(tmp_path / "run")


def check_one_run(folder: Path) -> None:
    found = load_run(folder)
    assert found.summary["world_size"] == 2
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len([line for line in found.metrics if "eval/loss" in line]) == 1
    assert steps == sorted(steps)


# --- reading the variables ----------------------------------------------------------------------------------------

TWO_NODES = {"SLURM_STEP_ID": "3", "SLURM_JOB_ID": "77", "SLURM_PROCID": "2", "SLURM_NTASKS": "3", "SLURM_LOCALID": "0"}
TWO_NODES |= {"SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_NODEID": "1", "SLURM_STEP_NODELIST": "a[07-08,11],b1"}


@pytest.mark.parametrize(
    "variables",
    [
        {},
        # A batch script, a shell of `salloc`, and an interactive step of a larger allocation.
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},
        {"SLURM_STEP_ID": "4294967290", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"},
        {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"},
        {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "1"},
        {"MASTER_ADDR": "a", "MASTER_PORT": "1"},
        {"WORLD_SIZE": "1"},
        {"RANK": "0", "WORLD_SIZE": "1"},
        {"RANK": "", "WORLD_SIZE": " ", "LOCAL_RANK": "-1"},
    ],
    ids=str,
)
def test_a_process_without_others_is_a_world_of_one(variables):
    assert read_world(variables) == {}


def test_a_local_rank_in_a_world_of_one_gets_an_address():
    world = read_world({"LOCAL_RANK": "0", "WORLD_SIZE": "1"})
    assert (world["RANK"], world["MASTER_ADDR"]) == ("0", "127.0.0.1") and int(world["MASTER_PORT"]) > 0


def test_complete_variables_of_torch_are_used_even_if_mpirun_or_srun_started_torchrun():
    torchrun = {"RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}
    torchrun |= {"MASTER_ADDR": "head", "MASTER_PORT": "29400"}
    assert read_world(TWO_NODES | open_mpi(1, 1) | torchrun) == torchrun


def test_the_ranks_of_an_srun_step_on_two_nodes_use_the_first_node_s_address():
    world = read_world(TWO_NODES)
    assert 20000 <= int(world.pop("MASTER_PORT")) < 30000
    expected = {"RANK": "2", "WORLD_SIZE": "3", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "a07"}
    assert world == expected
    assert read_world(TWO_NODES | {"MASTER_ADDR": "other", "WORLD_SIZE": "3"})["MASTER_ADDR"] == "other"


@pytest.mark.parametrize(
    ("hosts", "first"),
    [("", ""), ("a", "a"), ("a,b", "a"), ("n[3-5],m", "n3"), ("r[01]-x,b", "r01-x"), ("n-[7,9]", "n-7")],
)
def test_the_first_host_of_a_slurm_host_list(hosts, first):
    assert first_host(hosts) == first


ADDRESS = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
TWO = {"RANK": "0", "WORLD_SIZE": "2"} | ADDRESS


@pytest.mark.parametrize(
    ("variables", "problems"),
    [
        ({"LOCAL_RANK": "0"}, [("RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT", "world")]),
        ({"RANK": "1"}, [("WORLD_SIZE, MASTER_ADDR, MASTER_PORT", "world")]),
        ({"WORLD_SIZE": "2"} | ADDRESS, [("RANK", "world")]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, [("MASTER_ADDR, MASTER_PORT", "world")]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "a"}, [("MASTER_PORT", "world")]),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "1"}, [("MASTER_ADDR", "world")]),
        (TWO | {"RANK": ""}, [("RANK", "world")]),
        (TWO | {"RANK": "2"}, [("RANK", "range")]),
        (TWO | {"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "1"}, [("LOCAL_RANK", "range")]),
        (TWO | {"WORLD_SIZE": "0"}, [("WORLD_SIZE", "range")]),
        (TWO | {"MASTER_PORT": "70000"}, [("MASTER_PORT", "range")]),
        (TWO | {"RANK": "first", "WORLD_SIZE": "2.0"}, [("RANK", "type"), ("WORLD_SIZE", "type")]),
        (TWO | {"MASTER_PORT": "http"}, [("MASTER_PORT", "type")]),
        (TWO | {"LOCAL_RANK": "x"}, [("LOCAL_RANK", "type")]),
        (mpich(2, 1), [("PMI_RANK", "range"), ("MPI_LOCALRANKID", "range")]),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, [("RANK, MASTER_ADDR", "world")]),
        (open_mpi(0, 1) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, [("MASTER_ADDR", "world")]),  # two machines
        ({"PMI_RANK": "0", "PMI_SIZE": "two"}, [("PMI_SIZE", "type")]),
        (srun(0, 1) | {"WORLD_SIZE": "8"}, [("WORLD_SIZE", "world")]),
        ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "2"}, [("RANK, MASTER_ADDR", "world")]),
    ],
    ids=str,
)
def test_a_world_that_cannot_be_joined_is_refused(variables, problems, refused):
    assert refused(lambda: read_world(variables)) == problems


def test_the_refusal_lists_no_derived_value_as_set():
    with pytest.raises(RecipeError) as error:
        read_world(open_mpi(0, 1) | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"})
    values = re.findall(r"(\w+)=", error.value.problems[0].message)
    assert values and all(name.startswith("OMPI_COMM_WORLD_") for name in values)


@pytest.mark.parametrize(
    ("variables", "names"),
    [
        ({"LOCAL_RANK": "0"}, ["LOCAL_RANK=0", "WORLD_SIZE"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["WORLD_SIZE=2", "MASTER_ADDR"]),
        ({"WORLD_SIZE": "two"}, ["WORLD_SIZE", "'two'"]),
    ],
    ids=str,
)
def test_the_refusal_names_the_variables_and_nothing_is_written(variables, names, tmp_path):
    command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "debug", "--run-dir", tmp_path / "run"]
    done = run(command, env=without_launcher() | variables, cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(name in done.stderr for name in names), done.stderr
    assert not list(tmp_path.iterdir())


def test_a_port_that_is_taken_is_refused(tmp_path, cpu_only):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        command = [sys.executable, "-m", "mnist_dist.train", "--recipe", "debug", "--run-dir", tmp_path / "run"]
        environment = without_launcher() | pytorchjob(0, listener.getsockname()[1])
        done = run(command, env=environment, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and "MASTER_ADDR" in done.stderr, done.stderr
    assert not list(tmp_path.iterdir())


# --- a process that does not start --------------------------------------------------------------------------------


@pytest.mark.parametrize(("rank", "missing"), [(0, "rank 1 of 2"), (1, "rank 0 at 127.0.0.1")])
def test_a_world_whose_other_process_does_not_start_is_refused_by_name(rank, missing, monkeypatch):
    monkeypatch.setattr("mnist_dist.distributed.joining.JOIN_SECONDS", 0.5)
    with pytest.raises(TimeoutError, match=missing):
        join(pytorchjob(rank, free_port()))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_that_waits_for_the_others_can_be_stopped(rank, cpu_only):
    command = [sys.executable, "-c", WAITS]
    process = popen(command, env=without_launcher() | pytorchjob(rank, free_port()), stderr=subprocess.PIPE)
    assert "waits for rank" in process.stderr.readline()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=60) == 75
