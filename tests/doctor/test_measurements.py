"""The measurements: clock offsets and rounds of links."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
