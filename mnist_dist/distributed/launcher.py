"""Joins the world that the launcher started, and checks the launcher's options and settings.

Launchers fail silently: `accelerate launch --cpu --num_processes 2` starts one process, a forgotten default_config.yaml
changes the precision, a process on a machine with 64 cores gets one thread. This module detects such settings.
"""

from __future__ import annotations

import argparse
import atexit
import itertools
import os
import sys
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import parse_flag_from_env, patch_environment

from mnist_dist.distributed.joining import join
from mnist_dist.distributed.launcher_variables import ADDRESS, TORCH, read_world, step_size
from mnist_dist.distributed.world_size_option import as_range, describe_world_size, is_elastic
from mnist_dist.errors import Problem, RecipeError, RunError


def launched_world() -> PartialState:
    """Returns the state of the launcher's world: rank, number of processes, device. The first call joins the world.

    Processes on CPUs communicate by gloo. A world of one process has no process group.

    Raises:
        RecipeError: the launcher's variables describe a world that this process cannot join.
        RunError: the same, if the launcher then starts the processes again.
    """
    if PartialState._shared_state:
        return PartialState()
    world = read_world(os.environ)
    size = int(world.get("WORLD_SIZE", 1))
    for name in (*TORCH, *ADDRESS):
        if not os.environ.get(name, "0").strip():
            del os.environ[name]  # Accelerate and torch read an empty variable as a number
    os.environ.update(world)
    if size > 1 and sys.platform == "win32":
        message = f"{size} processes: the trainer supports one process on Windows; use Linux or WSL 2 for more"
        raise RecipeError([Problem("the launcher", "WORLD_SIZE", message, "unsupported")])
    # Accelerator reads ACCELERATE_USE_CPU, PartialState does not: without it, two CPU processes would be two worlds.
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU") or (size > 1 and not _has_communicating_accelerator())
    backend = {"backend": "gloo"} if cpu and size > 1 else {}
    try:
        # Without this variable Accelerate would choose a number of threads and warn; `share_cores` chooses it.
        with patch_environment(OMP_NUM_THREADS=torch.get_num_threads()):
            state = PartialState(cpu=cpu, **backend, **(join(world) if size > 1 else {}))
    except (RuntimeError, ValueError, OSError) as error:
        PartialState._reset_state()
        if size == 1:
            raise
        problem = _unjoined(world, f"{type(error).__name__}: {error}")
        if is_elastic():  # a machine was lost while the processes started; torchrun starts the others again
            raise RunError(problem.message) from error
        raise RecipeError([problem]) from error
    if size > 1 and state.num_processes != size:
        raise RecipeError([_unjoined(world, f"{state.device.type} processes found no way to communicate")])
    return state


def _has_communicating_accelerator() -> bool:
    """Returns whether processes can communicate on this machine's accelerator; those of a Mac use its CPU."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return found is not None and found.type != "mps"


def end_process(code: int) -> NoReturn:
    """Ends this process with an exit code, after the exit handlers.

    A process of several on CPUs does not free its objects. While Python frees them, a thread of gloo may still need
    Python, and then aborts the process ("terminate called without an active exception") although its run is done.
    """
    if PartialState._shared_state and PartialState().num_processes > 1:
        if PartialState().device.type != "cpu":
            PartialState().destroy_process_group()  # NCCL waits for the work on the GPU
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _unjoined(world: dict[str, str], cause: str) -> Problem:
    """Returns the problem of a process that cannot join its world."""
    address = f"{world['MASTER_ADDR']}:{world['MASTER_PORT']}"
    message = f"rank {world['RANK']} cannot join the world of {world['WORLD_SIZE']} processes at {address}\n{cause}\n"
    message += "check that rank 0 runs on that host, that the port is free there, and that no firewall blocks it"
    return Problem("the launcher", "MASTER_ADDR", message, "world")


# --- the number of processes --------------------------------------------------------------------------------------


def check_size(state: PartialState, expected: int | range | None = None) -> None:
    """Compares the number of processes with the expected number.

    Args:
        expected: the accepted numbers of processes; None for the number in the launcher's options or variables, if it
            is known.

    Raises:
        RecipeError: the numbers differ. The message names a command that starts the expected number.
    """
    requested, source = (expected, "--world-size") if expected is not None else _requested_size()
    if requested is None or state.num_processes in as_range(requested):
        return
    accepted = as_range(requested)
    running = "1 process is" if state.num_processes == 1 else f"{state.num_processes} processes are"
    message = (
        f"{running} running, but {source} is {describe_world_size(accepted)}\n{_start_hint(accepted, state.device)}"
    )
    raise RecipeError([Problem("the launcher", source, message, "world")])


def _start_hint(accepted: range, device: torch.device) -> str:
    """Returns the command that starts an accepted number of processes on this kind of device."""
    if len(accepted) > 1:
        return "start them with launch/elastic.sh"
    processes = accepted[0]
    if device.type == "cpu" and processes > 1:
        command = (
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {processes} --num_machines 1 "
            "--mixed_precision no --dynamo_backend no -m mnist_dist.train …"
        )
        return f"`accelerate launch --cpu` always starts 1 process; start {processes} CPU processes with:\n{command}"
    if processes > 1:
        return f"start them with: accelerate launch --multi_gpu --num_processes {processes} -m mnist_dist.train …"
    return "start it with: python -m mnist_dist.train …"


def _requested_size() -> tuple[int | None, str]:
    """Returns the number of processes in the launcher's options or variables, and the name of the option or variable.

    The number is None if it is not known.
    """
    words = launcher_arguments()
    for word, following in itertools.pairwise([*words, ""]):
        name, _, value = word.partition("=")
        number = value or following
        if name in ("--num_processes", "--num-processes") and number.isdigit() and int(number) > 0:
            return int(number), name
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        # If mpirun or srun starts torchrun, these variables give the number of torchrun processes, not of ranks.
        if os.environ.get(variable, "").isdecimal() and "TORCHELASTIC_RUN_ID" not in os.environ:
            return int(os.environ[variable]), variable
    step = step_size(os.environ)
    if step and "WORLD_SIZE" not in os.environ and "ACCELERATE_MIXED_PRECISION" not in os.environ:
        return step
    return None, ""


# --- the launcher's own settings ----------------------------------------------------------------------------------


def launched_by_accelerate() -> bool:
    """Returns whether `accelerate launch` started this process."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def launcher_arguments() -> list[str]:
    """Returns the arguments of the parent `accelerate launch` before this package's module.

    Returns [] if accelerate launch did not start this process.
    """
    if not launched_by_accelerate():
        return []
    words = read_proc(os.getppid(), "cmdline")
    end = next((index for index, word in enumerate(words) if word.startswith("mnist_dist")), len(words))
    return words[:end]


def read_proc(pid: int, file: str) -> list[str]:
    """Returns the entries of /proc/PID/`file` ("cmdline" or "environ"); [] if it does not exist or is not readable."""
    try:
        return Path(f"/proc/{pid}/{file}").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def launch_settings() -> dict[str, str]:
    """Returns the launcher's name, configuration file and ACCELERATE_* variables, for the console and summary.json."""
    settings = {"launcher": "python"}
    if launched_by_accelerate():
        settings["launcher"] = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        settings["launcher"] = "torchrun"
    elif "OMPI_COMM_WORLD_SIZE" in os.environ or "MPI_LOCALNRANKS" in os.environ:
        settings["launcher"] = "mpirun"
    elif step_size(os.environ):
        settings["launcher"] = "srun"
    words = launcher_arguments()
    files = [after for word, after in itertools.pairwise(words) if word in ("--config_file", "--config-file")]
    if words and not files and Path(default_config_file).is_file():
        files = [default_config_file]
    if files:
        settings["config_file"] = files[0]
    for name in sorted(os.environ):
        if name.startswith("ACCELERATE_") and os.environ[name].lower() not in ("no", "false", "0", "", "default"):
            settings[name.removeprefix("ACCELERATE_").lower()] = os.environ[name]
    return settings


# --- engines ------------------------------------------------------------------------------------------------------


def asks_for_fsdp() -> bool:
    """Returns whether the launcher requests FSDP."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def fsdp_settings() -> dict[str, Any]:
    """Returns the arguments of `shard_parameters` that the launcher's FSDP configuration sets."""
    return {
        "smallest": int(os.environ.get("FSDP_MIN_NUM_PARAMS") or 1_000_000),
        "reshard": parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True),
    }


UNSUPPORTED_ENGINES = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}
"""Variable of `accelerate launch` -> engine that it selects."""


def check_engine() -> None:
    """Refuses a training engine that this trainer does not support.

    Raises:
        RecipeError: an option or a configuration file of the launcher requests DeepSpeed, Megatron-LM, FSDP1 or the
            offloading of FSDP.
    """
    found = {name: engine for name, engine in UNSUPPORTED_ENGINES.items() if parse_flag_from_env(name)}
    if asks_for_fsdp():
        if os.environ.get("FSDP_VERSION") != "2":
            found["FSDP_VERSION"] = "FSDP version 1"
        if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
            found["FSDP_OFFLOAD_PARAMS"] = "FSDP with offloading of parameters"
    source = launch_settings().get("config_file", "the launcher's command line")
    message = "{source} requests {engine}, which is not supported\nuse launch/accelerate/multi_gpu.yaml or fsdp2.yaml"
    problems = [
        Problem("the launcher", name, message.format(source=source, engine=engine), "unsupported")
        for name, engine in found.items()
    ]
    if problems:
        raise RecipeError(problems)


def starts_trainer(command: list[str]) -> bool:
    """Returns whether a command starts this trainer and no other program. Its launcher's own parser decides."""
    if command[:1] == [sys.executable]:
        return command[1:3] == ["-m", "mnist_dist.train"]
    if command[:2] == ["accelerate", "launch"]:
        from accelerate.commands.launch import launch_command_parser as launcher

        words = command[2:]
    elif command[:1] == ["torchrun"]:
        from torch.distributed.run import get_args_parser as launcher

        words = command[1:]
    else:
        return False
    try:
        with redirect_stderr(None):  # argparse prints its own message
            found = launcher().parse_args(words)
    except (SystemExit, argparse.ArgumentError):
        return False
    return bool(found.module and found.training_script == "mnist_dist.train" and not found.no_python)
