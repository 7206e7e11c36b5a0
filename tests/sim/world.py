"""A simulated cluster in virtual time around the real controller.

Real: Controller, what it reads from the store, planner, Membership, Session, layouts and reshard
plans. Simulated: workers (`sim_worker`) and their communicators (`links`) over a network, agents
(`sim_agent`), candidates for the lead (`sim_candidate`) and the store (`sim_store`). What goes
wrong is `luck`'s; what must hold is the `oracle`'s, whose first complaint ends the run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from clock import Clock
from links import Comm
from luck import Luck
from network import Network
from oracle import Oracle
from sim_agent import SimAgent
from sim_candidate import Candidate
from sim_groups import GroupKey
from sim_process import Process
from sim_store import SimStore, Told
from sim_worker import SimWorker

from elastic.effects import Finish, Phase
from elastic.job_shape import JobShape, PlacementRules
from elastic.keys import job_prefix
from elastic.plan import Plan
from elastic.topology import DeviceId, Member
from elastic.workload import SplitBatchBy
from ntp.atoms import AtomCounts, AtomSizes
from ntp.groups import GroupSpec, groups_of
from ntp.sync_plan import SyncPlan, plan_sync

PATIENCE_SECONDS = 120.0
"""Virtual time after the last strike, or its end, in which a job must be completed or halted."""

GRIDS = ((2, 1, 2), (2, 1, 2), (3, 1, 2), (2, 1, 3), (4, 1, 2), (1, 1, 3), (2, 2, 2), (2, 3, 2))
"""Tensor-parallel degree, pipeline stages and replicas."""
SPARES = (0, 0, 0, 1, 2)
"""Devices beyond the grid."""


@dataclass(frozen=True, slots=True)
class Ended:
    """How a simulated run ended.

    `salvages` counts the plans that keep gradients of a step, `leaders` the terms of leaders.
    """

    outcome: str
    reason: str
    generations: int
    salvages: int
    leaders: int
    at: float


class World:
    """One run."""

    def __init__(self, seed: int) -> None:
        self.clock = clock = Clock(seed)
        self.shape = _shape(clock)
        self.devices = _devices(clock, self.shape)
        self.oracle = Oracle(clock, self.shape)
        self.store = SimStore(clock, self._observe)
        self.network = Network(clock, self._serves)
        self.finished: Finish | None = None
        nodes = sorted({device.node for device in self.devices})
        self.agents = {
            node: SimAgent(self, node, tuple(d for d in self.devices if d.node == node))
            for node in nodes
        }
        self.candidates = [Candidate(self, f"controller {n}") for n in ("A", "B", "C")]
        self.luck = Luck(self)
        self._communicators: dict[tuple[int, GroupKey], Comm] = {}
        self._shrunk: dict[tuple[int, GroupKey], bool] = {}
        self._sync: dict[int, SyncPlan] = {}
        self._digests: dict[int, tuple[Plan, str]] = {}
        self._terms = 0

    def run(self) -> Ended:
        """Play the whole story."""
        clock = self.clock
        for agent in self.agents.values():
            clock.after(clock.rng.random(), agent.start)
        for candidate in self.candidates:
            clock.after(clock.rng.random(), candidate.start)
        self.luck.begin()
        while self.finished is None:
            clock.play()
            if clock.now > PATIENCE_SECONDS + max(self.oracle.calm_at, self.luck.struck_at):
                raise clock.violation("stuck")
        finished = self.finished
        return Ended(
            finished.outcome,
            finished.reason,
            max(self.oracle.plans, default=0),
            sum(plan.salvage is not None for plan in self.oracle.plans.values()),
            self._terms,
            clock.now,
        )

    def finish(self, finish: Finish, seen: int) -> None:
        """A leader ended the job, knowing the store up to revision `seen`."""
        self.finished = finish
        self.oracle.ended(finish, seen)

    def disturb(self, seconds: float) -> None:
        """Something that slows everything down begins, and lasts so long."""
        self.oracle.calm_at = max(self.oracle.calm_at, self.clock.now + seconds)

    # Processes.

    def workers(self) -> list[SimWorker]:
        """All worker processes."""
        return [worker for agent in self.agents.values() for worker in agent.workers()]

    def kill(
        self, worker: SimWorker, returns: Sequence[str] = ("at once", "later", "later", "never")
    ) -> None:
        """A worker dies; its agent will notice, and replaces it in one of these ways."""
        if worker.dead:
            return
        self.end_process(worker)
        clock = self.clock
        replaced = clock.rng.choice(returns)
        agent = self.agents[worker.member.device.node]
        if agent.life is not None:
            clock.after(clock.delay(0.3), agent.process.call, agent.life.ended, worker, replaced)

    def end_process(self, worker: SimWorker) -> None:
        """A worker is no more: its connections break."""
        if not worker.dead:
            self.clock.tell("%s dies in step %d", worker.member, worker.session.step)
            worker.process.dead = True
            self.sever(worker)

    def sever(self, worker: SimWorker) -> None:
        """The connections of a worker are gone."""
        for comm in self._communicators.values():
            comm.cut(worker.member)

    # What workers meet in.

    def communicator(
        self, plan: Plan, key: GroupKey, members: tuple[Member, ...], *, shrunk: bool
    ) -> Comm:
        """The communicator that all members of a generation build together, in the same way."""
        name = plan.generation, key
        alike = self._shrunk.setdefault(name, shrunk) == shrunk
        self.clock.check(alike, "some ranks shrink the group %s, and others make it anew", key)
        if name not in self._communicators:
            star = self.clock.rng.random() < 0.5
            self._communicators[name] = Comm(
                self.clock, self.network, members, plan.rendezvous, star
            )
        return self._communicators[name]

    def groups_of(self, plan: Plan, rank: int) -> tuple[GroupSpec, ...]:
        """`Plan.groups_of`, which does the same work for every rank."""
        if (sync := self._sync.get(plan.generation)) is None:
            sync = self._sync[plan.generation] = plan_sync(plan.layout)
        return groups_of(rank, plan.layout, sync, plan.stages, len(plan.donors))

    def digest(self, plan: Plan) -> str:
        """`Plan.digest`, likewise."""
        if id(plan) not in self._digests:
            # Kept with the plan, whose identity is its own only as long as it lives.
            self._digests[id(plan)] = plan, plan.digest
        return self._digests[id(plan)][1]

    def _serves(self, rendezvous: str) -> int | None:
        node, life = rendezvous.removeprefix("node").split(":")
        return int(node) if self.agents[int(node)].serves(int(life)) else None

    # What luck waits for.

    def reached(self, worker: SimWorker, point: str) -> None:
        """A worker's step came to a point."""
        self.luck.reached(worker, point)

    def entered(self, phase: Phase) -> None:
        """A controller came to a phase."""
        self.luck.happened(phase)

    def _observe(self, process: Process, told: Told, before: Any) -> None:
        self.oracle.observe(process, told, before)
        kind = told.key.removeprefix(job_prefix("job")).partition("/")[0]
        self._terms += kind == "leader" and told.value is not None
        self.luck.happened(kind if told.value is not None else f"no {kind}")


def _shape(clock: Clock) -> JobShape:
    rng = clock.rng
    tensor, stages, replicas = rng.choice(GRIDS)
    return JobShape(
        counts=AtomCounts(4, rng.randint(4, 7), rng.randint(4, 6)),
        sizes=(AtomSizes(7, 3, 2, 5),) * stages,
        tensor=tensor,
        stages=stages,
        replicas=replicas,
        global_batch_size=2 * rng.randint(replicas, 6),
        micro_batch_size=2,
        steps=rng.randint(6, 12),
        split_batch_by=list(SplitBatchBy)[clock.seed % len(SplitBatchBy)],
        rules=PlacementRules(tensor_across_nodes=clock.seed % 4 != 0),
    )


def _devices(clock: Clock, shape: JobShape) -> tuple[DeviceId, ...]:
    size = shape.workers + clock.rng.choice(SPARES)
    per_node = clock.rng.choice((1, shape.tensor, shape.tensor * shape.stages, size))
    return tuple(DeviceId(rank // per_node, rank % per_node) for rank in range(size))
