"""What is trained: a number per atom, and one for all that is replicated.

A step mixes its own number and its tokens into each: a step that is lost, applied twice or applied
to the wrong atom shows in the value.
"""

from __future__ import annotations

from collections.abc import Mapping

from elastic.plan import Plan, StateSource
from elastic.topology import Member
from ntp.atoms import Axis
from ntp.geometry import SlotRef
from ntp.reshard_plan import kept_ranges

Piece = tuple[Axis | None, int]
Values = dict[Piece, int]
REPLICATED: Piece = (None, 0)


def mix(value: int, step: int, tokens: float) -> int:
    """The value of a piece after `step`."""
    return (value * 6364136223846793005 + (step + 1) * 1442695040888963407 + int(tokens)) % 2**64


def initial(piece: Piece, stage: int) -> int:
    """The value of a piece before the first step: different for every one."""
    axis, atom = piece
    return mix(stage * 100000 + len(axis or "") * 1000 + atom, 0, 7.0)


def owned(plan: Plan, slot: SlotRef) -> list[Piece]:
    """Every piece that `slot` is to hold in the plan's layout, in each stage."""
    shards = plan.layout.replica(slot.replica).shards
    pieces: list[Piece] = [REPLICATED]
    for axis in Axis:
        for atoms in shards.owned(axis, slot.slot):
            pieces += [(axis, atom) for atom in range(atoms.start, atoms.stop)]
    return pieces


def sent(plan: Plan, stage: int, slot: SlotRef, values: Values) -> dict[tuple[SlotRef, Piece], int]:
    """What `slot` sends to whom. Raises KeyError if it lacks a piece."""
    letters: dict[tuple[SlotRef, Piece], int] = {}
    for move in plan.reshard[stage].moves:
        if move.source == slot:
            for atom in range(move.atoms.start, move.atoms.stop) if move.atoms else (0,):
                letters[move.target, (move.axis, atom)] = values[move.axis, atom]
    return letters


def senders(plan: Plan, stage: int, slot: SlotRef) -> set[Member]:
    """Who sends something to `slot`."""
    members = {
        place.slot_ref: member
        for place, member in (*plan.participants, *plan.movers)
        if place.stage == stage
    }
    return {members[move.source] for move in plan.reshard[stage].moves if move.target == slot}


def begun(plan: Plan, stage: int, slot: SlotRef, values: Values) -> Values:
    """What `slot` has of its new values before any are received."""
    if plan.state_source is StateSource.INITIALIZE:
        return {piece: initial(piece, stage) for piece in owned(plan, slot)}
    if not values:
        return {}
    assert plan.source_layout is not None
    staying: Values = {REPLICATED: values[REPLICATED]}
    for axis, atoms in kept_ranges(plan.source_layout, plan.layout, slot):
        for atom in range(atoms.start, atoms.stop):
            staying[axis, atom] = values[axis, atom]
    return staying


def received(letters: Mapping[tuple[SlotRef, Piece], int], slot: SlotRef) -> Values:
    """What is for `slot` in a sender's letters."""
    return {piece: value for (target, piece), value in letters.items() if target == slot}
