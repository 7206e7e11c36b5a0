"""What happens at intervals happens on every process of a host at the same moments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.pulse import seconds_to_next

intervals = st.floats(0.01, 60.0)
nows = st.floats(0.0, 1e7)


@given(intervals, nows, nows)
def test_whoever_sleeps_until_the_next_one_wakes_at_a_multiple(
    interval: float, one: float, other: float
) -> None:
    pauses = [seconds_to_next(interval, now) for now in (one, other)]
    assert all(0 < pause <= interval for pause in pauses)
    wakes = (one + pauses[0], other + pauses[1])
    beats_between = (wakes[1] - wakes[0]) / interval
    assert beats_between == pytest.approx(round(beats_between), abs=1e-3)


def test_nobody_wakes_twice_for_the_same_moment() -> None:
    assert seconds_to_next(0.25, 12.5) == 0.25
    assert seconds_to_next(0.25, 12.6) == pytest.approx(0.15)
