"""Thresholds contradict neither themselves nor each other, and follow what was observed."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from elastic.health_config import HealthConfig
from health.policy import LivenessPolicy, QuarantinePolicy, progress_deadline

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
LIVENESS = HealthConfig().liveness
QUARANTINE = HealthConfig().quarantine

durations = st.lists(st.floats(0, 1e6), min_size=1, max_size=30)
limits = st.floats(1e-3, 1e4)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("policy", [LIVENESS, QUARANTINE])
def test_every_threshold_is_positive_and_finite(
    policy: LivenessPolicy | QuarantinePolicy, value: float
) -> None:
    for field in fields(policy):
        with pytest.raises(ValueError, match=f"^{field.name}: {value:g} must be a positive"):
            replace(policy, **{field.name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"heartbeat_timeout_seconds": 2.0},
            r"heartbeat_timeout_seconds: 2 must be above 2 x heartbeat_seconds \(2\)",
        ),
        (
            {"progress_initial_seconds": 9.0},
            r"progress_initial_seconds: 9 must be at least progress_floor_seconds \(10\)",
        ),
        (
            {"quarantine_max_seconds": 59.0},
            r"quarantine_max_seconds: 59 must be at least quarantine_seconds \(60\)",
        ),
    ],
)
def test_a_configuration_refuses_thresholds_that_contradict_each_other(
    change: dict[str, float], message: str
) -> None:
    with pytest.raises(ValidationError, match=f"health.{message}"):
        HealthConfig(**change)


def test_a_factor_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"progress_factor: 0.5 must be at least 1"):
        replace(LIVENESS, progress_factor=0.5)


def test_the_configuration_reaches_the_policies() -> None:
    config = HealthConfig(spawn_timeout_seconds=7.0, flap_window_seconds=8.0)
    assert config.liveness == replace(LIVENESS, spawn_timeout_seconds=7.0)
    assert config.quarantine == replace(QUARANTINE, flap_window_seconds=8.0)


@PROPERTY
@given(durations, limits, st.floats(1, 100))
def test_no_duration_that_was_observed_exceeds_the_deadline(
    durations: list[float], floor: float, factor: float
) -> None:
    policy = replace(
        LIVENESS,
        progress_floor_seconds=floor,
        progress_factor=factor,
        progress_initial_seconds=floor,
    )
    deadline = progress_deadline(policy, durations).seconds
    assert deadline >= floor
    assert all(factor * duration <= deadline for duration in durations)
    # And it is no longer than one of these asks for.
    assert deadline in {floor, *(factor * duration for duration in durations)}


@PROPERTY
@given(durations, durations)
def test_the_deadline_never_falls_when_more_or_longer_durations_are_observed(
    shorter: list[float], more: list[float]
) -> None:
    deadline = progress_deadline(LIVENESS, shorter).seconds
    assert progress_deadline(LIVENESS, [*shorter, *more]).seconds >= deadline
    longer = [a + b for a, b in zip(shorter, more, strict=False)] + shorter[len(more) :]
    assert progress_deadline(LIVENESS, longer).seconds >= deadline


@pytest.mark.parametrize(
    ("durations", "seconds", "basis"),
    [
        ((), 120.0, "initial value, nothing learned yet"),
        ((0.5, 1.5), 10.0, "floor, above 5 x the longest of the last 2, 1.5 s"),
        ((4.0, 3.0, 1.0), 20.0, "5 x the longest of the last 3, 4 s"),
    ],
)
def test_a_deadline_says_where_it_comes_from(
    durations: tuple[float, ...], seconds: float, basis: str
) -> None:
    deadline = progress_deadline(LIVENESS, durations)
    assert (deadline.seconds, deadline.basis) == (seconds, basis)
