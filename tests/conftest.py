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
# On any machine the tests are of the CPU; those of a GPU ask for the fixture of that name.
os.environ["ACCELERATE_USE_CPU"] = "true"


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """A fresh one, alone on the CPU: Accelerate keeps its state between tests, with another's device and precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """The first GPU, which Accelerate takes as long as the test lasts."""
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU to record a graph on")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield torch.device("cuda", 0)
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
