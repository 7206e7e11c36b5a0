"""A worker's account of its time: own time and waits add up, whoever asks, whenever."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from health.events import DeviceId
from health.heartbeat import RECENT_SPANS, Activity, ActivityLog, Heartbeat, Span

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
DEVICE = DeviceId(1, 2)


@dataclass
class Diary:
    """The slow oracle: what the thread did in each single second of a span.

    A second is None where it was the thread's own, else the number of the wait that it belongs to.
    """

    activity: Activity
    step: int
    generation: int
    cold: bool
    seconds: list[int | None] = field(default_factory=list)

    def span(self, running_wait: int | None = None) -> Span:
        waits = {wait for wait in self.seconds if wait is not None} - {running_wait}
        return Span(
            self.activity,
            self.step,
            self.generation,
            self.cold,
            float(self.seconds.count(None)),
            float(max((self.seconds.count(wait) for wait in waits), default=0)),
        )


deeds = st.lists(
    st.one_of(
        st.integers(1, 9),
        st.sampled_from(["wait", "resume", "heartbeat"]),
        st.tuples(st.sampled_from(Activity), st.integers(0, 9), st.integers(1, 3), st.booleans()),
    ),
    max_size=60,
)


@PROPERTY
@given(deeds)
@example(["wait", 5, "resume", 1, "wait", 2, "resume"])
@example(["wait", 5, "heartbeat", 3, "resume", 1, "heartbeat", 2, "wait", 4])
def test_own_time_and_waits_are_those_of_a_diary(
    deeds: list[int | str | tuple[Activity, int, int, bool]],
) -> None:
    now, waits, wait = 100, False, 0
    log = ActivityLog(DEVICE, 3, float(now))
    diary = Diary(Activity.AWAITING_PLAN, 0, 0, True)
    finished: list[Span] = []
    for deed in [*deeds, "heartbeat"]:
        match deed:
            case int():
                diary.seconds += [wait if waits else None] * deed
                now += deed
            case "wait" if not waits:
                wait += 1
                waits = True
                log.wait(float(now))
            case "resume" if waits:
                waits = False
                log.resume(float(now))
            case (activity, step, generation, cold) if not waits:
                finished.append(diary.span())
                diary = Diary(activity, step, generation, cold)
                log.begin(activity, step, float(now), generation=generation, cold=cold)
            case "heartbeat":
                waiting = float(diary.seconds.count(wait)) if waits else None
                current = diary.span(wait if waits else None)
                beat = Heartbeat(DEVICE, 3, current, waiting, tuple(finished))
                assert log.heartbeat(float(now)) == beat
                finished = []


def test_finished_spans_are_handed_out_once() -> None:
    log = ActivityLog(DEVICE, 1, 0.0)
    log.begin(Activity.COMPUTING, 4, 1.0, generation=1, cold=False)
    log.begin(Activity.VOTE, 4, 3.0, generation=1, cold=False)
    assert [span.activity for span in log.heartbeat(3.5).finished] == [
        Activity.AWAITING_PLAN,
        Activity.COMPUTING,
    ]
    assert log.heartbeat(4.0).finished == ()


def test_what_nobody_fetches_is_kept_only_as_far_as_it_can_matter() -> None:
    log = ActivityLog(DEVICE, 1, 0.0)
    for step in range(10_000):
        log.begin(Activity.COMPUTING, step, float(step), generation=1, cold=False)
    finished = log.heartbeat(10_000.0).finished
    assert len(finished) == RECENT_SPANS * len(Activity)
    assert finished[-1].step == 9_998


def test_an_activity_cannot_end_inside_a_wait() -> None:
    log = ActivityLog(DEVICE, 1, 0.0)
    log.wait(1.0)
    with pytest.raises(AssertionError, match="awaiting_plan ended inside a wait"):
        log.begin(Activity.COMPUTING, 0, 2.0, generation=1, cold=True)
    log.resume(2.0)
    log.begin(Activity.COMPUTING, 0, 2.0, generation=1, cold=True)
