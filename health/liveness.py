"""Which workers of a node hang: heartbeats in, signals out.

Pure. The agent says when a worker process starts and ends, hands over each heartbeat, and asks
`expired` with each look (`LivenessPolicy.look_seconds`). Four rules, each with its own limit in
the policy:

    NotReady       it sent no heartbeat since it started
    HeartbeatLost  its heartbeats ceased
    Stopped        the system says that the process is stopped: no need to wait for the generous
                   limit of the rule above
    NoProgress     they come, but the training thread is in one activity for too long and does not
                   wait for anybody

Limits on progress are learned from the spans that the worker finished, see `health.policy`. A cold
span makes it forget them, as the batch split or the layout may have changed. Who waits is never
blamed: somebody else holds it up, perhaps on another node. A node whose workers all wait for too
long cannot know who; `stalled` says so, for a controller that hears it of all nodes to judge.

A signal is given once, after which the process is about to be killed. Until it has ended, its node
is not stalled: whoever waits for it will be told.

An agent that was itself held up finds everybody silent, because it did not listen. So silence is
not measured in clock time but in *attention*: of the time between two calls of this object, only
as much counts as an agent that is well lets pass. A held-up agent is late, but accuses nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

from health.classify import HeartbeatLost, NoProgress, NotReady, Signal, Stopped
from health.events import DeviceId
from health.heartbeat import RECENT_SPANS, Activity, Heartbeat, Span
from health.policy import Deadline, LivenessPolicy, progress_deadline


@dataclass(frozen=True, slots=True)
class Stalled:
    """All workers of a node wait for others, each longer than it ever should; no failure in itself.

    The fields are those of the worker that has waited longest in the oldest generation.
    """

    device: DeviceId
    incarnation: int
    activity: Activity
    step: int
    generation: int
    waiting_seconds: float
    deadline: Deadline


@dataclass(slots=True)
class _Worker:
    """A process under watch. `heard_at` and `stopped_since` are readings of the attention.

    `heard_at` is that of its start until its first heartbeat. `spans` are warm, by activity.
    """

    incarnation: int
    heard_at: float
    stopped_since: float | None = None
    newest: Heartbeat | None = None
    accused: bool = False
    spans: dict[Activity, deque[Span]] = field(default_factory=dict)

    def learn(self, span: Span) -> None:
        if span.cold:
            self.spans.clear()
        else:
            self.spans.setdefault(span.activity, deque(maxlen=RECENT_SPANS)).append(span)

    def exceeded(
        self,
        policy: LivenessPolicy,
        current: Span,
        taken_seconds: float,
        seconds: Callable[[Span], float],
    ) -> Deadline | None:
        """The deadline below `taken_seconds`, from what `seconds` says of spans like `current`."""
        if taken_seconds <= policy.progress_floor_seconds:
            # No deadline is below it, and to learn one takes a look at all spans.
            return None
        known = () if current.cold else self.spans.get(current.activity, ())
        deadline = progress_deadline(policy, [seconds(span) for span in known])
        return deadline if taken_seconds > deadline.seconds else None


class Liveness:
    """Watch over the workers of one node. `now` is any monotonic clock, in seconds.

    Each method that takes `now` also counts as attention; `expired` should come after all
    heartbeats that have arrived.
    """

    def __init__(self, policy: LivenessPolicy, now: float) -> None:
        self._policy = policy
        self._workers: dict[DeviceId, _Worker] = {}
        self._called_at = now
        self._attention = 0.0

    def started(self, device: DeviceId, incarnation: int, now: float) -> None:
        """Watch this process, instead of an earlier one on its device."""
        self._attend(now)
        self._workers[device] = _Worker(incarnation, heard_at=self._attention)

    def ended(self, device: DeviceId, incarnation: int) -> None:
        """Watch this process no longer."""
        if self._watched(device, incarnation) is not None:
            del self._workers[device]

    def observe(self, heartbeat: Heartbeat, now: float) -> None:
        """A heartbeat arrived. One of a process that is not watched says nothing."""
        self._attend(now)
        worker = self._watched(heartbeat.device, heartbeat.incarnation)
        if worker is None:
            return
        worker.heard_at = self._attention
        worker.stopped_since = None
        worker.newest = heartbeat
        for span in heartbeat.finished:
            worker.learn(span)

    def expired(self, now: float, stopped: Collection[DeviceId]) -> list[Signal]:
        """The processes that hang. `stopped`: the devices whose processes the system calls so."""
        self._attend(now)
        found = []
        for device, worker in self._workers.items():
            if worker.accused:
                continue
            self._note_state(worker, device in stopped)
            signal = self._silence(device, worker) or self._standstill(worker)
            if signal is not None:
                worker.accused = True
                found.append(signal)
        return found

    def stalled(self) -> Stalled | None:
        """That nobody on this node can go on, as far as heartbeats told; None: somebody can."""
        workers = self._workers.values()
        verdicts = [
            self._stall(worker, worker.newest)
            for worker in workers
            if worker.newest is not None
            and worker.newest.current.activity is not Activity.AWAITING_PLAN
        ]
        stalls = [verdict for verdict in verdicts if verdict is not None]
        if len(stalls) < len(verdicts) or any(worker.accused for worker in workers):
            return None
        return min(stalls, key=lambda s: (s.generation, -s.waiting_seconds), default=None)

    def _attend(self, now: float) -> None:
        self._attention += min(now - self._called_at, 2 * self._policy.look_seconds)
        self._called_at = now

    def _watched(self, device: DeviceId, incarnation: int) -> _Worker | None:
        worker = self._workers.get(device)
        return worker if worker is not None and worker.incarnation == incarnation else None

    def _note_state(self, worker: _Worker, stopped: bool) -> None:
        if not stopped:
            worker.stopped_since = None
        elif worker.stopped_since is None:
            worker.stopped_since = self._attention

    def _silence(self, device: DeviceId, worker: _Worker) -> Signal | None:
        """The signal for a process that does not let itself be heard."""
        policy, incarnation = self._policy, worker.incarnation
        silent = self._attention - worker.heard_at
        if worker.stopped_since is not None:
            stopped = self._attention - worker.stopped_since
            if stopped >= policy.stopped_timeout_seconds:
                return Stopped(device, incarnation, stopped, silent)
        if worker.newest is None:
            late = silent >= policy.spawn_timeout_seconds
            return NotReady(device, incarnation, silent) if late else None
        if silent < policy.heartbeat_timeout_seconds:
            return None
        last = worker.newest.current
        limit = policy.heartbeat_timeout_seconds
        return HeartbeatLost(device, incarnation, silent, limit, last.activity, last.step)

    def _standstill(self, worker: _Worker) -> Signal | None:
        """The signal for a process that says itself that it does not get on."""
        newest = worker.newest
        if newest is None or newest.waiting_seconds is not None:
            return None
        current = newest.current
        if current.activity is Activity.AWAITING_PLAN:
            return None
        # Nothing is added for the time since the heartbeat: the activity may have ended by now.
        own = current.own_seconds
        deadline = worker.exceeded(self._policy, current, own, lambda span: span.own_seconds)
        if deadline is None:
            return None
        return NoProgress(
            newest.device, newest.incarnation, current.activity, current.step, own, deadline
        )

    def _stall(self, worker: _Worker, newest: Heartbeat) -> Stalled | None:
        """The stall that this worker is part of, if the others agree."""
        current, waiting = newest.current, newest.waiting_seconds
        # One that is silent may have gone on since, and its silence has a limit of its own.
        silent = self._attention - worker.heard_at > self._policy.overdue_seconds
        if waiting is None or silent:
            return None
        deadline = worker.exceeded(
            self._policy, current, waiting, lambda span: span.longest_wait_seconds
        )
        if deadline is None:
            return None
        return Stalled(
            device=newest.device,
            incarnation=newest.incarnation,
            activity=current.activity,
            step=current.step,
            generation=current.generation,
            waiting_seconds=waiting,
            deadline=deadline,
        )
