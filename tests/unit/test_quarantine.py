"""Devices that keep failing stay out for longer and longer, others do not."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from health.events import DeviceId, Severity
from health.policy import QuarantinePolicy
from health.quarantine import Quarantine

PROPERTY = settings(derandomize=True, deadline=None, max_examples=200)
DEVICE, OTHER = DeviceId(0, 1), DeviceId(0, 2)
POLICY = QuarantinePolicy(
    flap_window_seconds=100.0, quarantine_seconds=10.0, quarantine_max_seconds=65.0
)


@dataclass(frozen=True)
class Failure:
    at: float
    severity: Severity


@dataclass(frozen=True)
class Return:
    at: float


def quarantine_end(story: list[Failure | Return]) -> float | None:
    """The slow oracle: when the newest quarantine after `story` ends, if there is one.

    It keeps no state, but reads the story backwards from each failure.
    """
    if not story:
        return None
    last = story[-1]
    if isinstance(last, Return):
        return quarantine_end(story[:-1])
    begin = first_of_flapping(story)
    if begin == len(story) - 1:
        return None
    flapping = [event for event in story[begin + 1 :] if isinstance(event, Failure)]
    free = next((f for f in flapping if f.severity is Severity.TRANSIENT), None)
    if last is free:
        return quarantine_end(story[:-1])
    length = 10.0 * 2.0 ** (len([f for f in flapping if f is not free]) - 1)
    return last.at + min(length, 65.0)


def first_of_flapping(story: list[Failure | Return]) -> int:
    """Index of the failure before which the device had a clean record; `story` ends with one."""
    before = story[:-1]
    failures = [i for i, event in enumerate(before) if isinstance(event, Failure)]
    if not failures:
        return len(story) - 1
    newest = failures[-1]
    returns = [event.at for event in before[newest + 1 :] if isinstance(event, Return)]
    if returns:
        end = quarantine_end(story[: newest + 1])
        well_since = max(returns[0], returns[0] if end is None else end)
        if story[-1].at - well_since >= 100.0:
            return len(story) - 1
    return first_of_flapping(story[: newest + 1])


stories = st.lists(
    st.tuples(
        st.sampled_from([1, 5, 20, 64, 65, 66, 99, 100, 101, 300]),
        st.sampled_from([None, *Severity]),
    ),
    max_size=8,
)


@PROPERTY
@given(stories)
def test_quarantines_are_those_of_the_whole_story(
    tale: list[tuple[int, Severity | None]],
) -> None:
    book = Quarantine(POLICY)
    story: list[Failure | Return] = []
    now = 0.0
    for gap, severity in tale:
        now += gap
        if severity is None:
            book.returned(DEVICE, now)
            story.append(Return(now))
        else:
            book.failed(DEVICE, severity, now)
            story.append(Failure(now, severity))
        end = quarantine_end(story)
        assert book.release_at(DEVICE) == end
        for later in (now, now + 10, now + 65):
            assert book.allowed(DEVICE, later) == (end is None or later >= end)
            assert ("left out" in book.reason(DEVICE, later)) != book.allowed(DEVICE, later)
        assert book.allowed(OTHER, now) and book.release_at(OTHER) is None


def flap(book: Quarantine, severity: Severity, times: int) -> list[float]:
    """The device fails `times` in a row, 1 s after each return; how long it is out each time."""
    lengths, now = [], 0.0
    for _ in range(times):
        book.failed(DEVICE, severity, now)
        end = max(now, book.release_at(DEVICE) or now)
        lengths.append(end - now)
        book.returned(DEVICE, end)
        now = end + 1
    return lengths


def test_each_relapse_doubles_the_quarantine_up_to_its_maximum() -> None:
    assert flap(Quarantine(POLICY), Severity.FATAL, 7) == [0, 10, 20, 40, 65, 65, 65]


def test_the_first_relapse_of_a_mere_process_is_free() -> None:
    assert flap(Quarantine(POLICY), Severity.TRANSIENT, 7) == [0, 0, 10, 20, 40, 65, 65]


def test_an_endless_story_does_not_overflow() -> None:
    assert flap(Quarantine(POLICY), Severity.FATAL, 2000)[-1] == 65


@pytest.mark.parametrize(("well_for", "length"), [(99.0, 20.0), (100.0, 0.0)])
def test_a_device_that_stays_well_after_its_quarantine_is_forgiven(
    well_for: float, length: float
) -> None:
    book = Quarantine(POLICY)
    book.failed(DEVICE, Severity.FATAL, 0.0)
    book.failed(DEVICE, Severity.FATAL, 1.0)
    # Ready long before it is used again: that proves nothing.
    book.returned(DEVICE, 2.0)
    assert book.release_at(DEVICE) == 11.0
    again = 11.0 + well_for
    book.failed(DEVICE, Severity.FATAL, again)
    end = book.release_at(DEVICE)
    assert (0.0 if end is None else end - again) == length


def test_the_reason_has_the_numbers() -> None:
    book = Quarantine(POLICY)
    assert book.reason(DEVICE, 0.0) == "node0/1 has no recent failure"
    book.failed(DEVICE, Severity.FATAL, 0.0)
    assert book.reason(DEVICE, 0.0) == (
        "node0/1 failed once and is forgiven once it stays well for 100 s"
    )
    book.returned(DEVICE, 1.0)
    book.failed(DEVICE, Severity.TRANSIENT, 2.0)
    book.returned(DEVICE, 3.0)
    book.failed(DEVICE, Severity.TRANSIENT, 4.0)
    assert book.reason(DEVICE, 7.0) == (
        "node0/1 failed 3 times and never stayed well for 100 s in between; it is left out for "
        "10 s, of which 7 s remain"
    )
    assert book.reason(DEVICE, 14.0) == (
        "node0/1 failed 3 times and is forgiven once it stays well for 100 s"
    )
    book.returned(DEVICE, 14.0)
    assert book.reason(DEVICE, 114.0) == "node0/1 has no recent failure"
