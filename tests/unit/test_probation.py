"""Quarantine as a controller keeps it, and as its successor finds it."""

from __future__ import annotations

from collections import defaultdict

from hypothesis import given
from hypothesis import strategies as st

from elastic.effects import Note
from elastic.messages import Failed
from elastic.probation import Probation
from elastic.topology import DeviceId
from health.events import FailureEvent, FaultKind, Severity
from health.policy import QuarantinePolicy

POLICY = QuarantinePolicy(
    flap_window_seconds=100.0, quarantine_seconds=20.0, quarantine_max_seconds=80.0
)
DEVICES = (DeviceId(0, 0), DeviceId(0, 1), DeviceId(1, 0))


def failure(device: DeviceId, at: float, severity: Severity = Severity.FATAL) -> FailureEvent:
    name = f"{device}@{at:g}"
    return FailureEvent(name, device, 1, FaultKind.PROCESS_EXIT, severity, at, "it ended")


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[FailureEvent, float]]:
    """Failures, oldest first, each with the time at which its device was back."""
    free_at: defaultdict[DeviceId, float] = defaultdict(float)
    told: list[tuple[FailureEvent, float]] = []
    for device in draw(st.lists(st.sampled_from(DEVICES), max_size=12)):
        at = free_at[device] + draw(st.integers(1, 250))
        free_at[device] = at + draw(st.integers(0, 120))
        severity = draw(st.sampled_from((Severity.FATAL, Severity.TRANSIENT)))
        told.append((failure(device, at, severity), free_at[device]))
    return sorted(told, key=lambda each: each[0].at)


@given(stories(), st.integers(0, 300))
def test_a_successor_keeps_out_nobody_that_an_eyewitness_would_let_in(
    story: list[tuple[FailureEvent, float]], later: int
) -> None:
    seen, recalled = Probation(POLICY), Probation(POLICY)
    moments = [(event.at, 1, event) for event, _ in story]
    moments += [(back, 0, event) for event, back in story]
    # A device is back before it can fail again, and fails before it is back.
    for at, fails, event in sorted(moments, key=lambda each: (each[0], each[2].at, -each[1])):
        if fails:
            seen.failed(event, at)
        else:
            seen.returned(event.device, at)
    now = max((back for _, back in story), default=0.0) + later
    recalled.recall([Failed(event, None, None, None) for event, _ in story], lambda _: True, now)
    assert recalled.held(now) <= seen.held(now)


def test_a_device_that_is_away_is_on_trial_only_once_it_is_back() -> None:
    first, second = failure(DEVICES[0], 10.0), failure(DEVICES[0], 20.0)
    found = [Failed(each, None, None, None) for each in (first, second)]
    away = Probation(POLICY)
    away.recall(found, lambda _: False, 50.0)
    away.returned(DEVICES[0], 200.0)
    # Its trial began at 200 s, so this is a relapse, the second.
    (note,) = away.failed(failure(DEVICES[0], 250.0), 250.0)
    assert isinstance(note, Note) and note.fields["release_at"] == 290.0


def test_a_clock_that_is_ahead_keeps_a_device_out_no_longer() -> None:
    probation = Probation(POLICY)
    probation.failed(failure(DEVICES[0], 5000.0), 10.0)
    (note,) = probation.failed(failure(DEVICES[0], 5001.0), 11.0)
    assert isinstance(note, Note) and note.fields["release_at"] == 31.0


def test_the_end_of_a_quarantine_is_told_once() -> None:
    probation = Probation(POLICY)
    for at in (1.0, 2.0):
        probation.failed(failure(DEVICES[0], at), at)
    assert probation.release(21.0) == []
    assert probation.release(22.0) == [Note("quarantine_over", {"device": "node0/0"})]
    assert probation.release(23.0) == []
