"""A plan: everything the workers need in order to go on as a new generation, as one value.

The controller publishes a plan once, under its generation's key; it is never rewritten. A plan
checks itself on construction, and the ranks compare its digest over the new world group before they
act on it, so that two controllers, or two versions of a decision, cannot both be acted on.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import StrEnum
from functools import cached_property
from itertools import accumulate, chain, product
from operator import eq, itemgetter

import msgspec

from elastic.salvage import Salvage, StepShare
from elastic.topology import Assignment, Member
from ntp.geometry import ParallelLayout, SlotRef
from ntp.groups import GroupSpec, groups_of
from ntp.ranges import Range
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
    CHECKPOINT = "checkpoint"


@dataclass(frozen=True, slots=True)
class Alternative:
    """What could have been done instead: its throughput relative to full strength, and why not."""

    action: Action
    throughput: float
    why_not: str


@dataclass(frozen=True)
class Plan:
    """One generation.

    `placement` lists the workers by rank. `donors` follow them in rank: survivors that lost their
    place, hold shards that others may need, and take part until these have them. `movers` are
    survivors that lost their place and got another one: each is named with the old place, whose
    shards it sends like a donor, and stands in `placement` with the new one, whose shards it
    receives like a newcomer. `newcomers` are those who begin with nothing where others hold state,
    whatever they remember; where no worker's state is used, all do, and none is named. All `stages`
    pipeline stages have the same layout, and `reshard` has the moves of each. `source_layout` is
    the layout that `reshard` starts from, that of `source_generation` (None and 0 where no worker's
    state is used).
    `kept_replicas` are those whose tensor-parallel and pipeline communicators go on. `batch_split`
    is samples per replica, in the layout's order. `resume_step` is the first step of the
    generation; survivors that have not committed the step before it apply that with `apply_vote`.
    `redone`: work on `resume_step` had begun and is dropped, but for what `salvage` keeps of it
    (None: nothing). `unbroken`: all workers of the generation before stopped between two steps and
    have all of their communicators, so those that only lose members may shrink; as all ranks must
    do the same there, the plan says so. `rendezvous` is host:port of the store to meet in.
    `throughput` is relative to full strength; `alternatives` are what was considered beside this.

    Without slots, as what follows from a plan and is asked for often is kept beside its fields.
    """

    generation: int
    action: Action
    placement: tuple[Assignment, ...]
    donors: tuple[Assignment, ...]
    movers: tuple[Assignment, ...]
    newcomers: tuple[Member, ...]
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
    throughput: float
    alternatives: tuple[Alternative, ...]
    reason: str
    salvage: Salvage | None = None
    unbroken: bool = False

    def __post_init__(self) -> None:
        # A job may have a hundred thousand places, so the loops over them are left to C.
        members = self.members
        left = [place.slot_ref for place, _ in (*self.donors, *self.movers)]
        leavers = {member for _, member in (*self.donors, *self.movers)}
        replicas = {replica.replica: set(replica.active) for replica in self.layout.replicas}
        slots = chain.from_iterable(
            product((replica.replica,), range(self.stages), replica.active)
            for replica in self.layout.replicas
        )
        conditions = {
            "placement fills the layout's slots in every stage, in order of rank": (
                len(self.placement) == self.stages * sum(r.degree for r in self.layout.replicas)
                and all(map(eq, map(itemgetter(0), self.placement), slots))
            ),
            "each stage has its moves": len(self.reshard) == self.stages,
            "no worker is placed twice": len(members) == len(self.placement) + len(self.donors),
            "newcomers take part": members.issuperset(self.newcomers),
            "movers and donors survive": leavers.isdisjoint(self.newcomers),
            "movers are placed, and donors are not": len(leavers) == len(left)
            and members.issuperset(leavers),
            "who leaves a place leaves it vacant": not any(
                ref.slot in replicas.get(ref.replica, ()) for ref in left
            ),
            "each replica has a share of the batch": len(self.batch_split) == len(replicas)
            and all(share > 0 for share in self.batch_split),
            "state has a source exactly if it is not initialised": (self.source_layout is None)
            == (self.source_generation == 0),
            "steps count from 0 and generations from 1": self.resume_step >= 0
            and self.generation >= 1,
            "kept groups belong to replicas": replicas.keys() >= set(self.kept_replicas),
            "something is computed": self.throughput > 0,
            "each sample of the resumed step is kept or computed, once": self.salvage is None
            or (
                self.salvage.is_whole(sum(self.batch_split))
                and len(self.salvage.shares) == len(replicas)
            ),
            "groups are unbroken only where there were some, and no step was interrupted": not (
                self.unbroken
                and (self.source_layout is None or self.redone or self.apply_vote is not None)
            ),
            "replicas keep gradients of earlier generations": self.salvage is None
            or all(
                each.replica in replicas and 0 < each.generation < self.generation
                for each in self.salvage.kept
            ),
        }
        broken = [condition for condition, holds in conditions.items() if not holds]
        if broken:
            raise ValueError(f"plan {self.generation} breaks: {'; '.join(broken)}")

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the plan's canonical encoding."""
        told = {each.name: getattr(self, each.name) for each in fields(self)}
        told |= {name: _brief(told[name]) for name in ("layout", "source_layout")}
        # The layout tells the places.
        told["placement"] = list(map(itemgetter(1), self.placement))
        return hashlib.sha256(msgspec.json.encode(told)).hexdigest()

    @cached_property
    def members(self) -> frozenset[Member]:
        """Everybody who takes part in the change to this generation."""
        return frozenset(chain(map(itemgetter(1), self.placement), map(itemgetter(1), self.donors)))

    @property
    def participants(self) -> tuple[Assignment, ...]:
        """Everybody who takes part in the change to this generation, by rank of the meeting."""
        return self.placement + self.donors

    def survives(self, member: Member) -> bool:
        """Whether the moves count on the state that this participant holds."""
        return self.source_layout is not None and member not in self.newcomers

    def came_anew(self, member: Member) -> bool:
        """Whether this participant fills a place that it did not have before."""
        return member in self.newcomers or any(member == mover for _, mover in self.movers)

    def speaks(self, member: Member) -> bool:
        """Whether this worker's reports of steps may stand for everybody's: two ranks' do, which
        are on two nodes if there are several."""
        return member in (self.placement[0].member, self.placement[-1].member)

    def groups_of(self, rank: int) -> tuple[GroupSpec, ...]:
        """The communicators that rank `rank` of the meeting is in, in creation order."""
        sync = plan_sync(self.layout)
        return groups_of(rank, self.layout, sync, self.stages, len(self.donors))

    def meeting_ranks(self, stage: int) -> dict[SlotRef, int]:
        """Rank in the meeting of every slot of `stage`, of those that are left too."""
        ranks = {
            place.slot_ref: rank
            for rank, (place, _) in enumerate(self.participants)
            if place.stage == stage
        }
        for old, member in self.movers:
            if old.stage == stage:
                ranks[old.slot_ref] = next(
                    rank for rank, each in enumerate(self.placement) if each.member == member
                )
        return ranks

    def rows(self) -> Mapping[int, tuple[Assignment, ...]]:
        """The assignments of each replica."""
        return self._rows

    @cached_property
    def _rows(self) -> dict[int, tuple[Assignment, ...]]:
        rows: dict[int, tuple[Assignment, ...]] = {}
        begin = 0
        for replica in self.layout.replicas:
            end = begin + replica.degree * self.stages
            rows[replica.replica] = self.placement[begin:end]
            begin = end
        return rows

    def shares(self, step: int) -> Iterator[tuple[int, StepShare]]:
        """Each replica with the samples of `step` that its gradient is to be over."""
        numbers = [replica.replica for replica in self.layout.replicas]
        if self.salvage is None or step != self.resume_step:
            stops = accumulate(self.batch_split)
            for number, size, stop in zip(numbers, self.batch_split, stops, strict=True):
                yield number, StepShare((), (Range(stop - size, stop),))
            return
        kept = {each.replica: each.samples for each in self.salvage.kept}
        fresh = self.salvage.fresh(sum(self.batch_split))
        for number, samples in zip(numbers, fresh, strict=True):
            yield number, StepShare(kept.get(number, ()), samples)

    def kept_from(self, replica: int) -> int:
        """The generation whose gradients of `resume_step` a replica keeps; 0: it keeps none."""
        kept = self.salvage.kept if self.salvage else ()
        return next((each.generation for each in kept if each.replica == replica), 0)

    def stage_ranks(self) -> dict[SlotRef, int]:
        """Rank of every slot within its stage, which is the same in all stages."""
        return {ref: rank for rank, ref in enumerate(self.layout.slots())}

    def degrees(self) -> tuple[tuple[int, ...], ...]:
        """Active slots per replica and per stage."""
        return tuple((replica.degree,) * self.stages for replica in self.layout.replicas)


def changed_rows(before: Plan, after: Plan) -> list[int]:
    """The replicas whose workers are not the same in two plans."""
    then, now = before.rows(), after.rows()
    return [replica for replica in {**then, **now} if now.get(replica) != then.get(replica)]


def _brief(layout: ParallelLayout | None) -> object:
    """What tells a layout from others: a whole replica owns its homes, so its number will do."""
    if layout is None:
        return None
    replicas = [each.replica if each.degree == layout.tp_base else each for each in layout.replicas]
    return layout.tp_base, layout.homes, replicas


@dataclass(frozen=True, slots=True)
class NoPlan:
    """There is no way to go on; `reason` says why."""

    reason: str
