"""The measurements: clock offsets, rounds of links, and the reference training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cross_entropy

from mnist_dist.doctor import measurements


@given(
    skew=st.floats(-100, 100),
    delays=st.lists(st.tuples(st.floats(0, 0.1), st.floats(0, 0.1), st.floats(0, 0.1)), min_size=1, max_size=8),
)
def test_the_offset_of_a_clock_lies_within_its_uncertainty(skew, delays):
    mine, zero, now = [], [], 1000.0
    for late, mine_out, zero_out in delays:  # rank 0 starts, this rank starts `late` later; both end after both started
        zero.append((now, now + late + zero_out))
        mine.append((now + late + skew, now + late + mine_out + skew))
        now += 1
    offset, uncertainty = measurements.clock_offset(mine, zero)
    assert abs(offset - skew) <= uncertainty + 1e-9
    assert uncertainty <= min(late + mine_out + zero_out for late, mine_out, zero_out in delays) + 1e-9


@pytest.mark.parametrize("size", range(2, 20))
def test_every_link_has_a_round_in_which_no_rank_has_two_links(size):
    for current in range(3 if size % 2 else 2):
        links = [rank for rank in range(size) if measurements.link_round(rank, size) == current]
        busy = [end for rank in links for end in (rank, (rank + 1) % size)]
        assert links and len(busy) == len(set(busy))


@pytest.mark.parametrize("training", [measurements.train_alone, measurements.train_distributed])
def test_the_reference_training_does_not_use_tf32(training, monkeypatch):
    """The rounding of TF32 is larger than the tolerance."""
    found = []
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    monkeypatch.setattr(measurements, "STEPS", 2)

    def loss(*arguments: Any, **keywords: Any) -> torch.Tensor:
        found.append((torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32))
        return cross_entropy(*arguments, **keywords)

    monkeypatch.setattr("torch.nn.functional.cross_entropy", loss)
    training(torch.device("cpu"))
    assert len(found) >= 2 and set(found) == {(False, False)}
