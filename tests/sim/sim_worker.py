"""A simulated worker process: `elastic.worker` and `trainer.loop`, statement by statement.

One rule is `may_keep`'s own, which see.

The training thread is a generator that yields what it blocks on. `hear` is the link's thread: it
runs whenever a message arrives, also while the training thread is blocked. What is trained is a
number per atom, and a step mixes its own number and its tokens into each: a step that is lost,
applied twice or applied to the wrong atom shows in the value. Decisions, plans, sessions and
standings are the product's own.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from links import Broken, Comm, Wait

from elastic.messages import (
    Adopt,
    AgentMessage,
    ConnectionLost,
    PhaseDone,
    Quiesce,
    Quiesced,
    Ready,
    RecoveryPhase,
    StepDone,
    Stop,
    WorkerMessage,
)
from elastic.plan import Plan, StateSource
from elastic.session import Session, StepPoint, standing
from elastic.topology import Assignment, Coordinate, Member
from ntp.atoms import Axis
from ntp.geometry import SlotRef
from ntp.groups import GroupAxis
from ntp.reshard_plan import kept_ranges

if TYPE_CHECKING:
    from world import World

REPLICATED = (None, 0)
Piece = tuple[Axis | None, int]
Values = dict[Piece, int]
GroupKey = tuple[GroupAxis, tuple[int, ...]]
Thread = Generator[Wait, Any, None]


class StepAborted(RuntimeError):
    """The step in flight was given up because a new generation was announced."""


def mix(value: int, step: int, tokens: float) -> int:
    """The value of an atom after `step`."""
    return (value * 6364136223846793005 + (step + 1) * 1442695040888963407 + int(tokens)) % 2**64


def pieces_owned(plan: Plan, slot: SlotRef) -> list[Piece]:
    """Every piece that `slot` is to hold in the plan's layout, in each stage."""
    shards = plan.layout.replica(slot.replica).shards
    owned: list[Piece] = [REPLICATED]
    for axis in Axis:
        for atoms in shards.owned(axis, slot.slot):
            owned += [(axis, atom) for atom in range(atoms.start, atoms.stop)]
    return owned


class SimWorker:
    """One process. The world kills it by `dead`, stops it by `hung`."""

    def __init__(self, world: World, member: Member) -> None:
        self.member = member
        self.world = world
        self.token = 0
        self.dead = False
        self.hung = False
        self.session = Session()
        self.plan: Plan | None = None
        self.values: Values = {}
        self.pending: Values | None = None
        self.layout_generation = 0
        self.pending_generation = 0
        self.answered = 0
        self.pipe: deque[WorkerMessage] = deque()
        self.comms: dict[GroupKey, Comm] = {}
        self.place = Coordinate(0, 0, 0)
        self.held_at = self.place
        self._step_started = (0, 0)
        self._quiesce: Quiesce | None = None
        self._inbox: deque[AgentMessage] = deque()
        self._receiving: int | None = None
        self._in_model = False
        self._thread = self._life()

    # The scheduler's side.

    def start(self) -> None:
        """Run the training thread up to its first wait."""
        self.advance(0)

    def advance(self, token: int, value: Any = None, error: Exception | None = None) -> None:
        """End the wait named `token`."""
        if self.dead or self.hung or token != self.token:
            return
        self.token += 1
        try:
            if error is not None:
                self._thread.throw(error)(self)
            else:
                self._thread.send(value if self.token > 1 else None)(self)
        except StopIteration:
            return

    def hear(self, message: AgentMessage) -> None:
        """The link's thread: end what cannot complete any more, then queue the message."""
        if self.dead or self.hung:
            return
        if isinstance(message, Quiesce):
            self._quiesce = message
            if message.urgent:
                self._sever(self._keepable(message.lost))
        self._inbox.append(message)
        if self._receiving is not None:
            token, self._receiving = self._receiving, None
            self.world.after(0.0, self.advance, token)

    # The training thread.

    def _life(self) -> Thread:
        self._send(Ready(self.member))
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
            tensor = self.comms[GroupAxis.TENSOR, (place.replica, place.stage)]
            pipeline = self.comms.get((GroupAxis.PIPELINE, (place.replica, place.slot)))
            self.session = self.session.start()
            self._step_started = (self.generation, place.replica)
            self._in_model = True
            self.world.reached(self, "computing")
            yield tensor.join(None)
            if pipeline is not None:
                yield pipeline.join(None)
            yield self._sleep(0.5)
            yield tensor.join(None)
            if pipeline is not None:
                yield pipeline.join(None)
            self._in_model = False
            self._check()
            yield from self._synchronize()
            self.session = self.session.prepare()
            self.world.reached(self, "prepared")
            vote = yield from self._vote()
            self.session = self.session.hold_vote(vote)
            self.world.reached(self, "voted")
            yield self._sleep(0.1)
            self._commit(vote)
            self.world.reached(self, "committed")
            paused = vote[1] > 0

    def _synchronize(self) -> Thread:
        assert self.plan is not None
        place = self.place
        if (home := self.comms.get((GroupAxis.HOME, (place.stage, place.slot)))) is not None:
            yield home.join(None)
        if any(replica.degree < self.plan.layout.tp_base for replica in self.plan.layout.replicas):
            # The exchange with the replicas where a slot is vacant.
            yield self._stage_group.join(None)

    def _vote(self) -> Generator[Wait, Any, tuple[float, ...]]:
        assert self.plan is not None
        layout = self.plan.layout
        position = [r.replica for r in layout.replicas].index(self.place.replica)
        first = self.place.slot == layout.replicas[position].active[0]
        speaks = first and self.place.stage == 0
        pause = self._quiesce is not None and self._quiesce.generation > self.generation
        mine = (float(self.plan.batch_split[position]) if speaks else 0.0, float(pause))
        given = yield self._world_group.join(mine)
        return sum(each[0] for each in given.values()), sum(each[1] for each in given.values())

    def _await_plan(self) -> Generator[Wait, Any, Plan | None]:
        announced = self.generation
        while True:
            while not self._inbox:
                yield self._receive
            match self._inbox.popleft():
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
        return plan.generation >= announced and self._takes_part(plan)

    def _adopt(self, plan: Plan) -> Thread:
        self.world.check(
            plan.generation >= self.answered,
            f"{self.member} acts on plan {plan.generation}, overtaken by {self.answered}",
        )
        self.plan, self._in_model = plan, False
        rank = [assignment.member for assignment in plan.participants].index(self.member)
        donates = rank >= len(plan.placement)
        yield self._sleep(0.1)
        self._settle(plan)
        self.place = plan.participants[rank].coordinate
        yield from self._build(plan, rank)
        self._check()
        digests = yield self._meeting.join(plan.digest)
        self.world.check(len(set(digests.values())) == 1, "the ranks hold different plans")
        self._done(RecoveryPhase.REBUILD)
        yield from self._reshard(plan)
        if not donates:
            self.pending_generation = plan.generation
            self.session = replace(self.session, committed=plan.resume_step - 1)
        self._done(RecoveryPhase.RESHARD)
        yield self._meeting.join(None)
        if donates:
            self._done(RecoveryPhase.RESUME)
            self.leave()
            return
        self._promote()
        self.layout_generation, self.pending_generation = plan.generation, 0
        self.world.check_values(self, plan)
        self._done(RecoveryPhase.RESUME)

    def _build(self, plan: Plan, rank: int) -> Thread:
        kept = self._replica_groups() if self.place.replica in plan.kept_replicas else {}
        for key in [key for key in self.comms if key not in kept]:
            self.comms.pop(key).sever(self.member)
        for spec in plan.groups_of(rank):
            key = (spec.axis, spec.index)
            names = tuple(plan.participants[r].member for r in spec.ranks)
            if key in kept:
                live = self.comms.get(key)
                if live is None or not live.intact(self.member, names):
                    self.world.kept_group_gone(self, key)
                    raise Broken(f"{key} was to be kept, but was severed meanwhile")
                continue
            comm = self.world.communicator(plan.generation, key, names)
            self.comms[key] = yield comm.build(self.world.build_timeout)

    def _reshard(self, plan: Plan) -> Thread:
        moves = plan.reshard[self.place.stage].moves
        incoming = [move for move in moves if move.target == self.slot]
        placed = {
            place.slot_ref: member
            for place, member in (*plan.participants, *plan.movers)
            if place.stage == self.place.stage
        }
        after: Values = {}
        sent: dict[tuple[SlotRef, Piece], int] = {}
        # A mover sends what it holds of its old place.
        moves_away = any(member == self.member for _, member in plan.movers)
        old = self.held_at if moves_away else self.place
        for move in plan.reshard[old.stage].moves:
            if move.source != old.slot_ref:
                continue
            atoms = range(move.atoms.start, move.atoms.stop) if move.atoms else range(1)
            for atom in atoms:
                piece = (move.axis, atom)
                self.world.check(
                    piece in self.values, f"{self.member} is to send {piece}, lacks it"
                )
                sent[(move.target, piece)] = self.values[piece]
        sources = frozenset(placed[move.source] for move in incoming)
        received = yield self._meeting.exchange(sent, sources)
        if self.slot not in plan.layout.slots():
            return
        if plan.state_source is StateSource.INITIALIZE:
            after = {
                p: self.world.initial(p, self.place.stage) for p in pieces_owned(plan, self.slot)
            }
        elif self.values and not moves_away:
            assert plan.source_layout is not None
            after[REPLICATED] = self.values[REPLICATED]
            for axis, atoms in kept_ranges(plan.source_layout, plan.layout, self.slot):
                for atom in range(atoms.start, atoms.stop):
                    after[(axis, atom)] = self.values[(axis, atom)]
        for source in sources:
            for (target, piece), value in received[source].items():
                if target == self.slot:
                    self.world.check(piece not in after, f"{self.slot} gets {piece} twice")
                    after[piece] = value
        self.pending = after

    # What the training thread does between waits.

    def leave(self) -> None:
        """Others go on without this worker (`Worker.leave`)."""
        for comm in self.comms.values():
            comm.sever(self.member)
        self.comms, self.values, self.pending = {}, {}, None
        self.plan, self.session = None, Session()
        self.layout_generation = self.pending_generation = 0

    def _settle(self, plan: Plan) -> None:
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
            self.world.check(
                plan.apply_vote is not None, f"{self.member} lacks a step the plan skips"
            )
            assert plan.apply_vote is not None
            if self.session.point is StepPoint.PREPARED:
                self.session = self.session.hold_vote(plan.apply_vote)
            self.world.check(
                self.session.point is StepPoint.VOTED,
                f"{self.member} is to apply step {self.session.step}, but is {self.session.point}",
            )
            self._commit(plan.apply_vote)
        self.session = self.session.drop()
        self.world.check(
            not has_state or self.session.committed == plan.resume_step - 1,
            f"{self.member} committed {self.session.committed}, to resume at {plan.resume_step}",
        )

    def _commit(self, vote: tuple[float, ...]) -> None:
        step = self.session.step
        self.world.check(
            vote[0] == self.world.shape.global_batch_size, f"step {step} had {vote[0]} samples"
        )
        for piece, value in self.values.items():
            self.values[piece] = mix(value, step, vote[0])
        self.session = self.session.commit()
        self.world.check_committed(self)
        now = self.world.now
        generation, replica = self._step_started
        self._send(
            StepDone(
                generation=generation,
                member=self.member,
                replica=replica,
                step=step,
                loss=0.0,
                grad_norm=0.0,
                tokens=int(vote[0]),
                sample_digest="",
                sharded_digest=None,
                replicated_digest=None,
                started_at=now,
                compute_seconds=0.5 + 0.3 * self.slot.replica,
                at=now,
            )
        )

    def _promote(self) -> None:
        assert self.pending is not None
        self.values, self.pending = self.pending, None
        self.held_at = self.place

    def _answer(self, quiesce: Quiesce) -> None:
        self.answered = quiesce.generation
        held = None
        if self.layout_generation or self.pending_generation:
            held = standing(
                self.slot, self.session, self.layout_generation, self.pending_generation
            )
        groups = self._replica_groups()
        intact = bool(groups) and all(
            (live := self.comms.get(key)) is not None and live.intact(self.member, names)
            for key, names in groups.items()
        )
        self._send(Quiesced(quiesce.generation, self.member, held, intact, self.world.now))

    def _interrupted(self, error: Exception) -> None:
        self._sever(self._keepable() if self.may_keep() else frozenset())
        if self._quiesce is None or self._quiesce.generation <= self.generation:
            self._send(ConnectionLost(self.generation, self.member, str(error)))

    def may_keep(self) -> bool:
        """Whether an interrupted worker may keep its tensor-parallel group.

        Not in the vote, nor in the barrier of a layout: its mates may have passed, and wait for it
        in the next step. Nor where the group itself broke: its other members may wait for it.
        """
        in_vote = self.session.point is StepPoint.PREPARED
        in_barrier = self.pending_generation > 0
        return not in_vote and not in_barrier and not self._in_model

    def _check(self) -> None:
        quiesce = self._quiesce
        if quiesce is not None and quiesce.urgent and quiesce.generation > self.generation:
            raise StepAborted(quiesce.reason)

    # Small change.

    @property
    def generation(self) -> int:
        """Generation of the plan adopted last; 0 before the first."""
        return self.plan.generation if self.plan else 0

    @property
    def _world_group(self) -> Comm:
        return self.comms[GroupAxis.WORLD, ()]

    @property
    def _meeting(self) -> Comm:
        return self.comms.get((GroupAxis.MEETING, ())) or self._world_group

    @property
    def _stage_group(self) -> Comm:
        return self.comms.get((GroupAxis.STAGE, (self.place.stage,)), self._world_group)

    @property
    def slot(self) -> SlotRef:
        """This worker's slot, as the geometry of its stage names it."""
        return self.place.slot_ref

    def _takes_part(self, plan: Plan) -> bool:
        return any(assignment.member == self.member for assignment in plan.participants)

    def _replica_mates(self) -> list[Assignment]:
        if self.plan is None:
            return []
        mine = {a.coordinate.replica for a in self.plan.placement if a.member == self.member}
        return [a for a in self.plan.placement if a.coordinate.replica in mine]

    def _replica_groups(self) -> dict[GroupKey, tuple[Member, ...]]:
        mates = self._replica_mates()
        place = next((a.coordinate for a in mates if a.member == self.member), None)
        if place is None:
            return {}
        tensor = tuple(a.member for a in mates if a.coordinate.stage == place.stage)
        pipeline = tuple(a.member for a in mates if a.coordinate.slot == place.slot)
        groups = {(GroupAxis.TENSOR, (place.replica, place.stage)): tensor}
        if len(pipeline) > 1:
            groups[GroupAxis.PIPELINE, (place.replica, place.slot)] = pipeline
        return groups

    def _keepable(self, lost: tuple[Member, ...] = ()) -> frozenset[GroupKey]:
        if any(a.member in lost for a in self._replica_mates()):
            return frozenset()
        return frozenset(self._replica_groups())

    def _sever(self, keep: frozenset[GroupKey]) -> None:
        for key, comm in self.comms.items():
            if key not in keep:
                comm.sever(self.member)

    def _send(self, message: WorkerMessage) -> None:
        self.pipe.append(message)
        self.world.wrote(self)

    def _done(self, phase: RecoveryPhase) -> None:
        self._send(PhaseDone(self.generation, self.member, phase, self.world.now))

    def _receive(self, waiter: SimWorker) -> None:
        self._receiving = self.token

    def _sleep(self, mean: float) -> Wait:
        delay = mean * (0.5 + self.world.rng.random())
        return lambda waiter: self.world.after(delay, self.advance, self.token)
