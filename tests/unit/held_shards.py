"""What a worker process holds, and what a plan makes of it, without processes and tensors.

A process holds a session, its shards in one layout, and those of the next layout once it has
received them. Shards are pieces, each with the last step that went into it, so that one that is
missing, too much or of another time is seen.

A plan takes a process through a chain of states, each a function of the one before: as it was,
*settled*, with the new shards *received*, and *passed* behind the barrier. The functions fail
where a worker could not do what the plan counts on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from itertools import chain

from elastic.messages import Quiesced
from elastic.plan import Plan, StateSource
from elastic.session import Session, StepPoint, standing
from elastic.topology import Coordinate, Member
from ntp.atoms import AtomCounts, Axis
from ntp.geometry import ParallelLayout, Range

Piece = tuple[int, Axis | None, int]
"""Stage, axis and atom; with None and 0, all replicated tensors of the stage."""


def pieces_of(stage: int, axis: Axis | None, atoms: Range | None) -> list[Piece]:
    return [(stage, axis, atom) for atom in (range(atoms.start, atoms.stop) if atoms else (0,))]


def everything(counts: AtomCounts, stages: int) -> set[Piece]:
    """All pieces of a model."""
    whole = [(None, None), *((axis, Range(0, counts.of(axis))) for axis in counts.axes)]
    each = (pieces_of(stage, axis, atoms) for stage in range(stages) for axis, atoms in whole)
    return set(chain.from_iterable(each))


def shard(layout: ParallelLayout, place: Coordinate) -> set[Piece]:
    """All that belongs to a place."""
    pieces = set(pieces_of(place.stage, None, None))
    for shards in layout.replica(place.replica).shards.axes:
        for atoms in shards.owned[place.slot]:
            pieces.update(pieces_of(place.stage, shards.axis, atoms))
    return pieces


def vote_of(step: int) -> tuple[float, ...]:
    return (float(step),)


@dataclass(frozen=True)
class Held:
    """The shards of a place in the layout of a generation; each piece with the last step in it."""

    generation: int
    place: Coordinate
    pieces: Mapping[Piece, int]


@dataclass(frozen=True)
class Process:
    """A worker process, as `elastic.worker` and `trainer.training` have it."""

    member: Member
    session: Session = field(default_factory=Session)
    current: Held | None = None
    pending: Held | None = None

    @property
    def furthest(self) -> int:
        """The newest step that it knows to be decided."""
        return max(self.session.committed, self.session.voted)

    @property
    def held(self) -> dict[int, Held]:
        """What it holds, by the generation of the layout."""
        return {each.generation: each for each in (self.current, self.pending) if each}

    def answer(self, generation: int) -> Quiesced:
        held = None
        if at := self.pending or self.current:
            layouts = [each.generation if each else 0 for each in (self.current, self.pending)]
            held = standing(at.place.slot_ref, self.session, *layouts)
        return Quiesced(generation, self.member, held, True, 0.0)

    def on(self, events: int) -> Process:
        """So many events later: a step begins, its gradients are reduced, the vote, the commit."""
        session, current = self.session, self.current
        for _ in range(events):
            match session.point:
                case StepPoint.IDLE:
                    session = session.start()
                case StepPoint.COMPUTING:
                    session = session.prepare()
                case StepPoint.PREPARED:
                    session = session.hold_vote(vote_of(session.step))
                case StepPoint.VOTED:
                    session = session.commit()
                    assert current is not None
                    pieces = {piece: step + 1 for piece, step in current.pieces.items()}
                    current = replace(current, pieces=pieces)
        return replace(self, session=session, current=current)

    def settled(self, plan: Plan) -> Process:
        """`Worker._settle`. Who counts holds the whole of a place in the layout that `plan` starts
        from, of the step before the one that it resumes with."""
        if not plan.survives(self.member):
            return Process(self.member)
        current = self.held.get(plan.source_generation)
        assert current is not None, f"{self.member} is to go on with what it does not hold"
        after = replace(self, current=current, pending=None)
        if self.session.committed < plan.resume_step - 1:
            assert plan.apply_vote == vote_of(self.session.step)
            assert self.session.point in (StepPoint.PREPARED, StepPoint.VOTED), f"{self.session}"
            after = after.on(2 if self.session.point is StepPoint.PREPARED else 1)
        place = next(place for place, member in plan.participants if member == self.member)
        keeps = plan.kept_from(place.replica)
        assert keeps in (0, after.session.kept), f"{self.member} is to keep what it lacks"
        assert after.current is not None and plan.source_layout is not None
        belongs = shard(plan.source_layout, current.place)
        assert after.current.pieces == dict.fromkeys(belongs, plan.resume_step - 1)
        return replace(after, session=after.session.drop(salvaged=keeps > 0))

    def passed(self) -> Process:
        """Behind the barrier, where donors, who received nothing, forget everything."""
        if self.pending is None:
            return Process(self.member)
        return replace(self, current=self.pending, pending=None)


def received(plan: Plan, settled: Mapping[Member, Process]) -> dict[Member, Process]:
    """`Training.reshard`: who has a place has its shards, beside those that it had."""
    everybody = [member for _, member in plan.participants]
    after = dict(settled)
    for place, member in plan.placement:
        belongs, held = shard(plan.layout, place), settled[member].current
        pieces: dict[Piece, int] = {}
        if plan.state_source is StateSource.INITIALIZE:
            pieces = dict.fromkeys(belongs, -1)
        elif held and held.place == place:
            pieces = {piece: step for piece, step in held.pieces.items() if piece in belongs}
        ranks = plan.meeting_ranks(place.stage)
        for move in plan.reshard[place.stage].moves:
            if move.target == place.slot_ref:
                sender = settled[everybody[ranks[move.source]]].current
                assert sender is not None, f"{move.source} is to send, but holds nothing"
                for piece in pieces_of(place.stage, move.axis, move.atoms):
                    assert piece not in pieces, f"{member} gets {piece} twice"
                    pieces[piece] = sender.pieces[piece]
        assert pieces == dict.fromkeys(belongs, plan.resume_step - 1), f"{member} at {place}"
        session = replace(settled[member].session, committed=plan.resume_step - 1)
        pending = Held(plan.generation, place, pieces)
        after[member] = replace(settled[member], session=session, pending=pending)
    return after
