"""Layout a -> layout b as moves of atom ranges between slots.

Theory of operation. A slot whose process lived through the failure keeps what it owns in both
layouts; every other range it is to own, and everything a fresh process is to own, must come from a
process that still has it. Those needs are all that moves, once each, so the bytes moved are the
least possible; a replica whose layout stays and whose processes live is not even looked at.
`ntp.reshard_senders` decides who serves a need.

A move stands for its atoms in *every* tensor of the axis (parameters and optimizer state alike),
and always lies inside one owned range at both ends, so it is one slice of each local tensor. A
move with axis None stands for all tensors that every slot holds whole.

`check_reshard` proves a plan against its layouts. It takes longer than planning, and is left to
tests and to whoever wants to know before acting on a plan.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

from ntp.atoms import AtomSizes, Axis
from ntp.geometry import ParallelLayout, ReplicaLayout, SlotRef
from ntp.ranges import Range, common, cut, merged, subtract
from ntp.reshard_senders import Living, Need, share_out
from ntp.reshard_senders import NoHolder as NoHolder
from ntp.reshard_senders import even_shares as even_shares


@dataclass(frozen=True, slots=True)
class Move:
    """`source` sends `atoms` of `axis` to `target`; both None: all replicated tensors.

    Raises ValueError if only one of axis and atoms is None.
    """

    axis: Axis | None
    atoms: Range | None
    source: SlotRef
    target: SlotRef

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.atoms is None):
            raise ValueError(f"{self} has an axis or atoms without the other; give both or none")


def move_order(move: Move) -> tuple[int, int, str, int, int, int]:
    """Sort key: target, axis, start, source; replicated tensors before the axes."""
    target, source = move.target, move.source
    start = move.atoms.start if move.atoms else 0
    return target.replica, target.slot, move.axis or "", start, source.replica, source.slot


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """Moves ordered by (target, axis, start, source), replicated tensors before the axes.

    Raises ValueError if they are in another order or one is repeated.
    """

    moves: tuple[Move, ...]

    def __post_init__(self) -> None:
        keys = map(move_order, self.moves)
        if any(first >= second for first, second in pairwise(keys)):
            raise ValueError("the moves of a reshard plan must be sorted and distinct")

    @property
    def digest(self) -> str:
        """SHA-256 (hex) over a canonical text of the moves; equal plans have equal digests."""
        return sha256("".join(_line(move) for move in self.moves).encode()).hexdigest()

    def elements(self, sizes: AtomSizes) -> int:
        """Total elements moved, of one copy of the model's parameters."""
        return sum(_elements(move.axis, move.atoms, sizes) for move in self.moves)


def _line(move: Move) -> str:
    what = f"{move.axis} {move.atoms.start} {move.atoms.stop}" if move.atoms else "replicated"
    source, target = move.source, move.target
    return f"{what} {source.replica}.{source.slot}>{target.replica}.{target.slot}\n"


def _elements(axis: Axis | None, atoms: Range | None, sizes: AtomSizes) -> int:
    return sizes.of(axis) * (len(atoms) if atoms else 1)


def inverse(plan: ReshardPlan) -> ReshardPlan:
    """The plan with the two ends of every move swapped."""
    swapped = (Move(move.axis, move.atoms, move.target, move.source) for move in plan.moves)
    return ReshardPlan(tuple(sorted(swapped, key=move_order)))


def owned_by(layout: ParallelLayout, axis: Axis, slot: SlotRef) -> tuple[Range, ...]:
    """Ranges of `slot` in storage order; () if it is vacant or its replica takes no part."""
    for replica in layout.replicas:
        if replica.replica == slot.replica:
            return replica.shards.owned(axis, slot.slot)
    return ()


def kept_ranges(
    source: ParallelLayout, target: ParallelLayout, slot: SlotRef
) -> tuple[tuple[Axis, Range], ...]:
    """Ranges that a surviving `slot` owns in both layouts, to copy from old to new tensors.

    Ordered by axis and start; each lies inside one owned range of either layout.
    """
    return tuple(
        (axis, atoms)
        for axis, _ in target.homes
        for atoms in common(owned_by(source, axis, slot), owned_by(target, axis, slot))
    )


def plan_reshard(
    source: ParallelLayout,
    target: ParallelLayout,
    holders: frozenset[SlotRef],
    sizes: AtomSizes,
) -> ReshardPlan:
    """The moves that turn the living state of `source` into `target`.

    `holders` are the slots of `source` whose process lives and has its state; a target slot that is
    not among them starts from nothing. `sizes` weighs the axes in the balance of elements sent.
    Raises NoHolder if state is lost, ValueError if the layouts or holders do not belong together.
    """
    return plan_reshard_among(source, target, by_replica(source, holders), sizes)


def plan_reshard_among(
    source: ParallelLayout, target: ParallelLayout, living: Living, sizes: AtomSizes
) -> ReshardPlan:
    """`plan_reshard` with the holders by replica: every one of `source` is named, also without."""
    _check_living(source, target, living)
    if not any(living.values()):
        raise NoHolder(None, None)
    known = {replica.replica: replica for replica in source.replicas}
    needs: list[Need] = []
    fresh: list[SlotRef] = []
    for replica in target.replicas:
        before = known.get(replica.replica)
        alive = living.get(replica.replica, frozenset())
        if _stays(before, replica, alive):
            continue
        fresh += [SlotRef(replica.replica, slot) for slot in replica.active if slot not in alive]
        needs += _needs(source, before, replica, alive)
    moves = [
        Move(need.axis, atoms, sender, need.target)
        for need, atoms, sender in share_out(needs, source, living, sizes)
    ]
    moves += list(_replicated(fresh, moves, living, sizes))
    return ReshardPlan(tuple(sorted(moves, key=move_order)))


def by_replica(source: ParallelLayout, holders: Iterable[SlotRef]) -> Living:
    """The slots in `holders` of each replica of `source`."""
    slots: dict[int, set[int]] = {replica.replica: set() for replica in source.replicas}
    for number, slot in holders:
        slots.setdefault(number, set()).add(slot)
    return {number: frozenset(alive) for number, alive in slots.items()}


def _check_living(source: ParallelLayout, target: ParallelLayout, living: Living) -> None:
    """Raises ValueError if the arguments do not belong together."""
    old, new = ({axis: homes[-1].stop for axis, homes in each.homes} for each in (source, target))
    if old != new:
        raise ValueError(
            f"the source layout has atoms {old} and the target {new}; both must be layouts of one "
            "model"
        )
    active = {replica.replica: replica.active for replica in source.replicas}
    if strangers := [
        number for number in living if not living[number] <= {*active.get(number, ())}
    ]:
        raise ValueError(
            f"holders of replicas {sorted(strangers)} are not active in the source layout; leave "
            "them out"
        )


def _stays(before: ReplicaLayout | None, after: ReplicaLayout, alive: frozenset[int]) -> bool:
    """Whether all slots of a replica have what they are to own."""
    return before is not None and before.shards == after.shards and alive.issuperset(after.active)


def _needs(
    source: ParallelLayout,
    before: ReplicaLayout | None,
    after: ReplicaLayout,
    alive: frozenset[int],
) -> Iterator[Need]:
    """What the slots of one replica lack, slot by slot, cut at the bounds of homes."""
    for slot in after.active:
        target = SlotRef(after.replica, slot)
        for shards, (axis, homes) in zip(after.shards.axes, source.homes, strict=True):
            had = before.shards.owned(axis, slot) if before and slot in alive else ()
            owned = shards.owned[slot]
            if had[:1] == owned[:1]:
                had, owned = had[1:], owned[1:]
            for atoms in owned:
                for lacking in subtract(atoms, had) if had else (atoms,):
                    for home, piece in cut(homes, lacking):
                        yield Need(target, axis, piece, home)


def _replicated(
    fresh: Sequence[SlotRef], moves: Iterable[Move], living: Living, sizes: AtomSizes
) -> Iterator[Move]:
    """The replicated tensors for each fresh slot, from the least loaded of the nearest holders."""
    sent = Counter[SlotRef]()
    for move in moves if fresh else ():
        sent[move.source] += _elements(move.axis, move.atoms, sizes)
    for target in fresh:
        # Those of its replica are close to it, and slots h of others send to a fresh slot h anyway.
        holders = (
            [SlotRef(target.replica, slot) for slot in living.get(target.replica, ())]
            or [SlotRef(n, target.slot) for n, alive in living.items() if target.slot in alive]
            or [SlotRef(n, slot) for n, alive in living.items() for slot in alive]
        )
        source = min(holders, key=lambda ref: (sent[ref], ref))
        sent[source] += sizes.replicated
        yield Move(None, None, source, target)


def check_reshard(
    plan: ReshardPlan,
    source: ParallelLayout,
    target: ParallelLayout,
    holders: frozenset[SlotRef],
) -> None:
    """Raises ValueError unless every target slot ends with exactly what it is to own.

    That is: kept and received ranges make up each owned range once, every sender lives and holds
    what it sends, and each fresh slot receives the replicated tensors once and no other slot does.
    """
    living = by_replica(source, holders)
    _check_living(source, target, living)
    old = {replica.replica: replica for replica in source.replicas}
    new = {replica.replica: replica for replica in target.replicas}
    received: dict[int, dict[tuple[int, Axis], list[Range]]] = defaultdict(dict)
    fresh: list[SlotRef] = []
    for move in plan.moves:
        if move.source not in holders or move.source == move.target:
            raise ValueError(f"{move}: its source is not another living process; plan again")
        if move.axis is None or move.atoms is None:
            fresh.append(move.target)
            continue
        for replicas, end in ((old, move.source), (new, move.target)):
            replica = replicas.get(end.replica)
            owned = replica.shards.owned(move.axis, end.slot) if replica else ()
            if not any(piece.contains(move.atoms) for piece in owned):
                raise ValueError(f"{move}: its atoms are not in one range of {end}; plan again")
        place = move.target.slot, move.axis
        received[move.target.replica].setdefault(place, []).append(move.atoms)
    empty = [
        SlotRef(number, slot)
        for number, replica in new.items()
        for slot in replica.active
        if slot not in living.get(number, ())
    ]
    if sorted(fresh) != empty:
        raise ValueError(
            f"replicated tensors go to {fresh}, not once to each fresh slot; plan again"
        )
    for number, replica in new.items():
        before, alive = old.get(number), living.get(number, frozenset())
        if _stays(before, replica, alive) and number not in received:
            continue
        for shards in replica.shards.axes:
            for slot, owned in enumerate(shards.owned):
                had = before.shards.owned(shards.axis, slot) if before and slot in alive else ()
                gained = received[number].get((slot, shards.axis), [])
                if owned == had and not gained:
                    continue
                have = [*common(had, owned), *gained]
                if merged(have) != merged(owned):
                    raise ValueError(
                        f"{SlotRef(number, slot)} would end with {shards.axis} {sorted(have)} "
                        f"instead of {owned}; plan again"
                    )
