"""What a plan changes, as an action and in words.

Pure. The new plan is compared with the one before it, replica by replica; only those that changed
are looked at.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence

from elastic.placement import Row
from elastic.plan import Action
from elastic.topology import Assignment, Coordinate, DeviceId
from ntp.geometry import ParallelLayout, SlotRef

FEW = 8
"""Things of a kind that are named one by one."""


def first_change(layout: ParallelLayout, workers: int) -> str:
    """The first plan of a run."""
    degrees = [replica.degree for replica in layout.replicas]
    if len(degrees) <= FEW:
        shown = "+".join(f"TP{degree}" for degree in degrees)
    else:
        counts = sorted(Counter(degrees).items(), reverse=True)
        shown = " + ".join(f"{count} x TP{degree}" for degree, count in counts)
    return f"all {workers} workers are ready: {shown}"


def change(
    before: Mapping[int, Row],
    rows: Mapping[int, Row],
    movers: Sequence[Assignment],
    homes: Mapping[Coordinate, DeviceId],
    stages: int,
    idle: int,
) -> tuple[Action, str]:
    """The action that makes `rows` of those `before`, and what happens, in words.

    `idle` workers have no place.
    """
    changed = [r for r in sorted({*before, *rows}) if before.get(r, ()) != rows.get(r, ())]
    old = {a.coordinate: a.member for r in changed for a in before.get(r, ())}
    new = {a.coordinate: a.member for r in changed for a in rows.get(r, ())}
    lost = sorted({place.slot_ref for place in old} - {place.slot_ref for place in new})
    gained = sorted({place.slot_ref for place in new} - {place.slot_ref for place in old})
    dropped = [replica for replica in changed if replica not in rows]
    swapped = [p for p in new if p in old and old[p].device != new[p].device]
    if dropped:
        action = Action.DROP_REPLICA
    elif lost:
        action = Action.REDUCE_TP
    elif gained:
        action = Action.GROW_TP
    elif swapped:
        action = Action.SWAP_SPARE
    else:
        replaced = sum(old[place] != new[place] for place in new)
        return Action.CONTINUE, (
            f"{replaced} workers replaced in place" if replaced else "nobody was lost"
        )
    came_from = {member: place for place, member in movers}
    news = [place for place in sorted(new) if old.get(place) != new[place]]
    home = {p.slot_ref for p in news if new[p].device == homes.get(p)}
    away = [p for p in news if new[p].device != homes.get(p) or p in swapped]
    parts = [
        *few(f"{_name(ref)} is vacant" for ref in lost if ref.replica not in dropped),
        *few(f"{_name(ref)} returned" for ref in gained if ref in home),
        *few(_arrival(place, new[place].device, came_from.get(new[place])) for place in away),
        *few(
            f"replica {r} goes to TP{len(rows[r]) // stages}"
            for r in changed
            if r in rows and r in {ref.replica for ref in (*lost, *gained)}
        ),
        *few(f"replica {replica} is dropped" for replica in dropped),
    ]
    if idle:
        parts.append("1 worker idles" if idle == 1 else f"{idle} workers idle")
    return action, ", ".join(parts)


def _arrival(place: Coordinate, device: DeviceId, old: Coordinate | None) -> str:
    if old is None:
        return f"{device} takes {place}"
    return f"{device} moves from {old} to {place}"


def few(parts: Iterable[str]) -> Iterator[str]:
    """The first few, and how many more there are."""
    every = list(parts)
    yield from every[:FEW]
    if more := every[FEW:]:
        yield f"{len(more)} more like this"


def _name(ref: SlotRef) -> str:
    return f"replica {ref.replica} slot {ref.slot}"
