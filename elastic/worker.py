"""The runtime inside a worker process: quiesce, adopt, vote.

The training thread runs steps. When the agent announces a new generation, the link's thread severs
the groups that cannot go on, which ends whatever collective the training thread is blocked in. It
then reports where it stands, waits for the plan, and adopts it: settle the interrupted step, build
the groups, compare digests, receive shards, pass a barrier, switch over. A further failure during
any of this simply ends it with an exception, and the worker stands ready for the next generation
with the state it had; see `elastic.session` for why that state is always enough.

A healthy replica keeps its tensor-parallel group. Its ranks therefore stop only at the boundary
before gradient sync, where all of them arrive. Where everybody waits for everybody, nobody knows in
which group a message was lost, and none is kept. A rank that cannot know where its mates are severs
the group and says so: one that is stopped inside the vote or the barrier of an adoption, behind
which mates may compute already and wait for it, and one for which the group itself broke.

At the boundary such a rank holds its replica's gradients. If it heard of the failure before other
replicas' came into them, it keeps them, and the plan may tell the replica to go on from there (see
`elastic.salvage`). Adopting a plan that does not tells it to forget them.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.distributed as dist

from elastic.agent_link import AgentLink
from elastic.faults import FaultPhase
from elastic.heart import Heart
from elastic.messages import (
    Adopt,
    AgentMessage,
    ConnectionLost,
    FaultFired,
    PhaseDone,
    Quiesce,
    Quiesced,
    Ready,
    RecoveryPhase,
    StepDone,
    Stop,
    Struck,
)
from elastic.plan import Plan
from elastic.rendezvous_client import RendezvousStore
from elastic.replica_groups import replica_groups, replica_mates
from elastic.session import Session, StepPoint, standing
from elastic.topology import Coordinate, Member
from elastic.trainable import Trainable
from health.heartbeat import Activity
from ntp.process_groups import GroupKey, ProcessGroups, connection_error


class StepAborted(RuntimeError):
    """The step in flight was given up because a new generation was announced."""


class PlanMismatch(RuntimeError):
    """The ranks of a generation hold different plans."""


class Worker:
    """State of one worker process in the cluster. `struck` are injected faults that struck."""

    def __init__(
        self,
        member: Member,
        link: AgentLink,
        heart: Heart,
        groups: ProcessGroups,
        device: torch.device,
    ) -> None:
        self.member = member
        self.heart = heart
        self.groups = groups
        self.session = Session()
        self.plan: Plan | None = None
        self.struck: set[int] = set()
        self._link = link
        self._device = device
        self._quiesce: Quiesce | None = None
        self._rendezvous: RendezvousStore | None = None
        self._layout_generation = 0
        self._pending_generation = 0
        self._coordinate = Coordinate(0, 0, 0)
        self._speaks = False
        self._step_started = (0, 0, 0.0)
        self._compute_began = self._compute_seconds = 0.0
        self._in_model = False
        self._cold = True

    def start(self) -> None:
        """Begin to listen, and say that this worker is ready."""
        self._link.start(self._hear)
        self.heart.start()
        self._link.send(Ready(self.member))

    @property
    def coordinate(self) -> Coordinate:
        """This worker's place in the current plan."""
        assert self.plan is not None
        return self._coordinate

    @property
    def generation(self) -> int:
        """Generation of the current plan; 0 before the first."""
        return self.plan.generation if self.plan else 0

    @property
    def pause_requested(self) -> bool:
        """Whether a new generation is announced that waits for the step in flight."""
        return self._quiesce is not None and self._quiesce.generation > self.generation

    # Not a property, as gradient sync is handed it as a question to ask.
    def stop_requested(self) -> bool:
        """Whether a new generation is announced that does not wait."""
        quiesce = self._quiesce
        return quiesce is not None and quiesce.urgent and quiesce.generation > self.generation

    def reach_boundary(self, unmixed: bool) -> None:
        """Forward and backward are done. Raises StepAborted like `check`.

        `unmixed`: no other replica's gradients may have come into this rank's.
        """
        self._in_model = False
        self._compute_seconds = time.perf_counter() - self._compute_began
        if unmixed and self.stop_requested():
            self.session = self.session.keep(self.generation)
        self.check()
        self.turn_to(Activity.GRADIENT_SYNC)

    def turn_to(self, activity: Activity) -> None:
        """Tell the heart what the training thread does from here on."""
        self.heart.log.begin(
            activity,
            self.session.step,
            time.monotonic(),
            generation=self.generation,
            cold=self._cold,
        )

    def check(self) -> None:
        """Raise StepAborted if a new generation is announced that does not wait."""
        if self.stop_requested():
            assert self._quiesce is not None
            raise StepAborted(self._quiesce.reason)

    def begin_step(self) -> None:
        """A step starts."""
        self.session = self.session.start()
        self._step_started = (self.generation, self.coordinate.replica, time.time())
        self._in_model = True
        self._compute_began = time.perf_counter()
        self.turn_to(Activity.COMPUTING)

    def commit(self, trainable: Trainable, vote: tuple[float, ...]) -> None:
        """Apply the step in flight with the vote held, and report it."""
        step = self.session.step
        self.turn_to(Activity.OPTIMIZER)
        trainable.apply(step, vote)
        self.session = self.session.commit()
        self._cold = False
        figures = trainable.figures(step, vote)
        generation, replica, started_at = self._step_started
        awaited = self._speaks or figures.last or figures.sharded_digest is not None
        tell = self._link.send if awaited else self._link.send_later
        tell(
            StepDone(
                generation=generation,
                member=self.member,
                replica=replica,
                step=step,
                loss=figures.loss,
                grad_norm=figures.grad_norm,
                tokens=figures.tokens,
                sample_digest=figures.sample_digest,
                sharded_digest=figures.sharded_digest,
                replicated_digest=figures.replicated_digest,
                started_at=started_at,
                compute_seconds=self._compute_seconds,
                at=time.time(),
                awaited=awaited,
            )
        )

    def announce_fault(self, fault: int, step: int, phase: str) -> None:
        """Say that an injected fault strikes this process now."""
        self._link.send(FaultFired(fault, self.member, step, phase, time.time()))

    def await_plan(self, trainable: Trainable) -> Plan | None:
        """Answer announcements until a plan that places this worker arrives; None: stop.

        A plan that leaves it out makes its state stale, so it lets go of that and of its groups.
        """
        announced = self.generation
        self._cold = True
        self.turn_to(Activity.AWAITING_PLAN)
        while True:
            match self._link.receive():
                case Quiesce() as quiesce:
                    announced = quiesce.generation
                    self._answer(quiesce)
                case Adopt(plan) if (
                    plan.generation > self.generation
                    and plan.generation >= announced
                    and self._takes_part(plan)
                ):
                    return plan
                case Adopt(plan) if plan.generation > self.generation and not self._takes_part(
                    plan
                ):
                    announced = max(announced, plan.generation)
                    self.leave(trainable)
                case Adopt() | Struck():
                    # A plan that a newer announcement has overtaken: acting on it is forbidden.
                    continue
                case Stop():
                    return None

    def join(self, plan: Plan, rank: int) -> None:
        """`plan` is the current one, in which this worker has `rank` (of the meeting)."""
        # Kept, as each step asks who this worker is, among what may be tens of thousands.
        self.plan = plan
        self._coordinate = plan.participants[rank].coordinate
        self._speaks = plan.speaks(self.member)

    def adopt(self, plan: Plan, trainable: Trainable, at: Callable[[FaultPhase], None]) -> bool:
        """Become `plan`'s generation; returns whether this worker has a place in it.

        A donor has none, and leaves once all others have what they need. `at` is called in the
        middle of each phase, while others wait for this worker. Raises RuntimeError if the change
        is interrupted.
        """
        participants = [assignment.member for assignment in plan.participants]
        rank = participants.index(self.member)
        self.join(plan, rank)
        place = self.coordinate
        self._settle(plan, trainable)
        self.turn_to(Activity.REBUILD)
        donates = rank >= len(plan.placement)
        keeps = place.replica in plan.kept_replicas
        kept = replica_groups(plan, self.member) if keeps else {}
        store = RendezvousStore(plan.rendezvous, self.groups.build_timeout_seconds)
        self._rendezvous = store
        # From here on the link's thread can end a wait for the store; it may have tried before.
        try:
            self.check()
            at(FaultPhase.REBUILD)
            self.groups.adopt(
                plan.groups_of(rank),
                [str(member) for member in participants],
                rank,
                plan.generation,
                store,
                frozenset(kept),
                unbroken=plan.unbroken,
            )
        finally:
            self._rendezvous = None
            store.close()
        self.check()
        self._compare_digests(plan)
        self._done(RecoveryPhase.REBUILD)
        self.turn_to(Activity.RESHARD)
        at(FaultPhase.RESHARD)
        if donates:
            trainable.donate(plan, place)
        else:
            trainable.reshard(plan, place)
            self._pending_generation = plan.generation
            self.session = replace(self.session, committed=plan.resume_step - 1)
        self._done(RecoveryPhase.RESHARD)
        dist.all_reduce(torch.zeros(1, device=self._device), group=self.groups.meeting)
        if donates:
            self._done(RecoveryPhase.RESUME)
            # Its connections stay: to close one could break the barrier for those still in it.
            self._forget(trainable)
            return False
        trainable.promote()
        self._layout_generation, self._pending_generation = plan.generation, 0
        self._done(RecoveryPhase.RESUME)
        return True

    def interrupted(self, error: Exception) -> None:
        """The step or the adoption ended with `error`: wake whoever waits for this worker."""
        mates_may_wait = (
            self._in_model
            or self.session.point is StepPoint.PREPARED
            or self._pending_generation > 0
        )
        self._in_model = False
        self.groups.sever(keep=frozenset() if mates_may_wait else self._keepable())
        if self._quiesce is None or self._quiesce.generation <= self.generation:
            # What torch says of a broken group is a complaint about the group; see the root.
            root = connection_error(error) or error
            detail = f"{type(root).__name__}: {root}"
            self._link.send(ConnectionLost(self.generation, self.member, detail))

    def leave(self, trainable: Trainable) -> None:
        """Others go on without this worker: hold nothing, as a fresh process does."""
        self._forget(trainable)
        self.groups.close()

    def _forget(self, trainable: Trainable) -> None:
        trainable.release()
        self.plan, self.session = None, Session()
        self._layout_generation = self._pending_generation = 0

    def _settle(self, plan: Plan, trainable: Trainable) -> None:
        """Bring this worker to where the plan says that all survivors are."""
        if plan.source_generation and plan.source_generation == self._pending_generation:
            trainable.promote()
            self._layout_generation = self._pending_generation
        else:
            trainable.discard()
        self._pending_generation = 0
        if not plan.survives(self.member):
            # What it holds, if anything, is of a time when others went on without it, or of a
            # layout of which others lost too much.
            trainable.release()
            self.session, self._layout_generation = Session(), 0
        has_state = self._layout_generation > 0
        assert has_state or not plan.survives(self.member), "the plan counts on state that is gone"
        if has_state and self.session.committed < plan.resume_step - 1:
            assert plan.apply_vote is not None, "the plan skips a step that this worker lacks"
            if self.session.point is StepPoint.PREPARED:
                self.session = self.session.hold_vote(plan.apply_vote)
            self.commit(trainable, plan.apply_vote)
            self._cold = True
        keeps = plan.kept_from(self.coordinate.replica) if has_state else 0
        assert keeps in (0, self.session.kept), f"kept {self.session.kept}, told to keep {keeps}"
        self.session = self.session.drop(salvaged=keeps > 0)
        assert not has_state or self.session.committed == plan.resume_step - 1

    def _answer(self, quiesce: Quiesce) -> None:
        held = None
        if self._layout_generation or self._pending_generation:
            held = standing(
                self._coordinate.slot_ref,
                self.session,
                self._layout_generation,
                self._pending_generation,
            )
        groups = replica_groups(self.plan, self.member) if self.plan else {}
        intact = bool(groups) and all(self.groups.intact(*group) for group in groups.items())
        self._link.send(
            Quiesced(
                quiesce.generation, self.member, held, intact, time.time(), self.groups.unbroken
            )
        )

    def _hear(self, message: AgentMessage) -> None:
        """In the link's thread: end what cannot complete any more."""
        if isinstance(message, Struck):
            self.struck.add(message.fault)
        elif isinstance(message, Quiesce):
            self._quiesce = message
            if message.urgent:
                keep = frozenset() if message.sever_all else self._keepable(message.lost)
                self.groups.sever(keep=keep)
                rendezvous = self._rendezvous
                if rendezvous is not None:
                    rendezvous.sever()

    def _keepable(self, lost: tuple[Member, ...] = ()) -> frozenset[GroupKey]:
        """The groups inside this worker's replica, unless the replica lost a member."""
        # The link's thread asks too, so the plan is read once.
        plan = self.plan
        if plan is None or any(a.member in lost for a in replica_mates(plan, self.member)):
            return frozenset()
        return frozenset(replica_groups(plan, self.member))

    def _takes_part(self, plan: Plan) -> bool:
        return any(assignment.member == self.member for assignment in plan.participants)

    def _compare_digests(self, plan: Plan) -> None:
        mine = int.from_bytes(hashlib.sha256(plan.digest.encode()).digest()[:6], "big")
        both = torch.tensor([mine, -mine], dtype=torch.float64, device=self._device)
        dist.all_reduce(both, op=dist.ReduceOp.MAX, group=self.groups.meeting)
        if both[0].item() != -both[1].item():
            raise PlanMismatch(f"generation {plan.generation}: the ranks hold different plans")

    def _done(self, phase: RecoveryPhase) -> None:
        self._link.send(PhaseDone(self.generation, self.member, phase, time.time()))
