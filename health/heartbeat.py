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
reads it without a lock: the span under way and its list of readings are replaced in one assignment,
and to append to a list, to copy it, and to pass finished spans through a deque are atomic.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
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


_Account = tuple[_Running, list[float]]
"""The span under way, and when its waits began and were over, in turns: an odd number of readings
means that one is under way."""


def _span(running: _Running, readings: Sequence[float], until: float) -> Span:
    """The span as it is at the reading `until`. A wait that is under way counts neither as own time
    nor as a wait."""
    waits = [end - begin for begin, end in zip(readings[::2], readings[1::2], strict=False)]
    own_until = readings[-1] if len(readings) % 2 else until
    return Span(
        running.activity,
        running.step,
        running.generation,
        running.cold,
        own_seconds=own_until - running.began - sum(waits),
        longest_wait_seconds=max(waits, default=0.0),
    )


class ActivityLog:
    """Keeps track of one training thread. `now` is a monotonic clock of the worker, in seconds.

    `begin`, `wait` and `resume` are for one thread at a time, `heartbeat` is for any other. A wait
    begins with ``wait(now)`` and is over with ``resume(now)``; it has no other within it.
    """

    def __init__(self, device: DeviceId, incarnation: int, now: float) -> None:
        self._device = device
        self._incarnation = incarnation
        # Each ended span with its readings and its end: `_span` is called once there is time.
        self._finished: deque[tuple[_Running, list[float], float]] = deque(
            maxlen=RECENT_SPANS * len(Activity)
        )
        self._turn_to(_Running(Activity.AWAITING_PLAN, 0, 0, True, now))

    def begin(
        self, activity: Activity, step: int, now: float, *, generation: int, cold: bool
    ) -> None:
        """The activity under way ends, and another begins."""
        running, readings = self._account
        assert len(readings) % 2 == 0, f"{running.activity} ended inside a wait"
        self._finished.append((running, readings, now))
        self._turn_to(_Running(activity, step, generation, cold, now))

    def heartbeat(self, now: float) -> Heartbeat:
        """The heartbeat to send now; finished spans are handed out once."""
        ended = [self._finished.popleft() for _ in range(len(self._finished))]
        finished = tuple(_span(*each) for each in ended)
        running, growing = self._account
        readings = growing.copy()
        current = _span(running, readings, now)
        waiting = now - readings[-1] if len(readings) % 2 else None
        return Heartbeat(self._device, self._incarnation, current, waiting, finished)

    def _turn_to(self, running: _Running) -> None:
        readings: list[float] = []
        self._account: _Account = running, readings
        # A step has dozens of waits, and Python that runs between two kernels finds its caches
        # cold: a function of ours would take several microseconds each time.
        self.wait: Callable[[float], None] = readings.append
        self.resume: Callable[[float], None] = readings.append
