"""A plan: everything the workers need in order to go on as a new generation, as one value.

The controller publishes a plan once, under its generation's key; it is never rewritten. A plan
checks itself on construction, and the ranks compare its digest over the new world group before they
act on it, so that two controllers, or two versions of a decision, cannot both be acted on.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from enum import StrEnum

import msgspec

from elastic.topology import Assignment
from ntp.geometry import ParallelLayout, SlotRef
from ntp.groups import GroupAxis, GroupSpec
from ntp.reshard_plan import ReshardPlan


class Action(StrEnum):
    """What a plan does about what happened."""

    CONTINUE = "CONTINUE"
    REDUCE_TP = "REDUCE_TP"
    GROW_TP = "GROW_TP"
    SWAP_SPARE = "SWAP_SPARE"
    DROP_REPLICA = "DROP_REPLICA"
    RESTORE = "RESTORE"
    HALT = "HALT"


class StateSource(StrEnum):
    """Where the state of a generation comes from."""

    INITIALIZE = "initialize"
    PEERS = "peers"


@dataclass(frozen=True, slots=True)
class Plan:
    """One generation.

    `placement` lists the workers by rank. `source_layout` is the layout that `reshard` starts from,
    that of `source_generation` (None and 0 when state is initialised). `kept_tensor_groups` are the
    replicas whose tensor-parallel communicator goes on. `batch_split` is samples per replica, in
    the layout's order. `resume_step` is the first step of the generation; survivors that have not
    committed the step before it apply that with `apply_vote`. `redone`: work on `resume_step` had
    begun and is dropped. `rendezvous` is host:port of the torch store.
    """

    generation: int
    action: Action
    placement: tuple[Assignment, ...]
    layout: ParallelLayout
    source_layout: ParallelLayout | None
    source_generation: int
    groups: tuple[GroupSpec, ...]
    kept_tensor_groups: tuple[int, ...]
    reshard: ReshardPlan
    batch_split: tuple[int, ...]
    resume_step: int
    apply_vote: tuple[float, ...] | None
    redone: bool
    state_source: StateSource
    rendezvous: str
    reason: str

    def __post_init__(self) -> None:
        slots = tuple(assignment.coordinate.slot_ref for assignment in self.placement)
        assert slots == self.layout.slots(), "placement and layout name different slots"
        members = {assignment.member for assignment in self.placement}
        assert len(members) == len(self.placement), "a worker is placed twice"
        assert len(self.batch_split) == len(self.layout.replicas), (
            "one share of the batch a replica"
        )
        assert all(share > 0 for share in self.batch_split), "every replica has samples"
        assert (self.source_layout is None) == (self.source_generation == 0)
        assert self.resume_step >= 0 and self.generation >= 1
        replicas = {replica.replica for replica in self.layout.replicas}
        assert set(self.kept_tensor_groups) <= replicas, "a kept group belongs to no replica"
        assert all(rank < len(slots) for group in self.groups for rank in group.ranks)
        assert self.groups[0].axis is GroupAxis.WORLD

    @property
    def digest(self) -> str:
        """SHA-256 over the plan's canonical encoding."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    def ranks(self) -> dict[SlotRef, int]:
        """Rank of every slot."""
        return {ref: rank for rank, ref in enumerate(self.layout.slots())}

    def degrees(self) -> tuple[tuple[int, ...], ...]:
        """Active slots per replica and per stage."""
        return tuple((replica.degree,) for replica in self.layout.replicas)


@dataclass(frozen=True, slots=True)
class NoPlan:
    """There is no way to go on; `reason` says why."""

    reason: str
