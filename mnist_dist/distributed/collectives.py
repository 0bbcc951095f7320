"""Actions that every rank takes part in."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from mnist_dist.errors import RecipeError

T = TypeVar("T")


def run_on_all_ranks(state: PartialState, action: Callable[[], T]) -> T:
    """Runs `action` on every process; where one meets a user's error, all raise it and none is left waiting."""
    result, problems = None, None
    try:
        result = action()
    except RecipeError as error:
        problems = error.problems
    found = next((each for each in gather_object([problems]) if each), None)
    if found:
        raise RecipeError(found)
    return result  # type: ignore[return-value]  # it is None only where a problem was raised


def count_nodes(state: PartialState) -> int:
    """Machines in the world; asks all processes."""
    return sum(gather_object([state.is_local_main_process]))
