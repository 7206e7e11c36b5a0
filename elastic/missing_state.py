"""What no survivor holds any more, all of it, for the reason of a halt."""

from __future__ import annotations

from collections.abc import Collection
from itertools import chain

from elastic.plan import Plan
from elastic.topology import Coordinate
from ntp.ranges import Range, subtract
from ntp.reshard_senders import atoms_name


def missing_state(source: Plan, held: Collection[Coordinate]) -> str:
    """The atoms of every axis and stage that are in none of the places `held` of `source`.

    Empty if nothing is missing.
    """
    stages = [_missing_in_stage(source, held, stage) for stage in range(source.stages)]
    if len(set(stages)) == 1:
        return stages[0]
    return "; ".join(f"{what} of stage {stage}" for stage, what in enumerate(stages) if what)


def _missing_in_stage(source: Plan, held: Collection[Coordinate], stage: int) -> str:
    places = [place for place in held if place.stage == stage]
    if not places:
        return "anything"
    shards = {replica.replica: replica.shards for replica in source.layout.replicas}
    names: list[str] = []
    for axis, homes in source.layout.homes:
        known = chain.from_iterable(shards[p.replica].owned(axis, p.slot) for p in places)
        lacking = subtract(Range(0, homes[-1].stop), known)
        names += [atoms_name(axis, atoms) for atoms in lacking]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
