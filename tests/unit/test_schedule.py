"""The learning rate rises, peaks once, falls to the minimum and depends on the step alone."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.schedule import learning_rate


def rate(step: int, warmup: int = 10, total: int = 60) -> float:
    return learning_rate(step, peak=1e-3, minimum=1e-4, warmup_steps=warmup, total_steps=total)


def test_known_points() -> None:
    assert rate(0) == pytest.approx(1e-4)
    assert rate(4) == pytest.approx(5e-4)
    assert rate(9) == pytest.approx(1e-3)
    assert rate(34) == pytest.approx((1e-3 + 1e-4) / 2)  # Half way down the cosine.
    assert rate(59) == 1e-4
    assert rate(1000) == 1e-4


def test_first_step_without_warmup_is_close_to_the_peak() -> None:
    assert rate(0, warmup=0) == pytest.approx(1e-3, rel=1e-2)


def test_a_run_shorter_than_its_warmup_still_rises() -> None:
    rates = [rate(step, warmup=10, total=4) for step in range(4)]
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])


@given(warmup=st.integers(0, 50), total=st.integers(1, 200))
def test_rises_then_falls_within_bounds(warmup: int, total: int) -> None:
    rates = [rate(step, warmup, total) for step in range(total + 3)]
    assert all(math.isfinite(each) and 0 < each <= 1e-3 for each in rates)
    turn = max(warmup - 1, 0)
    assert rates[: turn + 1] == sorted(rates[: turn + 1])
    assert rates[turn:] == sorted(rates[turn:], reverse=True)
    if total > warmup:
        assert rates[total - 1] == pytest.approx(1e-3 if total == warmup else 1e-4)


def test_negative_step_is_refused() -> None:
    with pytest.raises(ValueError, match="step is -1"):
        rate(-1)
