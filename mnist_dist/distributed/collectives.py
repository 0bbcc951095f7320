"""Functions that every rank calls together."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from accelerate import PartialState
from accelerate.utils import gather_object

from mnist_dist.errors import RecipeError

T = TypeVar("T")


def run_on_all_ranks(state: PartialState, action: Callable[[], T]) -> T:
    """Runs `action` on every rank; a RecipeError on one rank is raised on all. Collective: call on every rank.

    Returns:
        What `action` returns on this rank.

    Raises:
        RecipeError: with the problems of the first rank that raised one. No rank waits for a rank that has failed.
    """
    result, problems = None, None
    try:
        result = action()
    except RecipeError as error:
        problems = error.problems
    found = next((each for each in gather_object([problems]) if each), None)
    if found:
        raise RecipeError(found)
    return result  # type: ignore[return-value]  # None only if a problem was raised


def count_nodes(state: PartialState) -> int:
    """Returns the number of machines in the world. Collective: call on every rank."""
    return sum(gather_object([state.is_local_main_process]))
