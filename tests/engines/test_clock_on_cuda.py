"""A step is timed from before its launch to its end, whoever else is busy meanwhile."""

import time

import pytest
import torch

from sinkbench.engines.clock import Clock

pytestmark = pytest.mark.cuda
SHORT, LONG = 1_000_000, 200_000_000  # cycles: less than 5 ms, and at least 50


def launched(cycles):
    clock = Clock(torch.device("cuda", torch.cuda.current_device()))
    clock.begin()
    torch.cuda._sleep(cycles)
    clock.end()
    return clock


def test_a_step_that_is_waited_for_is_timed_by_the_clock_on_the_wall():
    begin = time.perf_counter()
    clock = launched(LONG)
    clock.wait()
    assert not clock.late
    assert 0.05 < clock.seconds() < time.perf_counter() - begin


def test_one_that_ended_before_anybody_came_is_timed_by_the_device():
    clock = launched(SHORT)
    time.sleep(0.1)
    clock.wait()
    assert clock.late
    assert 0 < clock.seconds() < 0.05
