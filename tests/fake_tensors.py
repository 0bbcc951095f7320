"""Fake CUDA tensors: tests with them run where there is no GPU."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode


def skip_unless_fake_tensors_work() -> None:
    """Skips the test where fake CUDA tensors need the driver, or find one."""
    if torch.cuda.is_available():
        pytest.skip(
            "with a driver, fake CUDA tensors allocate memory; the tests with real CUDA graphs run here instead"
        )
    with FakeTensorMode(), torch.device("cuda", 0):
        try:
            torch.zeros(1).copy_(torch.ones(1))
        except RuntimeError as error:
            pytest.skip(f"fake tensors of torch {torch.__version__} need the driver: {error}")
