"""Layout a -> layout b as moves of atom ranges between slots.

Theory of operation. A slot whose process lived through the failure keeps what it owns in both
layouts; every other range it is to own, and everything a fresh process is to own, must come from a
process that still has it. Replicas are bitwise equal, so any living holder in any replica will do,
and the only choice is who sends how much. The planner first cuts each missing range where the set
of its holders changes, then assigns the pieces, least flexible first, by water-filling: the atoms
of a piece go to the holders with the least to send so far, each holder getting one contiguous run.

A move stands for its atoms in *every* tensor of the axis (parameters and optimizer state alike),
and always lies inside one owned range at both ends, so it is one slice of each local tensor. A
move with axis None stands for all tensors that every slot holds whole.

`check_reshard` proves a plan against its layouts. The planner runs it on its own result, and a
rank may run it on what it is told to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise

from ntp.atoms import AtomSizes, Axis
from ntp.geometry import ParallelLayout, Range, SlotRef, intersect, merged, subtract


class NoHolder(ValueError):
    """Something that a target slot needs is held by no living process."""

    def __init__(self, axis: Axis | None, atoms: Range | None) -> None:
        what = "the replicated tensors" if atoms is None else f"{axis} {atoms.start}..{atoms.stop}"
        super().__init__(f"no living process holds {what}; restore from a checkpoint")
        self.axis = axis
        self.atoms = atoms


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


def _order(move: Move) -> tuple[SlotRef, str, int, SlotRef]:
    return move.target, move.axis or "", move.atoms.start if move.atoms else 0, move.source


@dataclass(frozen=True, slots=True)
class ReshardPlan:
    """Moves ordered by (target, axis, start, source), replicated tensors before the axes.

    Raises ValueError if they are in another order or one is repeated.
    """

    moves: tuple[Move, ...]

    def __post_init__(self) -> None:
        keys = [_order(move) for move in self.moves]
        if keys != sorted(set(keys)):
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
    return ReshardPlan(tuple(sorted(swapped, key=_order)))


def owned_by(layout: ParallelLayout, axis: Axis, slot: SlotRef) -> tuple[Range, ...]:
    """Ranges of `slot` in storage order; () if it is vacant or its replica takes no part."""
    for replica in layout.replicas:
        if replica.replica == slot.replica and slot.slot in replica.active:
            return replica.shards.owned(axis, slot.slot)
    return ()


def kept_ranges(
    source: ParallelLayout, target: ParallelLayout, slot: SlotRef
) -> tuple[tuple[Axis, Range], ...]:
    """Ranges that a surviving `slot` owns in both layouts, to copy from old to new tensors.

    Ordered by axis and start; each lies inside one owned range of either layout.
    """
    kept: list[tuple[Axis, Range]] = []
    for axis in Axis:
        before, after = owned_by(source, axis, slot), owned_by(target, axis, slot)
        common = (intersect(old, new) for old in before for new in after)
        kept += [(axis, atoms) for atoms in sorted(atoms for atoms in common if atoms)]
    return tuple(kept)


def even_shares(amount: int, unit: int, loads: Sequence[int]) -> tuple[int, ...]:
    """How many of `amount` atoms of `unit` elements each bearer takes on top of `loads`.

    Water-filling: the loads that receive something end within one atom of each other. Ties go to
    the earlier bearer. Exact in integers; the cost does not depend on `amount`.
    """
    order = sorted(range(len(loads)), key=lambda index: (loads[index], index))
    # The water stands over the lowest loads; find how many, and the level.
    wet, below = 1, loads[order[0]]
    while wet < len(order) and loads[order[wet]] * wet < below + amount * unit:
        below += loads[order[wet]]
        wet += 1
    level = (below + amount * unit) // wet
    shares = [0] * len(loads)
    for index in order[:wet]:
        shares[index] = (level - loads[index]) // unit
    left = amount - sum(shares)
    assert 0 <= left <= wet, (amount, unit, loads, shares)
    lowest = sorted(order[:wet], key=lambda index: (loads[index] + shares[index] * unit, index))
    for index in lowest[:left]:
        shares[index] += 1
    return tuple(shares)


@dataclass(frozen=True, slots=True)
class _Need:
    """A range (None: the replicated tensors) that `target` lacks and all of `holders` have."""

    axis: Axis | None
    atoms: Range | None
    target: SlotRef
    holders: tuple[SlotRef, ...]


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
    _check_inputs(source, target, holders)
    # Least flexible first: what has one holder is forced, and large atoms (or the replicated
    # tensors, which are not cut at all) are hard to place late, while small ones level the loads.
    needs = sorted(
        _needs(source, target, holders),
        key=lambda need: (
            len(need.holders) > 1,
            -sizes.of(need.axis),
            len(need.holders),
            -_elements(need.axis, need.atoms, sizes),
            need.target,
            need.axis or "",
            need.atoms.start if need.atoms else 0,
        ),
    )
    sent = dict.fromkeys(holders, 0)
    moves: list[Move] = []
    for need in needs:
        # On equal load the replica's own slots come first: they share its scale-up domain.
        bearers = sorted(need.holders, key=lambda ref: (ref.replica != need.target.replica, ref))
        loads = [sent[bearer] for bearer in bearers]
        unit = max(1, sizes.of(need.axis))
        amount = len(need.atoms) if need.atoms else 1
        start = need.atoms.start if need.atoms else 0
        for bearer, share in zip(bearers, even_shares(amount, unit, loads), strict=True):
            if share:
                atoms = Range(start, start + share) if need.atoms else None
                moves.append(Move(need.axis, atoms, bearer, need.target))
                sent[bearer] += share * unit
                start += share
    plan = ReshardPlan(tuple(sorted(moves, key=_order)))
    check_reshard(plan, source, target, holders)
    return plan


def _check_inputs(
    source: ParallelLayout, target: ParallelLayout, holders: frozenset[SlotRef]
) -> None:
    for old, new in zip(
        source.replicas[0].shards.axes, target.replicas[0].shards.axes, strict=True
    ):
        if old.atoms != new.atoms:
            raise ValueError(
                f"{old.axis} has {old.atoms} atoms in the source layout and {new.atoms} in the "
                "target; both must be layouts of one model"
            )
    if strangers := sorted(holders - set(source.slots())):
        raise ValueError(f"holders {strangers} are not active in the source layout; leave them out")


def _needs(
    source: ParallelLayout, target: ParallelLayout, holders: frozenset[SlotRef]
) -> list[_Need]:
    living = tuple(sorted(holders))
    needs: list[_Need] = []
    for slot in target.slots():
        if slot not in holders:
            if not living:
                raise NoHolder(None, None)
            needs.append(_Need(None, None, slot, living))
    for axis in Axis:
        stock = [(piece, ref) for ref in living for piece in owned_by(source, axis, ref)]
        bounds = sorted({bound for piece, _ in stock for bound in (piece.start, piece.stop)})
        for slot in target.slots():
            had = owned_by(source, axis, slot) if slot in holders else ()
            for piece in owned_by(target, axis, slot):
                for missing in subtract(piece, had):
                    for part in _cut(missing, bounds):
                        refs = tuple(ref for held, ref in stock if held.contains(part))
                        if not refs:
                            raise NoHolder(axis, part)
                        needs.append(_Need(axis, part, slot, refs))
    return needs


def _cut(atoms: Range, bounds: Sequence[int]) -> list[Range]:
    inner = [bound for bound in bounds if atoms.start < bound < atoms.stop]
    edges = [atoms.start, *inner, atoms.stop]
    return [Range(start, stop) for start, stop in pairwise(edges)]


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
    received: dict[tuple[SlotRef, Axis | None], list[Range]] = {}
    fresh: list[SlotRef] = []
    for move in plan.moves:
        if move.source not in holders or move.source == move.target:
            raise ValueError(f"{move}: its source is not another living process; plan again")
        if move.axis is None or move.atoms is None:
            fresh.append(move.target)
            continue
        for layout, end in ((source, move.source), (target, move.target)):
            if not any(piece.contains(move.atoms) for piece in owned_by(layout, move.axis, end)):
                raise ValueError(f"{move}: its atoms are not in one range of {end}; plan again")
        received.setdefault((move.target, move.axis), []).append(move.atoms)
    if sorted(fresh) != sorted(set(target.slots()) - holders):
        raise ValueError(
            f"replicated tensors go to {fresh}, not once to each fresh slot; plan again"
        )
    for slot in target.slots():
        kept = kept_ranges(source, target, slot) if slot in holders else ()
        for axis in Axis:
            have = [atoms for kind, atoms in kept if kind is axis]
            have += received.get((slot, axis), [])
            if merged(have) != merged(owned_by(target, axis, slot)):
                raise ValueError(
                    f"{slot} would end with {axis} {sorted(have)} instead of "
                    f"{owned_by(target, axis, slot)}; plan again"
                )
