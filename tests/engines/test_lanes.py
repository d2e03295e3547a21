"""How many chunks are under way at once on a GPU; what they compute is held in test_lanes_on_cuda.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sinkbench.attention.kernels import MEETING
from sinkbench.engines.lanes import LANES, OVERLAP, lanes_of

COUNTS = st.integers(1, 2000)


@given(COUNTS, COUNTS, COUNTS, st.integers(0, 100))
def test_programs_that_wait_for_each_other_can_all_be_running(processors, rows, heads, room):
    """One that has no multiprocessor would be waited for by those that have, for ever."""
    count = lanes_of(processors, rows, heads, room)
    assert 1 <= count <= LANES
    assert count == 1 or count * MEETING <= processors


@given(COUNTS, COUNTS, COUNTS)
def test_no_more_chunks_are_under_way_than_there_is_memory_for(processors, rows, heads):
    assert lanes_of(processors, rows, heads, 0) == lanes_of(processors, rows, heads, 1) == 1
    assert lanes_of(processors, rows, heads, 3) <= 3


@pytest.mark.parametrize(
    ("rows", "heads", "count"),
    [(1, 3, LANES), (1, 32, LANES), (1, 71, OVERLAP), (8, 3, OVERLAP), (32, 32, OVERLAP)],
)
def test_scans_that_fill_a_device_get_no_more_than_what_overlaps_products(rows, heads, count):
    """Of an H200, which has 132 multiprocessors."""
    assert lanes_of(132, rows, heads, 100) == count
