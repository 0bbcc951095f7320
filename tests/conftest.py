"""What several test modules need."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

# Tests run beside one another on few cores: threads that wait for each other would be most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
os.environ["WANDB_MODE"] = "offline"


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """A fresh one, alone on the CPU: Accelerate keeps its state between tests, with another's device and precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def mnist_root() -> Path:
    """The folder that holds MNIST/raw whole: $MNIST_DIST_DATA or ./data."""
    stems = [f"{part}-{what}-ubyte" for part in ("train", "t10k") for what in ("images-idx3", "labels-idx1")]
    roots = [Path(root) for root in (os.environ.get("MNIST_DIST_DATA"), "data") if root]
    for root in roots:
        if all(list((root / "MNIST" / "raw").glob(f"{stem}*")) for stem in stems):
            return root.absolute()
    pytest.skip(f"MNIST is not at hand: no whole MNIST/raw in {' or '.join(map(str, roots))} (set MNIST_DIST_DATA)")
