"""Who hangs is found within its limit, and nobody else is accused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from health.classify import HeartbeatLost, NoProgress, NotReady, Signal, Stopped
from health.events import DeviceId
from health.heartbeat import RECENT_SPANS, Activity, Heartbeat, Span
from health.liveness import Liveness, Stalled
from health.policy import Deadline, LivenessPolicy

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
POLICY = LivenessPolicy(
    heartbeat_seconds=0.25,
    heartbeat_timeout_seconds=3.0,
    stopped_timeout_seconds=0.5,
    spawn_timeout_seconds=8.0,
    progress_floor_seconds=10.0,
    progress_factor=4.0,
    progress_initial_seconds=60.0,
)
DEVICES = (DeviceId(0, 0), DeviceId(0, 1), DeviceId(0, 2))
FIRST = DEVICES[0]
TICK = 1 / 16
"""Times are multiples of this, so that sums of them are exact."""


def beat(
    device: DeviceId = FIRST,
    activity: Activity = Activity.COMPUTING,
    *,
    own: float = 0.0,
    waiting: float | None = None,
    cold: bool = False,
    finished: Sequence[Span] = (),
    incarnation: int = 1,
    generation: int = 3,
) -> Heartbeat:
    current = Span(activity, 7, generation, cold, own, 0.0)
    return Heartbeat(device, incarnation, current, waiting, tuple(finished))


def span(
    own: float,
    activity: Activity = Activity.COMPUTING,
    *,
    longest_wait: float = 0.0,
    cold: bool = False,
) -> Span:
    return Span(activity, 6, 3, cold, own, longest_wait)


def watch(*devices: DeviceId) -> Liveness:
    """Each of these was just started, at 0."""
    liveness = Liveness(POLICY, 0.0)
    for device in devices:
        liveness.started(device, 1, 0.0)
    return liveness


def asked(liveness: Liveness, *heartbeats: Heartbeat) -> list[Signal]:
    """What it says right after these arrived."""
    for heartbeat in heartbeats:
        liveness.observe(heartbeat, 0.0)
    return liveness.expired(0.0, ())


# Silence, against an oracle that remembers everything and computes each answer from the beginning.


@dataclass
class Chronicle:
    """All calls of a story so far: their times, and for each process what happened in which."""

    times: list[float] = field(default_factory=list)
    starts: dict[DeviceId, int] = field(default_factory=dict)
    beats: dict[DeviceId, list[int]] = field(default_factory=dict)
    looks: list[tuple[int, frozenset[DeviceId]]] = field(default_factory=list)

    def attention(self, begin: int, end: int) -> float:
        """Between two calls: no gap counts for more than two looks."""
        gaps = [b - a for a, b in zip(self.times, self.times[1:], strict=False)]
        return sum(min(gap, 0.5) for gap in gaps[begin:end])

    def silence(self, device: DeviceId, at: int) -> float:
        heard = [call for call in self.beats.get(device, []) if call <= at]
        return self.attention(max(heard, default=self.starts[device]), at)

    def verdict(self, device: DeviceId) -> Signal | None:
        """At the newest call, which is a look."""
        now = len(self.times) - 1
        silent = self.silence(device, now)
        stopped_since = None
        for call, stopped in reversed(self.looks):
            if (
                device not in stopped
                or call < self.starts[device]
                or any(call < heard <= now for heard in self.beats.get(device, []))
            ):
                break
            stopped_since = call
        if stopped_since is not None:
            stopped_for = self.attention(stopped_since, now)
            if stopped_for >= 0.5:
                return Stopped(device, 1, stopped_for, silent)
        if not self.beats.get(device):
            return NotReady(device, 1, silent) if silent >= 8.0 else None
        if silent >= 3.0:
            return HeartbeatLost(device, 1, silent, 3.0, Activity.COMPUTING, 7)
        return None


calls = st.one_of(
    st.tuples(st.just("beat"), st.sampled_from(DEVICES)),
    st.tuples(st.just("look"), st.frozensets(st.sampled_from(DEVICES))),
)
gaps = st.one_of(st.integers(1, 8), st.integers(1, 8), st.integers(1, 400))


@PROPERTY
@given(st.lists(st.tuples(gaps, calls), max_size=60))
def test_silence_is_judged_as_by_one_who_remembers_everything(
    story: list[tuple[int, tuple[str, DeviceId | frozenset[DeviceId]]]],
) -> None:
    chronicle = Chronicle([0.0], dict.fromkeys(DEVICES, 0))
    liveness = watch(*DEVICES)
    for gap, (_, subject) in story:
        chronicle.times.append(chronicle.times[-1] + gap * TICK)
        call, now = len(chronicle.times) - 1, chronicle.times[-1]
        if isinstance(subject, DeviceId):
            liveness.observe(beat(subject), now)
            chronicle.beats.setdefault(subject, []).append(call)
            continue
        chronicle.looks.append((call, subject))
        watched = chronicle.starts.keys()
        verdicts = [chronicle.verdict(device) for device in watched]
        signals = [verdict for verdict in verdicts if verdict is not None]
        assert liveness.expired(now, subject) == signals
        for signal in signals:
            del chronicle.starts[signal.device]


# Silence, in a user's words: an agent that looks when it should.


def look_until(liveness: Liveness, now: float, end: float) -> tuple[list[Signal], float]:
    """Look whenever a look is due, until something is found or `end`."""
    while now < end:
        now = min(now + POLICY.look_seconds, end)
        if found := liveness.expired(now, ()):
            return found, now
    return [], now


@PROPERTY
@given(
    st.lists(st.integers(1, 47), max_size=30),
    st.integers(0, 2),
)
def test_a_gap_below_the_limit_is_no_failure_and_one_as_long_is(
    gaps: list[int], silent: int
) -> None:
    liveness, now = watch(*DEVICES), 0.0
    for gap in gaps:
        for device in DEVICES:
            liveness.observe(beat(device), now)
        found, now = look_until(liveness, now, now + gap * TICK)
        assert found == []
    for device in DEVICES:
        liveness.observe(beat(device), now)
    went_silent = now
    while now < went_silent + 20:
        now += 0.25
        for device in DEVICES:
            if device != DEVICES[silent]:
                liveness.observe(beat(device), now)
        if found := liveness.expired(now, ()):
            break
    assert [signal.device for signal in found] == [DEVICES[silent]]
    assert now - went_silent == 3.0


@PROPERTY
@given(st.integers(0, 3), st.integers(1, 10**6))
def test_an_agent_that_was_held_up_accuses_nobody(before: int, pause: int) -> None:
    """Whatever its workers sent meanwhile is still unread when it goes on with a look."""
    liveness, now = watch(*DEVICES), 0.0
    for device in DEVICES:
        liveness.observe(beat(device), now)
    _, now = look_until(liveness, now, before * TICK)
    now += pause
    assert liveness.expired(now, DEVICES) == []
    # It was the agent: heartbeats go on.
    for device in DEVICES:
        liveness.observe(beat(device), now)
    assert look_until(liveness, now, now + 2.9)[0] == []


def test_a_stopped_process_is_found_long_before_the_limit_of_silence() -> None:
    liveness, now = watch(*DEVICES), 0.0
    found: list[Signal] = []
    while not found and now < 10:
        for device in DEVICES[1:]:
            liveness.observe(beat(device), now)
        if now == 0.0:
            liveness.observe(beat(FIRST), now)
        found = liveness.expired(now, {FIRST})
        now += POLICY.heartbeat_seconds
    assert found == [Stopped(FIRST, 1, stopped_seconds=0.5, silent_seconds=0.5)]


def test_a_heartbeat_between_two_stops_makes_them_two() -> None:
    liveness = watch(FIRST, DEVICES[1])
    liveness.observe(beat(FIRST), 0.0)
    assert look_until(liveness, 0.0, 0.5)[0] == []
    assert liveness.expired(0.75, {FIRST}) == []
    liveness.observe(beat(FIRST), 1.0)
    liveness.observe(beat(DEVICES[1]), 1.25)
    assert liveness.expired(1.75, {FIRST}) == []
    assert liveness.expired(2.25, {FIRST}) == [Stopped(FIRST, 1, 0.5, 1.25)]


def test_a_process_that_hangs_while_it_starts_is_found_too() -> None:
    liveness = watch(FIRST)
    found, now = look_until(liveness, 0.0, 100.0)
    assert (found, now) == ([NotReady(FIRST, 1, 8.0)], 8.0)


def test_a_signal_is_given_once() -> None:
    liveness = watch(FIRST)
    assert len(look_until(liveness, 0.0, 100.0)[0]) == 1
    assert liveness.expired(100.0, {FIRST}) == []


def test_a_replacement_is_judged_by_its_own_heartbeats() -> None:
    liveness = watch(FIRST)
    liveness.observe(beat(own=11.0, finished=[span(0.1)]), 0.0)
    liveness.started(FIRST, 2, 0.0)
    # A last word and the end of its predecessor concern nobody.
    liveness.observe(beat(own=61.0), 1.0)
    liveness.ended(FIRST, 1)
    found, _ = look_until(liveness, 1.0, 100.0)
    assert [(signal.incarnation, type(signal)) for signal in found] == [(2, NotReady)]


def test_a_process_that_ended_is_not_missed() -> None:
    liveness = watch(FIRST, DEVICES[1])
    liveness.ended(FIRST, 1)
    assert [signal.device for signal in look_until(liveness, 0.0, 9.0)[0]] == [DEVICES[1]]


# Progress and stalls, against an oracle that keeps all spans.

seconds = st.integers(0, 40).map(lambda n: n / 4)
spans = st.builds(
    Span,
    st.sampled_from([Activity.COMPUTING, Activity.VOTE]),
    st.integers(0, 9),
    st.just(3),
    st.sampled_from([False, False, False, True]),
    seconds,
    seconds,
)
heartbeats = st.builds(
    Heartbeat,
    st.sampled_from(DEVICES),
    st.just(1),
    st.builds(
        Span,
        st.sampled_from([Activity.COMPUTING, Activity.VOTE, Activity.AWAITING_PLAN]),
        st.integers(0, 9),
        st.just(3),
        st.booleans(),
        st.integers(0, 90).map(float),
        seconds,
    ),
    st.one_of(st.none(), st.integers(0, 90).map(float), st.integers(0, 90).map(float)),
    st.lists(spans, max_size=4).map(tuple),
)


def limit(current: Span, finished: list[Span], quantity: str) -> float:
    """The oracle's deadline: from all spans since the last cold one, whatever came before."""
    if current.cold:
        return 60.0
    cold = [i for i, each in enumerate(finished) if each.cold]
    warm = finished[cold[-1] + 1 :] if cold else finished
    same = [getattr(each, quantity) for each in warm if each.activity is current.activity]
    return max([10.0, *(4.0 * value for value in same)]) if same else 60.0


@PROPERTY
@given(st.lists(heartbeats, max_size=25))
def test_progress_and_stalls_are_judged_as_by_one_who_remembers_everything(
    story: list[Heartbeat],
) -> None:
    liveness = watch(*DEVICES)
    finished: dict[DeviceId, list[Span]] = {device: [] for device in DEVICES}
    newest: dict[DeviceId, Heartbeat] = {}
    gone: set[DeviceId] = set()
    for heartbeat in story:
        device, current = heartbeat.device, heartbeat.current
        signals = asked(liveness, heartbeat)
        if device not in gone:
            finished[device] += heartbeat.finished
            newest[device] = heartbeat
            idle = heartbeat.waiting_seconds is not None or (
                current.activity is Activity.AWAITING_PLAN
            )
            allowed = limit(current, finished[device], "own_seconds")
            if not idle and current.own_seconds > allowed:
                gone.add(device)
                del newest[device]
                assert [(type(s), s.device) for s in signals] == [(NoProgress, device)]
                signals = []
        assert signals == []

        placed = {
            device: each
            for device, each in newest.items()
            if each.current.activity is not Activity.AWAITING_PLAN
        }
        stuck = bool(placed) and all(
            each.waiting_seconds is not None
            and each.waiting_seconds > limit(each.current, finished[device], "longest_wait_seconds")
            for device, each in placed.items()
        )
        stall = liveness.stalled()
        assert (stall is not None) == (stuck and not gone)
        if stall is not None:
            waits = [each.waiting_seconds or 0.0 for each in placed.values()]
            assert stall.waiting_seconds == max(waits)
            assert placed[stall.device].waiting_seconds == max(waits)


@pytest.mark.parametrize("activity", [a for a in Activity if a is not Activity.AWAITING_PLAN])
def test_own_time_beyond_the_deadline_is_a_failure_with_its_reasons(activity: Activity) -> None:
    liveness = watch(FIRST)
    learned = [span(4.0, activity), span(3.0, activity)]
    assert asked(liveness, beat(activity=activity, own=16.0, finished=learned)) == []
    [signal] = asked(liveness, beat(activity=activity, own=16.5))
    assert isinstance(signal, NoProgress)
    assert (signal.activity, signal.step, signal.own_seconds) == (activity, 7, 16.5)
    assert signal.deadline.seconds == 16.0
    assert signal.deadline.basis == "4 x the longest of the last 2, 4 s"


def test_the_worker_that_holds_all_others_up_is_blamed_and_they_are_not() -> None:
    liveness = watch(*DEVICES)
    waiting = [beat(device, waiting=50.0, finished=[span(0.1)]) for device in DEVICES[1:]]
    signals = asked(liveness, *waiting, beat(FIRST, own=50.0, finished=[span(0.1)]))
    assert [signal.device for signal in signals] == [FIRST]


def test_a_long_wait_is_not_held_against_the_worker_when_it_goes_on() -> None:
    liveness = watch(FIRST)
    assert asked(liveness, beat(own=0.5, waiting=50.0, finished=[span(0.1)])) == []
    assert asked(liveness, beat(own=0.75)) == []


def test_nothing_is_expected_of_a_worker_that_awaits_a_plan() -> None:
    liveness = watch(FIRST)
    assert asked(liveness, beat(activity=Activity.AWAITING_PLAN, own=1e6)) == []
    assert asked(liveness, beat(activity=Activity.AWAITING_PLAN, waiting=1e6)) == []
    assert liveness.stalled() is None


def test_a_changed_generation_is_learned_anew() -> None:
    """Anything cold tells of it, and its steps may take longer than any before it."""
    liveness = watch(FIRST)
    assert asked(liveness, beat(own=0.0, finished=[span(0.1)] * 50)) == []
    assert asked(liveness, beat(own=59.0, cold=True)) == []
    assert asked(liveness, beat(own=59.0, finished=[span(3.0, Activity.REBUILD, cold=True)])) == []
    assert asked(liveness, beat(own=0.0, finished=[span(5.0)])) == []
    assert [type(s) for s in asked(liveness, beat(own=21.0))] == [NoProgress]


@pytest.mark.parametrize(("short", "failures"), [(RECENT_SPANS - 1, 0), (RECENT_SPANS, 1)])
def test_only_recent_durations_count(short: int, failures: int) -> None:
    liveness = watch(FIRST)
    finished = [span(20.0), *[span(0.1)] * short]
    assert len(asked(liveness, beat(own=11.0, finished=finished))) == failures


def test_a_node_is_stalled_while_all_of_its_workers_wait_for_too_long() -> None:
    liveness = watch(*DEVICES)
    learned = [span(0.1, longest_wait=5.0)]
    stuck = [beat(device, waiting=21.0 + device.index, finished=learned) for device in DEVICES]
    assert asked(liveness, *stuck[:2], beat(DEVICES[2], waiting=60.0)) == []
    assert liveness.stalled() is None
    assert asked(liveness, stuck[2]) == []
    deadline = Deadline(20.0, "4 x the longest of the last 1, 5 s")
    stall = Stalled(DEVICES[2], 1, Activity.COMPUTING, 7, 3, 23.0, deadline)
    assert liveness.stalled() == liveness.stalled() == stall
    assert asked(liveness, beat(FIRST, waiting=0.5)) == []
    assert liveness.stalled() is None
    assert asked(liveness, stuck[0]) == []
    assert liveness.stalled() == stall


def test_a_node_is_not_stalled_until_whoever_is_to_be_killed_there_has_ended() -> None:
    liveness = watch(FIRST, DEVICES[1])
    assert asked(liveness, beat(DEVICES[1], waiting=61.0), beat(FIRST, own=61.0))
    assert liveness.stalled() is None
    liveness.ended(FIRST, 1)
    assert liveness.stalled() is not None


def test_a_node_is_not_stalled_while_somebody_there_is_silent() -> None:
    liveness = watch(FIRST, DEVICES[1])
    asked(liveness, beat(FIRST, waiting=61.0), beat(DEVICES[1], waiting=61.0))
    assert look_until(liveness, 0.0, 0.5) == ([], 0.5)
    assert liveness.stalled() is not None
    liveness.observe(beat(DEVICES[1], waiting=61.75), 0.75)
    assert liveness.stalled() is None
    liveness.observe(beat(FIRST, waiting=61.75), 0.75)
    assert liveness.stalled() is not None


def test_a_stall_is_of_the_oldest_generation_that_anybody_waits_in() -> None:
    liveness = watch(FIRST, DEVICES[1])
    asked(liveness, beat(FIRST, waiting=90.0, generation=5), beat(DEVICES[1], waiting=61.0))
    stall = liveness.stalled()
    assert stall is not None
    assert (stall.device, stall.generation, stall.waiting_seconds) == (DEVICES[1], 3, 61.0)


def test_a_spare_worker_does_not_hide_a_stall() -> None:
    liveness = watch(*DEVICES)
    asked(liveness, beat(FIRST, Activity.AWAITING_PLAN), beat(DEVICES[1], waiting=61.0))
    stall = liveness.stalled()
    assert stall is not None and stall.device == DEVICES[1]
