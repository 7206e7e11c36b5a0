"""A simulated node's look at its workers: their hearts, and `NodeWorkers.watch`.

The judgement is the real `health.liveness`. Who hangs is luck's to say, so only stalls are asked
for.
"""

from __future__ import annotations

from collections.abc import Iterable

from clock import Clock
from sim_worker import SimWorker

from elastic.topology import Member
from health.heartbeat import Activity, Heartbeat, Span
from health.liveness import Liveness, Stalled
from health.policy import LivenessPolicy

LOOK_SECONDS = 0.5
LOOKS_PER_BEAT = 6
"""So that some steps fall between two heartbeats, as they do where steps are short."""
POLICY = LivenessPolicy(
    heartbeat_seconds=LOOK_SECONDS,
    heartbeat_timeout_seconds=1000.0,
    stopped_timeout_seconds=1000.0,
    spawn_timeout_seconds=1000.0,
    progress_floor_seconds=2.0,
    progress_factor=2.0,
    progress_initial_seconds=60.0,
)
_LEARNED = (Span(Activity.COMPUTING, 0, 0, cold=False, own_seconds=0.1, longest_wait_seconds=0.1),)


class Watch:
    """Watch over the processes of one life of an agent."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._liveness = Liveness(POLICY, clock.now)
        self._looks = 0

    def started(self, member: Member) -> None:
        """A process was started."""
        self._liveness.started(member.device, member.incarnation, self._clock.now)

    def ended(self, member: Member) -> None:
        """It is gone."""
        self._liveness.ended(member.device, member.incarnation)

    def look(self, workers: Iterable[SimWorker]) -> Stalled | None:
        """Hear those that are not stopped, and judge."""
        self._looks += 1
        for worker in workers:
            if not worker.dead and not worker.hung:
                if self._looks % LOOKS_PER_BEAT == 0:
                    worker.link.beat()
                self._liveness.observe(_heartbeat(worker), self._clock.now)
        assert not self._liveness.expired(self._clock.now, ()), "who hangs is luck's to say"
        return self._liveness.stalled()


def _heartbeat(worker: SimWorker) -> Heartbeat:
    activity = Activity.AWAITING_PLAN if worker.awaits_plan else Activity.COMPUTING
    since = worker.groups.waits_since()
    return Heartbeat(
        worker.member.device,
        worker.member.incarnation,
        Span(activity, worker.session.step, worker.generation, worker.cold, 0.0, 0.0),
        worker.clock.now - since if since is not None else None,
        _LEARNED,
    )
