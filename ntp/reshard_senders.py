"""Who sends the atoms that slots lack in a change of layout.

Theory of operation. Replicas are bitwise equal, so any living holder will do, and the only choice
is who sends how much. A change takes as long as the slot that sends or receives most, and what a
slot receives is given: what it lacks. So nobody should send more than the neediest slot receives;
below that, more senders only mean more messages. A need is served, in this order,

1. by slots of its own replica, which share its scale-up domain and the fast links in it. They hold
   the home of a slot that returns. Each gives up to what the neediest slot of the replica receives;
2. by slot h of other replicas, for atoms of home h, as each of them has all of it in one range. The
   needs of one home, of all axes, lie on one line measured in elements, and each sender gives an
   even consecutive part, cut between atoms. There are as many senders as there are receivers, or
   FEW_SENDERS if that is more, since a single connection seldom fills a link;
3. by slots of other replicas that adopted atoms of home h, only if no slot h lives. Each has but a
   part of the home, so that the line would fall into crumbs at their bounds. What has the same
   holders is given by those that have the least to send so far.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from ntp.atoms import AtomSizes, Axis
from ntp.geometry import ParallelLayout, ReplicaLayout, SlotRef
from ntp.ranges import Range

FEW_SENDERS = 8
"""Senders for the needs of one home, where it has as many holders, however few slots have needs."""

Living = Mapping[int, frozenset[int]]
"""By replica, ascending: the slots whose process lives and has its state."""


_ATOM = {
    Axis.KV_GROUP: "KV group",
    Axis.MLP_COLUMN: "MLP column",
    Axis.VOCAB_ROW: "vocabulary row",
    Axis.EXPERT: "expert",
}


def atoms_name(axis: Axis | None, atoms: Range | None) -> str:
    """Some atoms, or with None all replicated tensors, in words: first and last of a range."""
    if axis is None or atoms is None:
        return "the replicated tensors"
    last = atoms.stop - 1
    return f"{_ATOM[axis]}s {atoms.start}-{last}" if atoms.start < last else f"{_ATOM[axis]} {last}"


class NoHolder(ValueError):
    """Something that a target slot needs is held by no living process."""

    def __init__(self, axis: Axis | None, atoms: Range | None) -> None:
        super().__init__(f"nobody alive holds {atoms_name(axis, atoms)}")
        self.axis = axis
        self.atoms = atoms


class Need(NamedTuple):
    """`target` lacks `atoms`, which belong to one home and lie in one range that it is to own."""

    target: SlotRef
    axis: Axis
    atoms: Range
    home: int


Share = tuple[Need, Range, SlotRef]
"""Of a need, these atoms come from this slot."""


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


def share_out(
    needs: Sequence[Need], source: ParallelLayout, living: Living, sizes: AtomSizes
) -> list[Share]:
    """All atoms of `needs` (one replica after another), each from one living slot of `source`.

    Raises NoHolder if there are atoms that none has.
    """
    shares: list[Share] = []
    by_home: dict[int, list[Need]] = defaultdict(list)
    for number, group in groupby(needs, key=lambda need: need.target.replica):
        own = list(group)
        if living.get(number):
            served, own = _from_own_replica(own, source.replica(number), living[number], sizes)
            shares += served
        for need in own:
            by_home[need.home].append(need)
    sent = Counter[SlotRef]()
    for home, wanted in sorted(by_home.items()):
        having = [number for number, slots in living.items() if home in slots]
        # A replica that has needs has given what it should of its own, unless nobody else can.
        needy = {need.target.replica for need in wanted}
        holders = [number for number in having if number not in needy] or having
        if holders:
            receivers = len({need.target for need in wanted})
            count = min(len(holders), max(receivers, FEW_SENDERS))
            chosen = (holders[index * len(holders) // count] for index in range(count))
            shares += _in_even_parts(wanted, [SlotRef(number, home) for number in chosen], sizes)
        else:
            shares += _from_adopters(wanted, source, living, sizes, sent)
    return shares


def _elements(need: Need, sizes: AtomSizes) -> int:
    return len(need.atoms) * sizes.of(need.axis)


def _from_own_replica(
    needs: Sequence[Need], replica: ReplicaLayout, alive: frozenset[int], sizes: AtomSizes
) -> tuple[list[Share], list[Need]]:
    """What the replica's own slots give, and what is left to others."""
    active = frozenset(replica.active)
    near: list[tuple[Need, int, Range]] = []
    left: list[Need] = []
    for need in needs:
        if need.home in alive:
            near.append((need, need.home, need.atoms))
        elif need.home in active:
            left.append(need)  # Who owned it is gone, and nobody else in the replica has it.
        else:
            for slot, atoms in replica.shards.axis(need.axis).holders(need.atoms):
                if slot in alive:
                    near.append((need, slot, atoms))
                else:
                    left.append(need._replace(atoms=atoms))
    received = Counter[SlotRef]()
    for need in needs if near else ():
        received[need.target] += _elements(need, sizes)
    limit = max(received.values(), default=0)
    sent = Counter[int]()
    shares: list[Share] = []
    for need, slot, atoms in near:
        unit = sizes.of(need.axis)
        given = min(len(atoms), (limit - sent[slot]) // unit) if unit else len(atoms)
        sent[slot] += given * unit
        middle = atoms.start + given
        if atoms.start < middle:
            shares.append((need, Range(atoms.start, middle), SlotRef(replica.replica, slot)))
        if middle < atoms.stop:
            left.append(need._replace(atoms=Range(middle, atoms.stop)))
    return shares, left


def _in_even_parts(
    needs: Sequence[Need], senders: Sequence[SlotRef], sizes: AtomSizes
) -> Iterator[Share]:
    """Lay the needs on a line and cut it into one part for each sender."""
    total = sum(_elements(need, sizes) for need in needs)
    index = begin = 0
    for need in needs:
        unit = sizes.of(need.axis)
        start, end = need.atoms.start, begin + len(need.atoms) * unit
        while index + 1 < len(senders) and (bound := (index + 1) * total // len(senders)) < end:
            # The nearest gap between atoms.
            stop = need.atoms.start + (2 * (bound - begin) + unit) // (2 * unit)
            if start < stop:
                yield need, Range(start, stop), senders[index]
            start = stop
            index += 1
        if start < need.atoms.stop:
            whole = start == need.atoms.start
            yield need, need.atoms if whole else Range(start, need.atoms.stop), senders[index]
        begin = end


def _from_adopters(
    needs: Sequence[Need],
    source: ParallelLayout,
    living: Living,
    sizes: AtomSizes,
    sent: Counter[SlotRef],
) -> Iterator[Share]:
    """From whoever has the atoms, level with what is `sent`, which this adds to."""
    for need in needs:
        stock = [
            (SlotRef(number, slot), atoms)
            for number, alive in living.items()
            for slot, atoms in source.replica(number).shards.axis(need.axis).holders(need.atoms)
            if slot in alive
        ]
        bounds = {bound for _, atoms in stock for bound in (atoms.start, atoms.stop)}
        unit = max(1, sizes.of(need.axis))
        for start, stop in pairwise(sorted(bounds | {need.atoms.start, need.atoms.stop})):
            part = Range(start, stop)
            holders = [ref for ref, atoms in stock if atoms.contains(part)]
            if not holders:
                raise NoHolder(need.axis, part)
            loads = [sent[holder] for holder in holders]
            for holder, atoms in zip(holders, even_shares(len(part), unit, loads), strict=True):
                if atoms:
                    yield need, Range(start, start + atoms), holder
                    sent[holder] += atoms * unit
                    start += atoms
