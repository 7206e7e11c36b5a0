"""Which shards move from whom to whom when a layout is replaced.

Pure. `ntp.reshard_plan` knows slots; this knows workers, some of which are lost, change their
place, or are to go. Those that the plan places send; if they do not hold everything, all survivors
may.

A worker that is to go takes part as a donor, while another may fill its place in the same plan. So
it stands *aside*, under a name that nobody else can have: that of a replica beyond those of the
grid, with the same shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import replace

from elastic.job_shape import JobShape
from elastic.topology import Assignment
from ntp.atoms import total_sizes
from ntp.geometry import ParallelLayout, SlotRef
from ntp.reshard_plan import NoHolder, ReshardPlan, plan_reshard_among
from ntp.reshard_senders import Living


def plan_moves(
    shape: JobShape,
    source: ParallelLayout,
    layout: ParallelLayout,
    lost: Sequence[Assignment],
    leaving: Sequence[Assignment],
    movers: Sequence[Assignment],
) -> tuple[ReshardPlan, ...]:
    """The moves of each stage from `source` to `layout`.

    Of the places of `source`, the `lost` ones give nothing; the workers in `leaving` ones stand
    aside, and `movers` go elsewhere. Raises NoHolder if they do not hold everything together.
    """
    beside = [aside(shape, each).coordinate for each in leaving]
    extended = _with_aside(shape, source, {place.replica for place in beside})
    everywhere = {replica.replica: frozenset(replica.active) for replica in source.replicas}
    everywhere |= {place.replica: frozenset[int]() for place in beside}
    now = {replica.replica: replica for replica in layout.replicas}
    vacated = {
        SlotRef(old.replica, slot)
        for old in source.replicas
        if (new := now.get(old.replica)) is not old
        for slot in old.active
        if new is None or slot not in new.active
    }
    sizes = total_sizes(shape.sizes)
    # Stages mostly have the same holders, and then the same moves. They are told apart by those
    # that are not as everywhere else, which are few.
    known: dict[tuple[frozenset[SlotRef], frozenset[SlotRef]], ReshardPlan] = {}
    plans: list[ReshardPlan] = []
    for stage in range(shape.stages):
        gone = {p.slot_ref for p, _ in (*lost, *leaving) if p.stage == stage}
        moving = {place.slot_ref for place, _ in movers if place.stage == stage}
        odd = frozenset(gone - vacated), frozenset(moving)
        if odd not in known:
            placed = _but(everywhere, (vacated | gone) - moving)
            try:
                known[odd] = plan_reshard_among(extended, layout, placed, sizes)
            except NoHolder:
                held = _but(everywhere, gone)
                for place in beside:
                    if place.stage == stage:
                        held[place.replica] |= {place.slot}
                plans.append(plan_reshard_among(extended, layout, held, sizes))
                continue
        plans.append(known[odd])
    return tuple(plans)


def aside(shape: JobShape, left: Assignment) -> Assignment:
    """A worker that hands over what it holds, named so that another may fill its place."""
    place = left.coordinate
    return Assignment(place._replace(replica=shape.replicas + place.replica), left.member)


def _but(living: Living, slots: Iterable[SlotRef]) -> dict[int, frozenset[int]]:
    """`living` without these slots."""
    fewer = dict(living)
    for number, slot in slots:
        fewer[number] -= {slot}
    return fewer


def _with_aside(shape: JobShape, layout: ParallelLayout, numbers: Set[int]) -> ParallelLayout:
    """`layout` with the replicas of which workers stand aside a second time, under `numbers`."""
    if not numbers:
        return layout
    again = [
        replace(layout.replica(number - shape.replicas), replica=number)
        for number in sorted(numbers)
    ]
    return replace(layout, replicas=(*layout.replicas, *again))
