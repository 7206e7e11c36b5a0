"""What a worker tells of itself while it runs.

Pure. A heartbeat says two things. That it arrives shows that the process lives: a thread of its own
sends it, so it also comes while the training thread is blocked. What is in it shows whether the
training thread gets on: the activity, and for how long.

That time is divided into *own time* and *waits*. A worker waits while only others can make it go
on: in a collective, in a receive, for the rendezvous store, and also while the host waits for its
accelerator, which may be inside a collective. Own time is all the rest. A slow or dead worker makes
all its peers wait, but adds nothing to their own time, so own time can be held against a worker.

Heartbeats carry ages, never clock readings, so that clocks need not agree.

`ActivityLog` is the worker's side. The training thread writes to it and the heartbeat's thread
reads it without a lock: what it reads is one immutable value, replaced in one assignment, and
finished spans pass through a deque, whose operations are atomic.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from health.events import DeviceId

RECENT_SPANS = 64
"""How many of the latest spans of an activity count."""


class Activity(StrEnum):
    """What a training thread does. Nothing is expected of one that awaits a plan."""

    AWAITING_PLAN = "awaiting_plan"
    COMPUTING = "computing"
    GRADIENT_SYNC = "gradient_sync"
    VOTE = "vote"
    OPTIMIZER = "optimizer"
    REBUILD = "rebuild"
    RESHARD = "reshard"


@dataclass(frozen=True, slots=True)
class Span:
    """One uninterrupted stretch of an activity in `generation`, finished or under way.

    `cold`: it belongs to a change of generation or to the first step after one, in which caches are
    cold and buffers new; its duration says nothing of later ones. `own_seconds` is the time outside
    of waits, `longest_wait_seconds` the longest single wait that is over (0: none).
    """

    activity: Activity
    step: int
    generation: int
    cold: bool
    own_seconds: float
    longest_wait_seconds: float


@dataclass(frozen=True, slots=True)
class Heartbeat:
    """A sign of life of process `incarnation` on `device`.

    `waiting_seconds` is the age of the wait that the training thread is in, None outside of one.
    `finished` are the spans that ended since the previous heartbeat, oldest first.
    """

    device: DeviceId
    incarnation: int
    current: Span
    waiting_seconds: float | None
    finished: tuple[Span, ...]


class _Running(NamedTuple):
    """The span under way; `began` is a reading of the worker's clock."""

    activity: Activity
    step: int
    generation: int
    cold: bool
    began: float


_Waits = tuple[_Running, float, float, float | None]
"""The span under way, the seconds of its waits that are over, the longest of them, and when the one
under way began (None: none). A bare tuple, as it is replaced twice in every wait, of which a step
has dozens: a dataclass, or one with names, would take several times as long."""

_Ended = tuple[_Running, float, float, float]
"""What `_span` takes, which is called once there is time for it."""


def _span(running: _Running, waited: float, longest: float, until: float) -> Span:
    return Span(
        running.activity,
        running.step,
        running.generation,
        running.cold,
        own_seconds=until - running.began - waited,
        longest_wait_seconds=longest,
    )


class ActivityLog:
    """Keeps track of one training thread. `now` is a monotonic clock of the worker, in seconds.

    `begin`, `wait` and `resume` are for one thread at a time, `heartbeat` is for any other.
    """

    def __init__(self, device: DeviceId, incarnation: int, now: float) -> None:
        self._device = device
        self._incarnation = incarnation
        self._state: _Waits = (_Running(Activity.AWAITING_PLAN, 0, 0, True, now), 0.0, 0.0, None)
        # For the training thread alone.
        self._depth = 0
        self._finished: deque[_Ended] = deque(maxlen=RECENT_SPANS * len(Activity))

    def begin(
        self, activity: Activity, step: int, now: float, *, generation: int, cold: bool
    ) -> None:
        """The activity under way ends, and another begins."""
        running, waited, longest, _ = self._state
        assert self._depth == 0, f"{running.activity} ended inside a wait"
        self._finished.append((running, waited, longest, now))
        self._state = (_Running(activity, step, generation, cold, now), 0.0, 0.0, None)

    def wait(self, now: float) -> None:
        """A wait for others begins. One inside another is part of that."""
        if not self._depth:
            running, waited, longest, _ = self._state
            self._state = (running, waited, longest, now)
        self._depth += 1

    def resume(self, now: float) -> None:
        """The wait begun last is over."""
        running, waited, longest, since = self._state
        assert since is not None, f"{running.activity} resumed without a wait"
        self._depth -= 1
        if not self._depth:
            seconds = now - since
            self._state = (
                running,
                waited + seconds,
                seconds if seconds > longest else longest,
                None,
            )

    def heartbeat(self, now: float) -> Heartbeat:
        """The heartbeat to send now; finished spans are handed out once."""
        ended = [self._finished.popleft() for _ in range(len(self._finished))]
        finished = tuple(_span(*each) for each in ended)
        running, waited, longest, since = self._state
        current = _span(running, waited, longest, now if since is None else since)
        waiting = None if since is None else now - since
        return Heartbeat(self._device, self._incarnation, current, waiting, finished)
