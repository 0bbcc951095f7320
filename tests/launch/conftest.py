"""A fixture for the tests of launchers."""

from __future__ import annotations

import pytest
from accelerate.state import AcceleratorState

from mnist_dist import load_recipe, train
from tests.launch.launching import OVERRIDES, losses


@pytest.fixture(scope="session")
def losses_of_one_process(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of `launching.WORDS` in one process without a launcher."""
    folder = tmp_path_factory.mktemp("one process") / "run"
    AcceleratorState._reset_state(reset_partial_state=True)
    train(load_recipe("lenet5", *OVERRIDES), folder)
    AcceleratorState._reset_state(reset_partial_state=True)
    found = losses(folder)
    assert max(found) - min(found) > 0.01, "the comparison of losses needs a run that learns"
    return found
