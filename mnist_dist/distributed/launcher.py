"""The world that a launcher made: its processes, devices and threads, looked at rather than believed.

Launchers fail quietly: `accelerate launch --cpu --num_processes 2` starts one process, a forgotten default_config.yaml
changes the precision, one thread is set where the machine has sixty-four. What they did is checked, printed, recorded.
"""

from __future__ import annotations

import itertools
import os
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.commands.config.config_args import default_config_file
from accelerate.utils import parse_flag_from_env

from mnist_dist.errors import Problem, RecipeError


def launched_world() -> PartialState:
    """The processes and the device that the launcher gave; starts the process group at the first call."""
    # Accelerator reads this variable itself, PartialState alone does not: two CPU processes would be two worlds of one.
    # Apple's GPUs know no float64, in which the meter sums: a Mac trains on its CPU.
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or torch.backends.mps.is_available())


def check_size(state: PartialState, expected: int | None = None) -> None:
    """Compares the number of processes with `expected`, or with what the launcher was asked for where that is known.

    Raises:
        RecipeError: they differ; the message names the command that starts as many.
    """
    asked, who = (expected, "--world-size says") if expected is not None else _launcher_was_asked_for()
    if asked is None or asked == state.num_processes:
        return
    running = "1 process runs" if state.num_processes == 1 else f"{state.num_processes} processes run"
    found = f"{running}, but {who} {asked}"
    if state.device.type == "cpu" and asked > 1:
        right = (
            f"ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes {asked} --num_machines 1 "
            "--mixed_precision no --dynamo_backend no -m mnist_dist.train …"
        )
        hint = (
            f"on CPUs, `accelerate launch --cpu` starts one process whatever it is told; this starts {asked}:\n{right}"
        )
    elif asked > 1:
        hint = f"start them with: accelerate launch --multi_gpu --num_processes {asked} -m mnist_dist.train …"
    else:
        hint = "start one with: python -m mnist_dist.train …"
    raise RecipeError([Problem("the launcher", "", f"{found}\n{hint}")])


def _launcher_was_asked_for() -> tuple[int | None, str]:
    """How many processes a launcher was told to start, and who says so; None where it cannot be known."""
    words = launcher_words()
    for word, following in itertools.pairwise([*words, ""]):
        name, _, value = word.partition("=")
        number = value or following
        if name in ("--num_processes", "--num-processes") and number.isdigit() and int(number) > 0:
            return int(number), f"accelerate launch was given {name}"
    for variable in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        # Of torchrun under srun or mpirun they count the torchruns.
        if variable in os.environ and "TORCHELASTIC_RUN_ID" not in os.environ:
            return int(os.environ[variable]), f"mpirun's {variable} says"
    if (
        "SLURM_STEP_ID" in os.environ
        and "WORLD_SIZE" not in os.environ
        and "ACCELERATE_MIXED_PRECISION" not in os.environ
    ):
        return int(os.environ.get("SLURM_NTASKS", "1")), "srun's SLURM_NTASKS says"
    return None, ""


def launcher_words() -> list[str]:
    """The command line of `accelerate launch`, our parent process, up to our own module; [] without it."""
    if not launched_by_accelerate():
        return []
    words = read_proc(os.getppid(), "cmdline")
    ours = next((place for place, word in enumerate(words) if word.startswith("mnist_dist")), len(words))
    return words[:ours]


def launched_by_accelerate() -> bool:
    return "ACCELERATE_MIXED_PRECISION" in os.environ


def read_proc(pid: int, what: str) -> list[str]:
    """A process's `cmdline` or `environ` as Linux shows it; [] elsewhere, or where it is not ours to read."""
    try:
        return Path(f"/proc/{pid}/{what}").read_text(encoding="utf-8", errors="replace").split("\0")
    except OSError:
        return []


def launch_settings() -> dict[str, str]:
    """What the launcher brought into the run, to be printed and recorded: itself, its variables, a cached file."""
    settings = {"launcher": "python"}
    if launched_by_accelerate():
        settings["launcher"] = "accelerate launch"
    elif "TORCHELASTIC_RUN_ID" in os.environ:
        settings["launcher"] = "torchrun"
    elif "SLURM_STEP_ID" in os.environ:
        settings["launcher"] = "srun"
    words = launcher_words()
    files = [after for word, after in itertools.pairwise(words) if word in ("--config_file", "--config-file")]
    if words and not files and Path(default_config_file).is_file():
        files = [default_config_file]
    if files:
        settings["config_file"] = files[0]
    for name in sorted(os.environ):
        if name.startswith("ACCELERATE_") and os.environ[name].lower() not in ("no", "false", "0", "", "default"):
            settings[name.removeprefix("ACCELERATE_").lower()] = os.environ[name]
    return settings


FOREIGN_ENGINES = ("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_MEGATRON_LM")


def asks_for_fsdp() -> bool:
    """Whether the launcher asks for sharded parameters."""
    return parse_flag_from_env("ACCELERATE_USE_FSDP")


def fsdp_settings() -> dict[str, Any]:
    """What of the launcher's FSDP configuration `shard_parameters` takes."""
    return {
        "smallest": int(os.environ.get("FSDP_MIN_NUM_PARAMS") or 1_000_000),
        "reshard": parse_flag_from_env("FSDP_RESHARD_AFTER_FORWARD", default=True),
    }


def check_engine() -> None:
    """Refuses engines that this trainer does not know.

    Raises:
        RecipeError: a flag or a configuration file of the launcher asks for one.
    """
    asked = [name.removeprefix("ACCELERATE_USE_") for name in FOREIGN_ENGINES if parse_flag_from_env(name)]
    if asks_for_fsdp():
        if os.environ.get("FSDP_VERSION") != "2":
            asked.append("FSDP's first version")
        if parse_flag_from_env("FSDP_OFFLOAD_PARAMS"):
            asked.append("FSDP's offloading to the host")
    if asked:
        source = launch_settings().get("config_file", "its command line")
        known = "use launch/accelerate/multi_gpu.yaml or fsdp2.yaml"
        what = f"{source} asks for {', '.join(asked)}, which this trainer does not know; {known}"
        raise RecipeError([Problem("the launcher", "", what)])
