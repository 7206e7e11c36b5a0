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

from elastic.topology import Assignment, Member
from ntp.geometry import ParallelLayout, SlotRef
from ntp.groups import GroupSpec, groups_of, places
from ntp.reshard_plan import ReshardPlan
from ntp.sync_plan import plan_sync


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

    `placement` lists the workers by rank. `donors` follow them in rank: survivors that lost their
    place, hold shards that others need, and take part until these have them. `survivors` are those
    of both whose state the moves count on; any other begins with nothing. All `stages` pipeline
    stages have the same layout, and `reshard` has the moves of each. `source_layout` is the layout
    that `reshard` starts from, that of `source_generation` (None and 0 when state is initialised).
    `kept_replicas` are those whose tensor-parallel and pipeline communicators go on. `batch_split`
    is samples per replica, in the layout's order. `resume_step` is the first step of the
    generation; survivors that have not committed the step before it apply that with `apply_vote`.
    `redone`: work on `resume_step` had begun and is dropped. `rendezvous` is host:port of the store
    to meet in.
    """

    generation: int
    action: Action
    placement: tuple[Assignment, ...]
    donors: tuple[Assignment, ...]
    survivors: tuple[Member, ...]
    stages: int
    layout: ParallelLayout
    source_layout: ParallelLayout | None
    source_generation: int
    kept_replicas: tuple[int, ...]
    reshard: tuple[ReshardPlan, ...]
    batch_split: tuple[int, ...]
    resume_step: int
    apply_vote: tuple[float, ...] | None
    redone: bool
    state_source: StateSource
    rendezvous: str
    reason: str

    def __post_init__(self) -> None:
        filled = tuple(assignment.coordinate for assignment in self.placement)
        members = {assignment.member for assignment in self.participants}
        replicas = {replica.replica for replica in self.layout.replicas}
        conditions = {
            "placement fills the layout's slots in every stage, in order of rank": filled
            == places(self.layout, self.stages),
            "each stage has its moves": len(self.reshard) == self.stages,
            "no worker is placed twice": len(members) == len(self.participants),
            "survivors take part": set(self.survivors) <= members,
            "donors have no place": not {a.coordinate for a in self.donors} & set(filled),
            "each replica has a share of the batch": len(self.batch_split) == len(replicas)
            and all(share > 0 for share in self.batch_split),
            "state has a source exactly if it is not initialised": (self.source_layout is None)
            == (self.source_generation == 0),
            "steps count from 0 and generations from 1": self.resume_step >= 0
            and self.generation >= 1,
            "kept groups belong to replicas": set(self.kept_replicas) <= replicas,
        }
        broken = [condition for condition, holds in conditions.items() if not holds]
        if broken:
            raise ValueError(f"plan {self.generation} breaks: {'; '.join(broken)}")

    @property
    def digest(self) -> str:
        """SHA-256 over the plan's canonical encoding."""
        return hashlib.sha256(msgspec.json.encode(self)).hexdigest()

    @property
    def participants(self) -> tuple[Assignment, ...]:
        """Everybody who takes part in the change to this generation, by rank of the meeting."""
        return self.placement + self.donors

    def groups_of(self, rank: int) -> tuple[GroupSpec, ...]:
        """The communicators that rank `rank` of the meeting is in, in creation order."""
        sync = plan_sync(self.layout)
        return groups_of(rank, self.layout, sync, self.stages, len(self.donors))

    def meeting_ranks(self, stage: int) -> dict[SlotRef, int]:
        """Rank in the meeting of every slot of `stage`."""
        return {
            assignment.coordinate.slot_ref: rank
            for rank, assignment in enumerate(self.participants)
            if assignment.coordinate.stage == stage
        }

    def stage_ranks(self) -> dict[SlotRef, int]:
        """Rank of every slot within its stage, which is the same in all stages."""
        return {ref: rank for rank, ref in enumerate(self.layout.slots())}

    def degrees(self) -> tuple[tuple[int, ...], ...]:
        """Active slots per replica and per stage."""
        return tuple((replica.degree,) * self.stages for replica in self.layout.replicas)


@dataclass(frozen=True, slots=True)
class NoPlan:
    """There is no way to go on; `reason` says why."""

    reason: str
