"""Step reports of all ranks -> how long each replica takes for a sample.

Pure. A replica is as slow as its slowest slot, so a step counts once all its slots reported it. The
first step of a generation does not count, as buffers are new and caches cold, nor does one before
it, which was computed in another. Later ones enter an exponential moving average, which starts anew
when the replica's layout changes; until then the figure of the old layout stands, for the planner
to scale by the work that the new one means.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from elastic.messages import StepDone
from elastic.plan import Plan
from elastic.topology import Member
from ntp.geometry import ReplicaLayout

NEWEST_WEIGHT = 0.2
"""Weight of a new step in the average: after ten steps it is mostly about these."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Seconds that a replica computes for one sample, measured while it had `layout`."""

    seconds_per_sample: float
    layout: ReplicaLayout


class _Share(NamedTuple):
    """What one replica is in a plan, and how many samples it gets."""

    layout: ReplicaLayout
    samples: int


class PaceLog:
    """Collects reports; `paces` has the present figure of each replica that has one.

    `plans` are those of the run by generation, and may grow.
    """

    def __init__(self, plans: Mapping[int, Plan]) -> None:
        self._plans = plans
        self._seconds: dict[int, dict[tuple[int, int], dict[Member, float]]] = {}
        self._shares: tuple[int, Mapping[int, _Share]] = (0, {})
        self.paces: dict[int, Pace] = {}

    def take(self, report: StepDone) -> None:
        """Add one report."""
        plan = self._plans.get(report.generation)
        if plan is None or report.step <= plan.resume_step:
            return
        share = self._shares_of(plan).get(report.replica)
        if share is None:
            return
        steps = self._seconds.setdefault(report.replica, {})
        attempt = (report.generation, report.step)
        seconds = steps.setdefault(attempt, {})
        seconds[report.member] = report.compute_seconds
        if len(seconds) < share.layout.degree * plan.stages:
            return
        # What an earlier step still lacks will hardly come: a rank of it is gone.
        self._seconds[report.replica] = {key: steps[key] for key in steps if key > attempt}
        self._average(report.replica, max(seconds.values()) / share.samples, share.layout)

    def _shares_of(self, plan: Plan) -> Mapping[int, _Share]:
        """By replica. Reports come by the thousand, and mostly of one generation."""
        if self._shares[0] != plan.generation:
            pairs = zip(plan.layout.replicas, plan.batch_split, strict=True)
            self._shares = plan.generation, {r.replica: _Share(r, n) for r, n in pairs}
        return self._shares[1]

    def _average(self, replica: int, newest: float, layout: ReplicaLayout) -> None:
        known = self.paces.get(replica)
        if known is not None and known.layout == layout:
            newest = NEWEST_WEIGHT * newest + (1 - NEWEST_WEIGHT) * known.seconds_per_sample
        if newest > 0:
            self.paces[replica] = Pace(newest, layout)
