"""Reads from the launcher's environment variables which world it started: rank, number of processes and address.

torchrun, `accelerate launch` and a PyTorchJob set the variables that torch reads: RANK, WORLD_SIZE, MASTER_ADDR and
MASTER_PORT. mpirun and srun set other variables, from which this module derives torch's.
"""

from __future__ import annotations

import re
import socket
import zlib
from collections.abc import Iterator, Mapping

from mnist_dist.errors import Kind, Problem, RecipeError

TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
ADDRESS = ("MASTER_ADDR", "MASTER_PORT")

MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
"""The names that Open MPI, MVAPICH, and MPICH with its derivatives use for the four variables of `TORCH`."""

PORTS = range(20000, 30000)
"""The port is one of these if the launcher names none. Linux gives higher ports to outgoing connections."""

DEFAULT_PORT = 29500
"""Torch's default port, used if neither the port nor the number of the job is known."""

DERIVED = "derived"
"""Used instead of a variable's name for a value that this module derives."""

Variables = dict[str, tuple[str, str]]
"""Torch's name of a variable -> (the launcher's name of it, its value)."""


def read_world(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns torch's variables of the world that the launcher describes; {} for one process without a launcher.

    Torch's variables are used if RANK and WORLD_SIZE are set, else those of mpirun, else those of an srun step. A shell
    inside a SLURM allocation is not a step: it is a world of one process.

    Raises:
        RecipeError: the variables are incomplete or wrong, so this process cannot join its world.
    """
    found = {name: (name, value) for name in (*TORCH, *ADDRESS) if (value := _value(environ, name))}
    complete = "RANK" in found and "WORLD_SIZE" in found
    launcher = {} if complete else _mpi(environ) or _slurm_step(environ)
    _check_agreement(found, launcher)
    found = found | launcher
    if not found.keys() & set(TORCH):
        return {}  # MASTER_ADDR and MASTER_PORT alone do not describe a world
    if problems := list(_check_numbers(found)):
        raise RecipeError(problems)
    if "WORLD_SIZE" in found and int(found["WORLD_SIZE"][1]) == 1:
        return _world_of_one(environ)
    if launcher:
        found = _derive_address(environ, found)
    if missing := [name for name in ("RANK", "WORLD_SIZE", *ADDRESS) if name not in found]:
        raise RecipeError([_half_set(found, missing)])
    world = {name: value for name, (_, value) in found.items()}
    world.setdefault("LOCAL_WORLD_SIZE", world["WORLD_SIZE"] if "LOCAL_RANK" in world else "1")
    world.setdefault("LOCAL_RANK", "0")
    return world


def step_size(environ: Mapping[str, str]) -> tuple[int, str] | None:
    """Returns the number of processes of the srun step and the variable that gives it; None outside a step."""
    name = "SLURM_STEP_NUM_TASKS" if _value(environ, "SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    value = _value(environ, name)
    return (int(value) if value.isdecimal() else 1, name) if _in_step(environ) else None


# --- the launchers' variables -------------------------------------------------------------------------------------


def _value(environ: Mapping[str, str], name: str) -> str:
    """Returns the value of a variable; "" if it is unset, empty or -1, with which older launchers mean "none"."""
    value = environ.get(name, "").strip()
    return "" if value == "-1" else value


def _rename(environ: Mapping[str, str], names: tuple[str, ...]) -> Variables:
    """Returns the values of the variables `names` under torch's names; variables without a value are left out."""
    return {
        torch_name: (name, value)
        for torch_name, name in zip(TORCH, names, strict=True)
        if (value := _value(environ, name))
    }


def _mpi(environ: Mapping[str, str]) -> Variables:
    """Returns the variables of mpirun; {} if mpirun did not start this process."""
    for names in MPI:
        if names[0] in environ or names[1] in environ:
            # srun with PMI sets PMI_RANK and PMI_SIZE; the local rank and size are in SLURM's variables.
            return _slurm_step(environ) | _rename(environ, names) if names[0] == "PMI_RANK" else _rename(environ, names)
    return {}


def _in_step(environ: Mapping[str, str]) -> bool:
    """Returns whether an srun step started this process; a batch script and an interactive shell are not such steps."""
    step = _value(environ, "SLURM_STEP_ID") or _value(environ, "SLURM_STEPID")
    return step.isdecimal() and int(step) < 0xFFFFFFF0  # SLURM numbers batch scripts and shells from 0xFFFFFFF0


def _slurm_step(environ: Mapping[str, str]) -> Variables:
    """Returns the variables of srun; {} outside a step."""
    if not _in_step(environ):
        return {}
    size = "SLURM_STEP_NUM_TASKS" if _value(environ, "SLURM_STEP_NUM_TASKS") else "SLURM_NTASKS"
    found = _rename(environ, ("SLURM_PROCID", size, "SLURM_LOCALID", ""))
    counts = _value(environ, "SLURM_STEP_TASKS_PER_NODE") or _value(environ, "SLURM_TASKS_PER_NODE")
    tasks = [int(n) for n, times in re.findall(r"(\d+)(?:\(x(\d+)\))?", counts) for _ in range(int(times or 1))]
    node = _value(environ, "SLURM_NODEID") or "0"
    if node.isdecimal() and int(node) < len(tasks):
        found["LOCAL_WORLD_SIZE"] = ("SLURM_STEP_TASKS_PER_NODE", str(tasks[int(node)]))
    return found


# --- the address --------------------------------------------------------------------------------------------------


def _derive_address(environ: Mapping[str, str], found: Variables) -> Variables:
    """Adds the host of rank 0, if mpirun or srun lets this process know it, and a port that is equal on all ranks."""
    local_size, size = found.get("LOCAL_WORLD_SIZE"), found.get("WORLD_SIZE")
    of_slurm = any(found.get(name, ("",))[0].startswith("SLURM") for name in ("RANK", "LOCAL_RANK"))
    host = ""
    if local_size and size and local_size[1] == size[1]:
        host = "127.0.0.1"
    elif of_slurm:  # task 0 runs on the first node
        host = first_host(_value(environ, "SLURM_STEP_NODELIST") or _value(environ, "SLURM_JOB_NODELIST"))
    # Under mpirun inside a SLURM job, SLURM's variables may differ between ranks: some run on the batch script's node.
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID") if of_slurm else ("PMIX_NAMESPACE", "OMPI_MCA_ess_base_jobid")
    job = ".".join(environ[name] for name in names if environ.get(name))
    port = PORTS[zlib.crc32(job.encode()) % len(PORTS)] if job else DEFAULT_PORT
    derived = {"MASTER_ADDR": (DERIVED, host), "MASTER_PORT": (DERIVED, str(port))}
    return {name: pair for name, pair in derived.items() if pair[1]} | found


def first_host(hosts: str) -> str:
    """Returns the first host of a SLURM host list: "n07" for "n[07-12,15],m1", "" for an empty list."""
    prefix, number, suffix = re.match(r"([^\[,]*)(?:\[(\d+)[^\]]*\])?([^\[,]*)", hosts).groups()  # type: ignore[union-attr]
    return prefix + (number or "") + suffix


def _world_of_one(environ: Mapping[str, str]) -> dict[str, str]:
    """Returns the variables of a world of one process; {} if LOCAL_RANK is not set.

    If LOCAL_RANK is set, Accelerate starts a process group even for one process, and that needs all variables.
    """
    if not _value(environ, "LOCAL_RANK"):
        return {}
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    default = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return default | {name: value for name in default if (value := _value(environ, name))}


# --- wrong variables ----------------------------------------------------------------------------------------------


def _problem(key: str, message: str, kind: Kind) -> Problem:
    return Problem("the launcher", key, message, kind)


def _check_agreement(found: Variables, launcher: Variables) -> None:
    """Refuses a RANK or WORLD_SIZE that differs from the launcher's own variable."""
    problems = [
        _problem(name, f"{found[name][1]}, but {launcher[name][0]} is {launcher[name][1]}; unset {name}", "world")
        for name in ("RANK", "WORLD_SIZE")
        if name in found and name in launcher and found[name][1] != launcher[name][1]
    ]
    if problems:
        raise RecipeError(problems)


def _check_numbers(found: Variables) -> Iterator[Problem]:
    """Yields the problems of each number, then those of each rank that is not less than its world size."""
    numbers: dict[str, int] = {}
    for name in (*TORCH, "MASTER_PORT"):
        source, value = found.get(name, (name, "1"))
        if value.isascii() and value.isdecimal():
            numbers[name] = int(value)
        else:
            yield _problem(source, f"expected a whole number from 0, found {value!r}", "type")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_PORT"):
        largest = 65535 if name == "MASTER_PORT" else 1 << 31
        if not 1 <= numbers.get(name, 1) <= largest:
            yield _problem(found[name][0], f"expected 1 to {largest}, found {numbers.pop(name)}", "range")
    pairs = (("RANK", "WORLD_SIZE"), ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    for rank, size in pairs:
        if rank in found and size in found and numbers.get(rank, 0) >= numbers.get(size, 1 << 31):
            message = f"{numbers[rank]} must be less than {found[size][0]}, which is {numbers[size]}"
            yield _problem(found[rank][0], message, "range")


def _half_set(found: Variables, missing: list[str]) -> Problem:
    """Returns the problem of variables that describe a world incompletely."""
    given = ", ".join(f"{source}={value}" for source, value in found.values() if source != DERIVED)
    what_to_do = "start the processes with torchrun, or let the launcher set RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT"
    alone = ", ".join(source for name, (source, _) in found.items() if name in TORCH)
    message = f"not set, although {given} is set: this process cannot join its world\n{what_to_do}"
    return _problem(", ".join(missing), f"{message};\nto train in one process, unset {alone}", "world")
