"""A simulated worker process: `elastic.worker` and `trainer.loop`, statement by statement.

The training thread is a generator that yields what it blocks on. `hear` is the link's thread: it
runs whenever a message arrives, also while the training thread is blocked. Decisions, plans,
sessions and standings are the product's own.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pieces
from links import Broken, StepAborted
from pieces import Values, mix
from sim_gradient import Gradient
from sim_groups import Groups, keepable, kept_through, replica_groups
from sim_link import SimLink
from sim_process import Mailbox, Process, Task, Wait
from sim_report import step_done

from elastic.messages import (
    Adopt,
    AgentMessage,
    ConnectionLost,
    PhaseDone,
    PlanChange,
    Quiesce,
    Quiesced,
    Ready,
    RecoveryPhase,
    Stop,
)
from elastic.plan import Plan
from elastic.plan_chain import PlanChain
from elastic.session import Session, StepPoint, standing
from elastic.topology import Coordinate, Member
from ntp.geometry import SlotRef
from ntp.groups import GroupAxis

if TYPE_CHECKING:
    from world import World

Thread = Generator[Wait, Any, None]


class SimWorker:
    """One process. `wrote` is called when it has written to its agent, into `link.pipe`."""

    def __init__(self, world: World, member: Member, wrote: Callable[[SimWorker], None]) -> None:
        self.member = member
        self.world = world
        self.clock = world.clock
        self.oracle = world.oracle
        self.process = Process(world.clock, str(member))
        self.excused_until = 0.0
        self.plan_due = 0.0
        self.session = Session()
        self.plan: Plan | None = None
        self.values: Values = {}
        self.gradient = Gradient()
        self.pending: Values | None = None
        self.layout_generation = 0
        self.pending_generation = 0
        self.answered = 0
        self.link = SimLink(partial(wrote, self))
        self.groups = Groups(member)
        self.place = self.held_at = Coordinate(0, 0, 0)
        self._step_started = (0, 0)
        self._quiesce: Quiesce | None = None
        self._plans = PlanChain()
        self._inbox = Mailbox()
        self._in_model = False
        self.awaits_plan = self.cold = True
        self._pending_gradient = Gradient()
        self._thread = Task(self.process, self._life())

    def start(self) -> None:
        """Run the training thread up to its first wait."""
        self._thread.start()

    @property
    def dead(self) -> bool:
        """Whether the process is no more."""
        return self.process.dead

    @property
    def hung(self) -> bool:
        """Whether the process is stopped."""
        return self.process.stopped

    def hear(self, message: AgentMessage) -> None:
        """The link's thread: end what cannot complete any more, then queue the message."""
        if isinstance(message, Quiesce):
            self._quiesce = message
            if message.urgent:
                self.groups.stop(kept_through(message, self.plan, self.member))
        if isinstance(message, Adopt | PlanChange):
            self._plans.take(message)
            plan = self._plans.newest()
            assert plan is not None
            message = Adopt(plan)
        self._inbox.put(message)

    # The training thread.

    def _life(self) -> Thread:
        self.link.send(Ready(self.member))
        while (plan := (yield from self._await_plan())) is not None:
            try:
                yield from self._adopt(plan)
                if self.plan is not None:
                    yield from self._run()
            except (Broken, StepAborted) as error:
                self._interrupted(error)

    def _run(self) -> Thread:
        paused = False
        while not paused and self.session.step < self.world.shape.steps:
            place = self.place
            tensor = self.groups.comms[GroupAxis.TENSOR, (place.replica, place.stage)]
            pipeline = self.groups.comms.get((GroupAxis.PIPELINE, (place.replica, place.slot)))
            assert self.plan is not None
            self.session = self.session.start()
            self.gradient.begin(self.clock, self.plan, place.replica, self.session.step)
            self._step_started = (self.generation, place.replica)
            self._in_model = True
            self.world.reached(self, "computing")
            yield tensor.join(self.member)
            if pipeline is not None:
                yield pipeline.join(self.member)
            yield self._sleep(0.5)
            # Backends differ in whether a sync that begins within backward reduces at once.
            self.gradient.mixed = self.clock.seed % 2 == 0 and not self._stop_requested
            yield tensor.join(self.member)
            if pipeline is not None:
                yield pipeline.join(self.member)
            self._in_model = False
            self.gradient.complete()
            if self.unmixed() and self._stop_requested:
                self.session = self.session.keep(self.generation)
            self._check()
            self.gradient.mixed = True
            yield from self._synchronize()
            self.session = self.session.prepare()
            self.oracle.prepared(self)
            self.world.reached(self, "prepared")
            vote = yield from self.vote()
            self.session = self.session.hold_vote(vote)
            self.world.reached(self, "voted")
            yield self._sleep(0.1)
            self.oracle.votes(self)
            self._commit(vote)
            self.world.reached(self, "committed")
            paused = vote[1] > 0

    def _synchronize(self) -> Thread:
        assert self.plan is not None
        place = self.place
        if (home := self.groups.comms.get((GroupAxis.HOME, (place.stage, place.slot)))) is not None:
            yield home.join(self.member)
        if any(replica.degree < self.plan.layout.tp_base for replica in self.plan.layout.replicas):
            # The exchange with the replicas where a slot is vacant.
            yield self.groups.stage(self.place.stage).join(self.member)

    def vote(self) -> Generator[Wait, Any, tuple[float, ...]]:
        """`trainer.loop`'s all-reduce over all ranks."""
        assert self.plan is not None
        first = self.place.slot == self.plan.layout.replica(self.place.replica).active[0]
        speaks = first and self.place.stage == 0
        pause = self._quiesce is not None and self._quiesce.generation > self.generation
        mine = (float(len(self.gradient.samples)) if speaks else 0.0, float(pause))
        given = yield self.groups.world.join(self.member, mine)
        return sum(each[0] for each in given), sum(each[1] for each in given)

    def _await_plan(self) -> Generator[Wait, Any, Plan | None]:
        announced = self.generation
        self.awaits_plan = self.cold = True
        while True:
            match (yield self._inbox.get):
                case Quiesce() as quiesce:
                    announced = quiesce.generation
                    self._answer(quiesce)
                case Adopt(adopted) if self.may_adopt(adopted, announced):
                    return adopted
                case Adopt(plan) if plan.generation > self.generation and not self._takes_part(
                    plan
                ):
                    announced = max(announced, plan.generation)
                    self.leave()
                case Stop():
                    return None
                case _:
                    continue

    def may_adopt(self, plan: Plan, announced: int) -> bool:
        """The guard of `Worker.await_plan`."""
        return (
            plan.generation > self.generation
            and plan.generation >= announced
            and self._takes_part(plan)
        )

    def _adopt(self, plan: Plan) -> Thread:
        self.clock.check(
            plan.generation >= self.answered,
            f"{self.member} acts on plan {plan.generation}, overtaken by {self.answered}",
        )
        self.plan, self._in_model, self.awaits_plan = plan, False, False
        rank = [assignment.member for assignment in plan.participants].index(self.member)
        donates = rank >= len(plan.placement)
        yield self._sleep(0.1)
        place = plan.participants[rank].coordinate
        self._settle(plan, place.replica)
        self.place = place
        yield from self._build(plan, rank)
        self._check()
        digests = yield self.groups.meeting.join(self.member, self.world.digest(plan))
        self.clock.check(len(set(digests)) == 1, "the ranks hold different plans")
        self._done(RecoveryPhase.REBUILD)
        yield from self._reshard(plan)
        if not donates:
            self.pending_generation = plan.generation
            self.session = replace(self.session, committed=plan.resume_step - 1)
        self._done(RecoveryPhase.RESHARD)
        yield self.groups.meeting.join(self.member)
        if donates:
            self._done(RecoveryPhase.RESUME)
            self._forget()
            return
        self._promote()
        self.layout_generation, self.pending_generation = plan.generation, 0
        self.oracle.switched(self, plan)
        self._done(RecoveryPhase.RESUME)

    def _build(self, plan: Plan, rank: int) -> Thread:
        kept = (
            replica_groups(self.plan, self.member)
            if self.place.replica in plan.kept_replicas
            else {}
        )
        wanted = {
            (spec.axis, spec.index): tuple(plan.participants[r].member for r in spec.ranks)
            for spec in self.world.groups_of(plan, rank)
        }
        yield from self.groups.adopt(plan, wanted, kept, self.world.communicator)

    def _reshard(self, plan: Plan) -> Thread:
        stage, slot = self.place.stage, self.slot
        moves_away = any(member == self.member for _, member in plan.movers)
        # A mover sends what it holds of its old place.
        old = self.held_at if moves_away else self.place
        try:
            letters = pieces.sent(plan, old.stage, old.slot_ref, self.values)
        except KeyError as piece:
            raise self.clock.violation(f"{self.member} is to send {piece}, lacks it") from piece
        sources = frozenset(pieces.senders(plan, stage, slot))
        posted = yield self.groups.meeting.exchange(self.member, letters, sources)
        if slot in plan.layout.slots():
            after = pieces.begun(plan, stage, slot, {} if moves_away else self.values)
            for letters in posted:
                gained = pieces.received(letters, slot)
                twice = sorted(map(str, gained.keys() & after.keys()))
                self.clock.check(not twice, "%s gets %s twice", slot, twice)
                after |= gained
            self.pending = after
            stays = bool(self.values) and self.held_at == self.place
            self._pending_gradient = self.gradient.under(plan, slot.replica, stays)

    # What the training thread does between waits.

    def leave(self) -> None:
        """Others go on without this worker (`Worker.leave`)."""
        self._forget()
        self.groups.close()

    def _forget(self) -> None:
        self.values, self.pending, self.gradient = {}, None, Gradient()
        self.plan, self.session = None, Session()
        self.layout_generation = self.pending_generation = 0

    def _settle(self, plan: Plan, replica: int) -> None:
        if plan.source_generation and plan.source_generation == self.pending_generation:
            self._promote()
            self.layout_generation = self.pending_generation
        else:
            self.pending = None
        self.pending_generation = 0
        if not plan.survives(self.member):
            self.session, self.layout_generation = Session(), 0
        has_state = self.layout_generation > 0
        if not has_state:
            self.values = {}
        if has_state and self.session.committed < plan.resume_step - 1:
            self.clock.check(
                plan.apply_vote is not None, f"{self.member} lacks a step the plan skips"
            )
            assert plan.apply_vote is not None
            if self.session.point is StepPoint.PREPARED:
                self.session = self.session.hold_vote(plan.apply_vote)
            self.clock.check(
                self.session.point is StepPoint.VOTED,
                f"{self.member} is to apply step {self.session.step}, but is {self.session.point}",
            )
            self._commit(plan.apply_vote)
            self.cold = True
        kept = plan.kept_from(replica) if has_state else 0
        self.clock.check(
            kept in (0, self.session.kept), "%s is told to keep what it lacks", self.member
        )
        self.session = self.session.drop(salvaged=kept > 0)
        self.clock.check(
            not has_state or self.session.committed == plan.resume_step - 1,
            "%s committed %d, to resume at %d",
            *(self.member, self.session.committed, plan.resume_step),
        )

    def _commit(self, vote: tuple[float, ...]) -> None:
        step = self.session.step
        self.clock.check(
            vote[0] == self.world.shape.global_batch_size, "step %d had %s samples", step, vote[0]
        )
        for piece, value in self.values.items():
            self.values[piece] = mix(value, step, vote[0])
        self.session = self.session.commit()
        self.cold = False
        self.oracle.committed(self)
        now = self.clock.now
        assert self.plan is not None
        awaited = step == self.world.shape.steps - 1 or self.plan.speaks(self.member)
        tell = self.link.send if awaited else self.link.send_later
        tell(step_done(self.member, *self._step_started, step, vote, now, awaited=awaited))

    def _promote(self) -> None:
        assert self.pending is not None
        self.values, self.pending = self.pending, None
        self.gradient = self._pending_gradient
        self.held_at = self.place

    def _answer(self, quiesce: Quiesce) -> None:
        self.answered = quiesce.generation
        held = None
        if self.layout_generation or self.pending_generation:
            held = standing(
                self.slot, self.session, self.layout_generation, self.pending_generation
            )
        intact = self.groups.replica_is_intact(self.plan)
        unbroken = self.groups.unbroken
        now = self.clock.now
        self.link.send(Quiesced(quiesce.generation, self.member, held, intact, now, unbroken))

    def _interrupted(self, error: Exception) -> None:
        self.groups.sever(keepable(self.plan, self.member) if self.may_keep() else frozenset())
        if self._quiesce is None or self._quiesce.generation <= self.generation:
            self.link.send(ConnectionLost(self.generation, self.member, str(error)))

    def may_keep(self) -> bool:
        """Whether an interrupted worker may keep its tensor-parallel group.

        Not in the vote, nor in the barrier of a layout: its mates may have passed, and wait for it
        in the next step. Nor where the group itself broke: its other members may wait for it.
        """
        in_vote = self.session.point is StepPoint.PREPARED
        in_barrier = self.pending_generation > 0
        return not in_vote and not in_barrier and not self._in_model

    def unmixed(self) -> bool:
        """Whether no other replica's gradients came into this worker's."""
        return not self.gradient.mixed

    @property
    def _stop_requested(self) -> bool:
        quiesce = self._quiesce
        return quiesce is not None and quiesce.urgent and quiesce.generation > self.generation

    def _check(self) -> None:
        if self._stop_requested:
            raise StepAborted("a new generation was announced")

    @property
    def generation(self) -> int:
        """Generation of the plan adopted last; 0 before the first."""
        return self.plan.generation if self.plan else 0

    @property
    def slot(self) -> SlotRef:
        """This worker's slot, as the geometry of its stage names it."""
        return self.place.slot_ref

    def _takes_part(self, plan: Plan) -> bool:
        return any(assignment.member == self.member for assignment in plan.participants)

    def _done(self, phase: RecoveryPhase) -> None:
        self.link.send(PhaseDone(self.generation, self.member, phase, self.clock.now))

    def _sleep(self, mean: float) -> Wait:
        return self.process.sleep(mean * (0.5 + self.clock.rng.random()))
