"""Collective functions: every rank must call them."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from mnist_dist.errors import Problem, RecipeError, RunError

T = TypeVar("T")


def run_on_all_ranks(state: PartialState, action: Callable[[], T], group: dist.ProcessGroup | None = None) -> T:
    """Runs `action` on every rank. If one rank raises an exception, every rank does. Collective: call on every rank.

    Args:
        group: see `gather_values`.

    Returns:
        What `action` returns on this rank.

    Raises:
        RecipeError: a rank raised a RecipeError; every rank raises the problems of the first such rank.
        RunError: another rank raised any other exception; the message names the rank and the exception. The failed
            rank itself raises its own exception.
    """
    result, failure = None, None
    try:
        result = action()
    except BaseException as error:  # Ctrl-C and SystemExit would leave the other ranks waiting as well
        failure = error
    reports = gather_values(_report(state, failure), group)
    if problems := next((problems for problems, _ in reports if problems), None):
        raise RecipeError(problems) from failure
    if failure is not None:
        raise failure
    if messages := [message for _, message in reports if message]:
        raise RunError("\n  ".join([*messages, "all ranks end"]))
    return result  # type: ignore[return-value]  # None only if a rank failed


def gather_values(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """Returns the values of all ranks, in their order. Collective: call on every rank.

    Args:
        group: a second group of all ranks, for a thread. Each group runs its collectives one after another.
    """
    if group is None:
        return gather_object([value])
    found: list[Any] = [None] * group.size()
    dist.all_gather_object(found, value, group=group)
    return found


def wait_for_all_ranks() -> None:
    """Waits until every rank has called this. Collective: call on every rank.

    Accelerate's `wait_for_everyone` names one of the machine's GPUs to PyTorch even if the ranks compute on the CPU.
    Where there are fewer GPUs than ranks, that is an error.
    """
    gather_values(None)


def _report(state: PartialState, failure: BaseException | None) -> tuple[list[Problem] | None, str]:
    """Returns what this rank sends to the others: the problems of a RecipeError, and a message for another failure."""
    if isinstance(failure, RecipeError):
        return failure.problems, ""
    if failure is None:
        return None, ""
    where = f"rank {state.process_index} ({socket.gethostname()}, pid {os.getpid()})"
    return None, f"{where} failed: {type(failure).__name__}: {failure}"


def is_lost_connection(error: BaseException | None) -> bool:
    """Returns whether a collective failed because another process has ended. gloo raises a RuntimeError of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def count_nodes(state: PartialState) -> int:
    """Returns the number of machines in the world. Collective: call on every rank."""
    return sum(gather_object([state.is_local_main_process]))
