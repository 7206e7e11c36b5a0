"""The invariants of a run, held against every event: DESIGN.md sections 1, 5 and 6.

The oracle sees everything at once, which nobody in the run does: what is in the store and since
when, what each worker holds, and what its values should be.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import pieces
from avoidance import Avoidance
from clock import Clock
from pieces import REPLICATED, Piece, mix
from sim_process import Process
from sim_store import Told
from sim_worker import SimWorker

from elastic.effects import Finish, Note
from elastic.job_shape import JobShape
from elastic.keys import leader_key
from elastic.messages import (
    Adopt,
    AgentRecord,
    Failed,
    Fence,
    Leave,
    NodeReport,
    PlanChange,
    Quiesce,
    Stop,
    WholePlan,
)
from elastic.notes import EntryId, entry_id
from elastic.plan import Plan
from elastic.plan_chain import generation_of
from elastic.plan_change import changed
from elastic.session import StepPoint
from elastic.topology import Member
from ntp.atoms import Axis

JOB = "job"
EXCUSE_SECONDS = 12.0
"""So long after a disturbance a worker that works may still be taken for one that hangs."""


class Oracle:
    """Knows all.

    `calm_at` is when the last disturbance of store, network or agents ends; `journaled` are the
    entries that leaders wrote.
    """

    def __init__(self, clock: Clock, shape: JobShape) -> None:
        self.calm_at = 0.0
        self.plans: dict[int, Plan] = {}
        self.journaled: set[EntryId] = set()
        self.announcements: set[int] = set()
        self.avoidance = Avoidance(clock, shape)
        self._clock = clock
        self._shape = shape
        self._pieces: list[Piece] = [REPLICATED]
        self._pieces += [(axis, atom) for axis in Axis for atom in range(shape.counts.of(axis))]
        self._reference = [
            {
                (stage, piece): pieces.initial(piece, stage)
                for stage in range(shape.stages)
                for piece in self._pieces
            }
        ]
        self._committed: dict[Member, int] = {}
        self._prepared: dict[tuple[int, int], dict[Member, tuple[int, ...]]] = {}
        self._whole: set[tuple[int, int]] = set()
        self._announced = 1
        self._whole_plan = 0
        self._intended: dict[tuple[str, int], Plan] = {}
        self._leader: str | None = None
        self._failed: dict[Member, int] = {}
        self._lost: dict[Member, int] = {}
        self._torn: dict[Member, int] = {}
        self._answered: dict[tuple[int, Member], int] = {}
        self._processes: dict[Member, SimWorker] = {}
        self._stopped: set[Member] = set()

    def exists(self, worker: SimWorker) -> None:
        """A process was started."""
        self._processes[worker.member] = worker

    # What is written.

    def observe(self, process: Process, told: Told, before: Any) -> None:
        """A write to the store, by whom and instead of what."""
        value, check = told.value, self._clock.check
        self.avoidance.observe(told, before)
        if told.key == leader_key(JOB):
            self._leader = value
            return
        if isinstance(value, Quiesce | Adopt | PlanChange | WholePlan | Fence | Leave | Stop):
            check(process.name == self._leader, f"{process.name} wrote {told.key}, not leading")
        match value:
            case None:
                if isinstance(before, AgentRecord):
                    self._lost |= dict.fromkeys(before.ready, told.revision)
                    newest = self.plans.get(max(self.plans, default=0))
                    placed = {member for _, member in newest.placement} if newest else set()
                    self._torn |= dict.fromkeys(placed.intersection(before.ready), told.revision)
                elif isinstance(before, Adopt | PlanChange):
                    gone, kept = generation_of(before), self._whole_plan
                    check(gone < kept, f"plan {gone} is gone before {kept}")
            case WholePlan(plan):
                check(plan == self.plans[plan.generation], f"plan {plan.generation} is another one")
                self._whole_plan = plan.generation
            case Quiesce(generation):
                self.announcements.add(generation)
                check(
                    generation > self._announced or value == before,
                    f"generation {generation} was announced after {self._announced}",
                )
                self._announced = generation
            case Adopt() | PlanChange():
                plan = value.plan if isinstance(value, Adopt) else self._changed(process, value)
                check(before in (None, value), f"plan {plan.generation} is written twice")
                newest = max(self.plans, default=0)
                check(plan.generation > newest, f"plan {plan.generation} follows {newest}")
                check(
                    plan.generation == self._announced,
                    f"plan {plan.generation} answers announcement {self._announced}",
                )
                failed = {("failure", str(each.member)) for each in plan.participants}
                check(not failed & self.journaled, f"failed {failed & self.journaled} are placed")
                self._check_plan(plan)
                self.plans[plan.generation] = plan
            case Failed():
                member = Member(value.failure.device, value.failure.incarnation)
                check(self._processes[member].dead, f"{member} is reported, but lives")
                self._failed.setdefault(member, told.revision)
            case NodeReport():
                for answer in value.workers:
                    key = value.generation, answer.member
                    self._answered.setdefault(key, told.revision)
            case _:
                return

    def _changed(self, leader: Process, change: PlanChange) -> Plan:
        self._clock.check(
            change.base == max(self.plans),
            f"plan {change.generation} changes plan {change.base}, not the newest one",
        )
        plan = changed(self.plans[change.base], change)
        same = plan == self._intended[leader.name, plan.generation]
        self._clock.check(same, f"plan {change.generation} is not what the leader had")
        return plan

    # What a leader decides, knowing the store up to revision `seen`.

    def planned(self, leader: Process, plan: Plan, seen: int) -> None:
        """A leader is about to publish a plan."""
        self.avoidance.planned(leader.name, plan, seen)
        gone = {m for known in (self._failed, self._lost) for m, at in known.items() if at <= seen}
        self._intended[leader.name, plan.generation] = plan
        placed = {assignment.member for assignment in plan.participants}
        self._clock.check(not placed & gone, f"failed {_names(placed & gone)} are placed")

    def commands(self, leader: Process, message: Quiesce | Fence | Leave | Stop, seen: int) -> None:
        """A leader is about to give an order."""
        if leader.name != self._leader:
            # The store refuses what is ordered by one who lost the lead, and may know less.
            return
        match message:
            case Fence():
                answered = self._answered.get((self._announced, message.member))
                self._clock.check(
                    answered is None or answered > seen,
                    f"{message.member} is fenced, but answered {self._announced}",
                )
            case Quiesce() if message.sever_all:
                for member in {member for _, member in self.plans[max(self.plans)].placement}:
                    worker = self._processes[member]
                    waits = worker.awaits_plan or worker.groups.waits_since() is not None
                    self._clock.check(
                        waits or worker.hung or worker.dead or self._is_excused(worker),
                        f"everybody is said to wait, but {member} goes on",
                    )
            case Stop():
                self._stopped = {m for m, worker in self._processes.items() if not worker.dead}
            case _:
                return

    def noted(self, process: Process, note: Note) -> None:
        """A process writes to the journal. Who leads no more may not know it yet."""
        self.avoidance.noted(process.name, note)
        if process.name == self._leader:
            identity = entry_id(note.event, note.fields)
            self.journaled |= {identity} if identity else set()

    def fenced(self, worker: SimWorker) -> None:
        """An agent obeys the order to kill a worker."""
        self._clock.check(
            worker.hung or worker.dead or self._is_excused(worker),
            f"{worker.member} is fenced, but works",
        )

    def waits_no_more(self, worker: SimWorker, since: float) -> None:
        """By now a wait that nothing else would end, and that began before `since`, is over."""
        began = worker.groups.waits_since()
        self._clock.check(
            began is None or began > since or worker.dead or self._is_excused(worker),
            f"{worker.member} is left waiting",
        )

    def _is_excused(self, worker: SimWorker) -> bool:
        return self._clock.now < max(worker.excused_until, self.calm_at + EXCUSE_SECONDS)

    def _check_plan(self, plan: Plan) -> None:
        check = self._clock.check
        check(
            sum(plan.batch_split) == self._shape.global_batch_size,
            f"the batch {plan.batch_split} is not the global batch",
        )
        checked: list[object] = []
        for replica in plan.layout.replicas:
            if any(shards is replica.shards for shards in checked):
                continue
            checked.append(replica.shards)
            for axis in Axis:
                owners = Counter(
                    atom
                    for slot in replica.active
                    for atoms in replica.shards.owned(axis, slot)
                    for atom in range(atoms.start, atoms.stop)
                )
                whole = self._shape.counts.of(axis)
                check(
                    len(owners) == whole and set(owners.values()) <= {1},
                    f"{axis} of replica {replica.replica}: {owners}",
                )
        for assignment in plan.participants:
            worker = self._processes[assignment.member]
            if worker.layout_generation and not worker.dead:
                furthest = _furthest(worker)
                check(
                    plan.resume_step > furthest,
                    f"{worker.member} holds step {furthest}, to resume at {plan.resume_step}",
                )

    # What workers do.

    def prepared(self, worker: SimWorker) -> None:
        """A worker holds its reduced gradients."""
        key = worker.generation, worker.session.step
        self._prepared.setdefault(key, {})[worker.member] = tuple(worker.gradient.samples)

    def votes(self, worker: SimWorker) -> None:
        """A worker holds the vote of its step, and is about to commit."""
        plan, step, check = worker.plan, worker.session.step, self._clock.check
        assert plan is not None
        member, generation = worker.member, plan.generation
        prepared = self._prepared[generation, step]
        check(
            len(prepared) == len(plan.placement),
            "%s commits step %d of generation %d, for which only %s are prepared",
            *(member, step, generation, list(prepared)),
        )
        if (generation, step) not in self._whole:
            self._check_batch(plan, step)
            self._whole.add((generation, step))
        check(
            worker.answered <= generation,
            "%s commits in generation %d, but answered %d",
            *(member, generation, worker.answered),
        )
        for newer in range(generation + 1, max(self.plans) + 1):
            check(
                newer not in self.plans or step <= self.plans[newer].resume_step,
                "%s commits step %d in generation %d, but generation %d resumed before",
                *(member, step, generation, newer),
            )

    def _check_batch(self, plan: Plan, step: int) -> None:
        """The workers of a replica have the same samples, and the replicas the batch together."""
        prepared = self._prepared[plan.generation, step]
        batch: list[int] = []
        for replica, row in plan.rows().items():
            samples = {prepared[member] for _, member in row}
            self._clock.check(
                len(samples) == 1,
                "step %d: the slots of replica %d computed %s",
                *(step, replica, samples),
            )
            batch += next(iter(samples))
        self._clock.check(
            sorted(batch) == list(range(self._shape.global_batch_size)),
            "step %d was computed from the samples %s",
            *(step, sorted(batch)),
        )

    def committed(self, worker: SimWorker) -> None:
        """A worker committed: it is the next step of this process, and its values are right."""
        before = self._committed.get(worker.member, -1)
        after = worker.session.committed
        check = self._clock.check
        check(after > before, "%s went from step %d to %d", worker.member, before, after)
        check(worker.session.point is StepPoint.IDLE, "%s is in a step", worker.member)
        self._committed[worker.member] = after
        self._check_reference(worker)

    def switched(self, worker: SimWorker, plan: Plan) -> None:
        """A worker changed its layout: it holds what it owns, with the right values."""
        owned = set(pieces.owned(plan, worker.slot))
        wrong = worker.values.keys() ^ owned
        self._clock.check(not wrong, "%s holds %s too much or too little", worker.member, wrong)
        self._committed[worker.member] = worker.session.committed
        self._check_reference(worker)

    def _check_reference(self, worker: SimWorker) -> None:
        done = worker.session.committed + 1
        while len(self._reference) <= done:
            step, size = len(self._reference) - 1, self._shape.global_batch_size
            last = self._reference[-1]
            self._reference.append({p: mix(v, step, size) for p, v in last.items()})
        expected, stage = self._reference[done], worker.held_at.stage
        wrong = [p for p, value in worker.values.items() if expected[stage, p] != value]
        self._clock.check(
            not wrong,
            "%s after step %d: %s differ from the reference",
            worker.member,
            done - 1,
            wrong,
        )

    # The end.

    def ended(self, finished: Finish, seen: int) -> None:
        """The job is over: everything is done, or there is a true reason why it cannot be.

        Who ended it knew the store up to revision `seen`.
        """
        check = self._clock.check
        expected = {
            ("failure", str(member))
            for known in (self._failed, self._torn)
            for member, at in known.items()
            if at <= seen
        }
        expected |= {("plan", generation) for generation in self.plans}
        expected |= {("quiesce", generation) for generation in self.announcements}
        missing = sorted(expected - self.journaled)
        check(not missing, f"the journal lacks {missing}")
        gone = self._failed.keys() | self._lost.keys()
        workers = [self._processes[member] for member in self._stopped - gone]
        if finished.outcome == "completed":
            last = self._shape.steps - 1
            placed = {a.member for a in self.plans[max(self.plans)].placement}
            behind = [
                f"{w.member} at {w.session.committed}"
                for w in workers
                if w.member in placed and w.layout_generation and w.session.committed < last
            ]
            check(not behind, f"completed, but {behind} lack step {last}")
            return
        check(finished.outcome == "halted", f"ended as {finished.outcome}: {finished.reason}")
        check("recoveries" not in finished.reason, f"gave up: {finished.reason}")
        layouts = {w.layout_generation for w in workers} | {w.pending_generation for w in workers}
        whole = any(self._is_held(layout, workers) for layout in layouts - {0})
        whole = whole and "no slot has a worker" not in finished.reason
        check(not whole, f"halted although all is held: {finished.reason}")

    def _is_held(self, layout: int, workers: Sequence[SimWorker]) -> bool:
        """Whether all state is held in the layout of that generation, of the newest step."""
        held: set[tuple[int, Piece]] = set()
        newest = -1
        for worker in workers:
            if layout == worker.layout_generation:
                held |= {(worker.held_at.stage, piece) for piece in worker.values}
            elif layout == worker.pending_generation:
                held |= {(worker.place.stage, piece) for piece in worker.pending or ()}
            else:
                continue
            newest = max(newest, _furthest(worker))
        return held == set(self._reference[0]) and newest == max(map(_furthest, workers))


def _furthest(worker: SimWorker) -> int:
    """The newest step that this worker knows to be decided."""
    return max(worker.session.committed, worker.session.voted)


def _names(members: Iterable[Member]) -> str:
    return ", ".join(str(member) for member in sorted(members))
