"""A plan as what it changes in the one before it.

Pure. A plan names every worker of the job, and a failure changes the places of a few. So a plan is
published as its difference to the newest plan before it, the *base*, whose size goes with what
changed. Who has the base rebuilds the whole plan, and compares its digest with the author's before
anybody acts on it. A job's first plan is published whole, and so is the rare one that its base
says too little of; whoever comes later begins with a whole one too (`elastic.plan_chain`).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import msgspec

from elastic.plan import Action, Alternative, Plan, StateSource
from elastic.salvage import Kept, Salvage
from elastic.topology import Assignment, Member
from ntp.geometry import ParallelLayout, ReplicaLayout
from ntp.ranges import merged
from ntp.reshard_plan import ReshardPlan


class SalvageChange(msgspec.Struct, frozen=True, array_like=True):
    """What is kept of a step, for those who know what the base's replicas were to compute of it.

    Replicas keep just that, from the base's generation, but for those that keep `nothing` and
    those that keep `other` samples. `shares` are those of replicas that compute any beside.
    """

    nothing: tuple[int, ...]
    other: tuple[Kept, ...]
    shares: tuple[tuple[int, int], ...]


class PlanChange(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Controller: become this generation. Key ``plan/<generation>``, created once.

    `base` is the generation whose plan it starts from, `digest` that of the plan that comes of it.
    `dropped` are the replicas of the base that take no part any more; `rows`, `layouts` and
    `shares` have the workers, the layout and the samples of those replicas where they are not as in
    the base; `rebuilt` are the replicas that are not kept. The layout that `reshard` starts from is
    named by its generation alone. All other fields are the plan's own.
    """

    generation: int
    base: int
    digest: str
    dropped: tuple[int, ...]
    rows: tuple[tuple[int, tuple[Assignment, ...]], ...]
    layouts: tuple[ReplicaLayout, ...]
    shares: tuple[tuple[int, int], ...]
    rebuilt: tuple[int, ...]
    action: Action
    donors: tuple[Assignment, ...]
    movers: tuple[Assignment, ...]
    newcomers: tuple[Member, ...]
    source_generation: int
    reshard: tuple[ReshardPlan, ...]
    resume_step: int
    apply_vote: tuple[float, ...] | None
    redone: bool
    state_source: StateSource
    rendezvous: str
    throughput: float
    alternatives: tuple[Alternative, ...]
    reason: str
    salvage: SalvageChange | None
    unbroken: bool


def difference(base: Plan, plan: Plan) -> PlanChange | None:
    """What `plan` changes in `base`; None if the base says too little of it."""
    same_grid = (base.stages, base.layout.tp_base) == (plan.stages, plan.layout.tp_base)
    if not same_grid or _source_layout(base, plan.source_generation) != plan.source_layout:
        return None
    rows, old_rows = plan.rows(), base.rows()
    layouts = {replica.replica: replica for replica in base.layout.replicas}
    shares, old_shares = _shares(plan), _shares(base)
    kept = set(plan.kept_replicas)
    return PlanChange(
        generation=plan.generation,
        base=base.generation,
        digest=plan.digest,
        dropped=tuple(number for number in layouts if number not in rows),
        rows=tuple((n, row) for n, row in rows.items() if old_rows.get(n) != row),
        layouts=tuple(each for each in plan.layout.replicas if layouts.get(each.replica) != each),
        shares=tuple((n, share) for n, share in shares.items() if old_shares.get(n) != share),
        rebuilt=tuple(number for number in rows if number not in kept),
        action=plan.action,
        donors=plan.donors,
        movers=plan.movers,
        newcomers=plan.newcomers,
        source_generation=plan.source_generation,
        reshard=plan.reshard,
        resume_step=plan.resume_step,
        apply_vote=plan.apply_vote,
        redone=plan.redone,
        state_source=plan.state_source,
        rendezvous=plan.rendezvous,
        throughput=plan.throughput,
        alternatives=plan.alternatives,
        reason=plan.reason,
        salvage=_salvage_change(base, plan),
        unbroken=plan.unbroken,
    )


def changed(base: Plan, change: PlanChange) -> Plan:
    """The whole plan. Raises ValueError if this is not what its author had."""
    if change.base != base.generation:
        raise ValueError(
            f"plan {change.generation} changes plan {change.base}, not plan {base.generation}"
        )
    layouts = {replica.replica: replica for replica in base.layout.replicas}
    layouts |= {replica.replica: replica for replica in change.layouts}
    numbers = sorted(layouts.keys() - set(change.dropped))
    rows = {**base.rows(), **dict(change.rows)}
    shares = _shares(base) | dict(change.shares)
    rebuilt = set(change.rebuilt)
    plan = Plan(
        generation=change.generation,
        action=change.action,
        placement=tuple(chain.from_iterable(rows.get(number, ()) for number in numbers)),
        donors=change.donors,
        movers=change.movers,
        newcomers=change.newcomers,
        stages=base.stages,
        layout=ParallelLayout(base.layout.tp_base, tuple(layouts[number] for number in numbers)),
        source_layout=_source_layout(base, change.source_generation),
        source_generation=change.source_generation,
        kept_replicas=tuple(number for number in numbers if number not in rebuilt),
        reshard=change.reshard,
        batch_split=tuple(shares.get(number, 0) for number in numbers),
        resume_step=change.resume_step,
        apply_vote=change.apply_vote,
        redone=change.redone,
        state_source=change.state_source,
        rendezvous=change.rendezvous,
        throughput=change.throughput,
        alternatives=change.alternatives,
        reason=change.reason,
        salvage=_salvage(base, change, numbers),
        unbroken=change.unbroken,
    )
    if plan.digest != change.digest:
        raise ValueError(
            f"plan {plan.generation}, rebuilt from plan {base.generation}, has digest "
            f"{plan.digest[:12]}, and its author had {change.digest[:12]}: the bases differ"
        )
    return plan


def _source_layout(base: Plan, generation: int) -> ParallelLayout | None:
    """The layout of `generation`, as far as `base` knows it."""
    known = {0: None, base.source_generation: base.source_layout, base.generation: base.layout}
    return known.get(generation)


def _salvage_change(base: Plan, plan: Plan) -> SalvageChange | None:
    if plan.salvage is None:
        return None
    usual = _kept_of_base(base, plan.resume_step)
    kept = {each.replica: each for each in plan.salvage.kept}
    numbers = [replica.replica for replica in plan.layout.replicas]
    shares = zip(numbers, plan.salvage.shares, strict=True)
    return SalvageChange(
        nothing=tuple(number for number in numbers if number not in kept),
        other=tuple(each for number, each in kept.items() if usual.get(number) != each),
        shares=tuple((number, share) for number, share in shares if share),
    )


def _salvage(base: Plan, change: PlanChange, numbers: Sequence[int]) -> Salvage | None:
    """That of the plan that `change` makes, whose replicas are `numbers`."""
    if change.salvage is None:
        return None
    kept = _kept_of_base(base, change.resume_step)
    kept |= {each.replica: each for each in change.salvage.other}
    nothing = set(change.salvage.nothing)
    keeping = [number for number in numbers if number not in nothing]
    shares = dict(change.salvage.shares)
    return Salvage(
        tuple(kept[number] for number in keeping),
        tuple(shares.get(number, 0) for number in numbers),
    )


def _kept_of_base(base: Plan, step: int) -> dict[int, Kept]:
    """What each replica keeps that computed what the base gave it of `step`."""
    return {
        number: Kept(number, base.generation, merged(share.kept + share.fresh))
        for number, share in base.shares(step)
    }


def _shares(plan: Plan) -> dict[int, int]:
    numbers = (replica.replica for replica in plan.layout.replicas)
    return dict(zip(numbers, plan.batch_split, strict=True))
