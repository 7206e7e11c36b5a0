"""What to do about the workers that are there: the next generation's plan.

Pure. The planner is given who is alive, what the survivors hold, and the plan they come from, and
returns a Plan or, if nothing can be done, NoPlan; either carries its reason. Every place in the
grid belongs to one device (its *home*), so the choice here is which slots of each replica are
active: those whose home devices have a ready worker in every pipeline stage. A slot that lost its
worker in one stage is vacated in all, and its other workers idle until it is whole again. A replica
that lost some goes on at the reduced degree (REDUCE_TP), one that got a device back grows
(GROW_TP), one that lost all is left out until a device returns (DROP_REPLICA). The global batch
stays what it was and is split anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from elastic.apportion import apportion
from elastic.messages import Quiesced
from elastic.pace import Pace
from elastic.plan import Action, NoPlan, Plan, StateSource
from elastic.session import Resume, Standing, UnrecoverableStep, decide_resume
from elastic.topology import Assignment, Coordinate, DeviceId, Member
from elastic.workload import SplitBatchBy, sample_costs, split_reason
from ntp.atoms import AtomCounts, AtomSizes, total_sizes
from ntp.geometry import ParallelLayout, ReplicaLayout, SlotRef, full_layout, with_active
from ntp.groups import places
from ntp.reshard_plan import NoHolder, ReshardPlan, plan_reshard


@dataclass(frozen=True, slots=True)
class JobShape:
    """What a plan needs to know of the job: the model in atoms, the grid, the batch, its length.

    `sizes` are those of each pipeline stage, whose number is `stages`. `least_share`: samples that
    each replica must take.
    """

    counts: AtomCounts
    sizes: tuple[AtomSizes, ...]
    tensor: int
    stages: int
    replicas: int
    global_batch_size: int
    micro_batch_size: int
    steps: int
    split_batch_by: SplitBatchBy = SplitBatchBy.DEGREE
    least_share: int = 1


def home_devices(shape: JobShape, devices: Sequence[DeviceId]) -> dict[DeviceId, Coordinate]:
    """The place of each device, over `devices` in order: replica by replica, stage by stage.

    A replica's stages, and the slots of a stage, so lie next to each other.
    """
    grid = [
        Coordinate(replica, stage, slot)
        for replica in range(shape.replicas)
        for stage in range(shape.stages)
        for slot in range(shape.tensor)
    ]
    return dict(zip(devices, grid, strict=False))


def complete_slots(shape: JobShape, workers: Mapping[Coordinate, Member]) -> tuple[SlotRef, ...]:
    """Slots that have a worker in every stage, in order; only these can be active."""
    found = Counter(coordinate.slot_ref for coordinate in workers)
    return tuple(sorted(ref for ref, count in found.items() if count == shape.stages))


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when a plan is made.

    `workers` are the ready processes by place; `answers` what those of them that were running said
    when they stopped; `history` the plans of this run by generation; `paces` how fast those
    replicas were that have been measured.
    """

    generation: int
    workers: Mapping[Coordinate, Member]
    answers: Mapping[Member, Quiesced]
    history: Mapping[int, Plan]
    rendezvous: str
    paces: Mapping[int, Pace] = field(default_factory=dict)


def plan_generation(shape: JobShape, situation: Situation) -> Plan | NoPlan:
    """The next generation, or why there can be none."""
    if not complete_slots(shape, situation.workers):
        if not situation.workers:
            return NoPlan("no worker is left")
        return NoPlan(f"no slot has a worker in each of the {shape.stages} pipeline stages")
    standings = _standings(situation)
    switched = any(standing.layout_generation for standing in standings.values())
    if not switched and _nothing_was_committed(situation):
        source, resume = None, Resume(0, None, False, 0, "the job starts")
    elif not standings:
        return NoPlan("no survivor holds any state, and no checkpoint is configured")
    else:
        try:
            resume = decide_resume(list(standings.values()))
        except UnrecoverableStep as error:
            return NoPlan(str(error))
        source = situation.history.get(resume.layout_generation)
        if source is None:
            return NoPlan(
                f"survivors hold generation {resume.layout_generation}, which has no plan"
            )
    layout = _target_layout(shape, source.layout if source else None, situation.workers)
    try:
        survivors = _survivors(source, situation.workers, standings)
        reshard = _reshard(shape, source, layout, survivors)
    except NoHolder as error:
        return NoPlan(f"{error}, and there are no checkpoints")
    placement = _placement(shape, layout, situation.workers)
    donors = _donors(layout, survivors)
    batch_split = split_batch(shape, layout, situation.paces)
    division = split_reason(shape.split_batch_by, batch_split, situation.paces)
    previous = situation.history[max(situation.history)] if situation.history else None
    action, change = _action(previous, layout, situation.workers, shape.stages)
    return Plan(
        generation=situation.generation,
        action=action,
        placement=placement,
        donors=donors,
        survivors=tuple(
            a.member for a in (*placement, *donors) if survivors.get(a.coordinate) == a.member
        ),
        stages=shape.stages,
        layout=layout,
        source_layout=source.layout if source else None,
        source_generation=resume.layout_generation if source else 0,
        kept_replicas=_kept_replicas(previous, placement, situation.answers),
        reshard=reshard,
        batch_split=batch_split,
        resume_step=resume.resume_step,
        apply_vote=resume.vote,
        redone=resume.redone,
        state_source=StateSource.PEERS if source else StateSource.INITIALIZE,
        rendezvous=situation.rendezvous,
        reason=f"{change}; {resume.reason}; {division}",
    )


def split_batch(
    shape: JobShape, layout: ParallelLayout, paces: Mapping[int, Pace]
) -> tuple[int, ...]:
    """Samples per replica of `layout`, so that all are done as early as can be."""
    costs = sample_costs(shape.split_batch_by, layout, shape.sizes, paces)
    return apportion(shape.global_batch_size, costs, shape.least_share)


def _standings(situation: Situation) -> dict[Member, Standing]:
    """What the survivors hold, without those that idled since a plan that others adopted."""
    standings = {
        member: answer.standing
        for member, answer in situation.answers.items()
        if answer.standing is not None
    }
    newest = max((standing.layout_generation for standing in standings.values()), default=0)
    if newest not in situation.history:
        return standings
    placed = {assignment.member for assignment in situation.history[newest].placement}
    return {
        member: standing
        for member, standing in standings.items()
        if member in placed or not standing.layout_generation
    }


def _nothing_was_committed(situation: Situation) -> bool:
    """Whether state may be initialised: at the start, or again after a failed start.

    A worker that was placed and did not switch to its shards never passed the barrier, without
    which nobody can have taken part in a vote.
    """
    if not situation.history:
        return True
    newest = situation.history[max(situation.history)]
    placed = {assignment.member for assignment in newest.placement}
    only_started = all(
        plan.state_source is StateSource.INITIALIZE for plan in situation.history.values()
    )
    return only_started and bool(placed & set(situation.answers))


def _target_layout(
    shape: JobShape, source: ParallelLayout | None, workers: Mapping[Coordinate, Member]
) -> ParallelLayout:
    full = full_layout(shape.counts, shape.tensor, shape.replicas)
    known = {replica.replica: replica for replica in source.replicas} if source else {}
    complete = complete_slots(shape, workers)
    replicas: list[ReplicaLayout] = []
    for replica in full.replicas:
        active = tuple(ref.slot for ref in complete if ref.replica == replica.replica)
        if active:
            replicas.append(with_active(known.get(replica.replica, replica), active))
    return ParallelLayout(shape.tensor, tuple(replicas))


def _survivors(
    source: Plan | None, workers: Mapping[Coordinate, Member], standings: Mapping[Member, Standing]
) -> dict[Coordinate, Member]:
    """Workers that hold the state which belongs to their place in the source's layout."""
    placed = {a.coordinate: a.member for a in source.placement} if source else {}
    return {
        coordinate: member
        for coordinate, member in workers.items()
        if member in standings and placed.get(coordinate) == member
    }


def _reshard(
    shape: JobShape, source: Plan | None, layout: ParallelLayout, survivors: Collection[Coordinate]
) -> tuple[ReshardPlan, ...]:
    """The moves of each stage.

    Workers send that the new layout places; if these do not hold everything, all survivors may.
    """
    if source is None:
        return (ReshardPlan(()),) * shape.stages
    active = set(layout.slots())
    sizes = total_sizes(shape.sizes)
    # Stages mostly have the same holders, and then the same moves.
    known: dict[frozenset[SlotRef], ReshardPlan] = {}
    plans: list[ReshardPlan] = []
    for stage in range(shape.stages):
        living = frozenset(place.slot_ref for place in survivors if place.stage == stage)
        placed = living & active
        if placed not in known:
            try:
                known[placed] = plan_reshard(source.layout, layout, placed, sizes)
            except NoHolder:
                plans.append(plan_reshard(source.layout, layout, living, sizes))
                continue
        plans.append(known[placed])
    return tuple(plans)


def _donors(
    layout: ParallelLayout, survivors: Mapping[Coordinate, Member]
) -> tuple[Assignment, ...]:
    """Survivors that lose their place.

    All of them, also those that need not send: what they hold may be the last copy if another
    worker is lost before everybody has switched.
    """
    active = set(layout.slots())
    return tuple(
        Assignment(place, member)
        for place, member in sorted(survivors.items())
        if place.slot_ref not in active
    )


def _placement(
    shape: JobShape, layout: ParallelLayout, workers: Mapping[Coordinate, Member]
) -> tuple[Assignment, ...]:
    return tuple(
        Assignment(coordinate, workers[coordinate]) for coordinate in places(layout, shape.stages)
    )


def _kept_replicas(
    previous: Plan | None,
    placement: Sequence[Assignment],
    answers: Mapping[Member, Quiesced],
) -> tuple[int, ...]:
    """Replicas that have the members they had, all of them saying that their groups work."""
    if previous is None:
        return ()
    before = _members_by_replica(previous.placement)
    now = _members_by_replica(placement)
    return tuple(
        replica
        for replica, members in now.items()
        if before.get(replica) == members
        and all(
            (answer := answers.get(member)) is not None and answer.replica_groups_intact
            for member in members
        )
    )


def _members_by_replica(placement: Sequence[Assignment]) -> dict[int, tuple[Member, ...]]:
    members: dict[int, tuple[Member, ...]] = {}
    for assignment in placement:
        replica = assignment.coordinate.replica
        members[replica] = (*members.get(replica, ()), assignment.member)
    return members


def _action(
    previous: Plan | None,
    layout: ParallelLayout,
    workers: Mapping[Coordinate, Member],
    stages: int,
) -> tuple[Action, str]:
    if previous is None:
        degrees = "+".join(f"TP{replica.degree}" for replica in layout.replicas)
        return Action.CONTINUE, f"all {len(workers)} workers are ready: {degrees}"
    before, now = set(previous.layout.slots()), set(layout.slots())
    lost, returned = sorted(before - now), sorted(now - before)
    parts = [f"{_name(ref)} is vacant" for ref in lost]
    parts += [f"{_name(ref)} returned" for ref in returned]
    parts += [
        f"replica {replica.replica} goes to TP{replica.degree}"
        for replica in layout.replicas
        if replica.replica in {ref.replica for ref in (*lost, *returned)}
    ]
    idle = len(workers) - len(now) * stages
    if idle:
        who = (
            "worker idles, as its slot lacks" if idle == 1 else "workers idle, as their slots lack"
        )
        parts.append(f"{idle} {who} another stage")
    kept = {replica.replica for replica in layout.replicas}
    dropped = sorted({ref.replica for ref in lost} - kept)
    parts += [f"replica {replica} has no slot left and is dropped" for replica in dropped]
    if dropped:
        action = Action.DROP_REPLICA
    elif lost:
        action = Action.REDUCE_TP
    elif returned:
        action = Action.GROW_TP
    else:
        action = Action.CONTINUE
        replaced = {a.member for a in previous.placement} - set(workers.values())
        parts = [f"{len(replaced)} workers replaced in place" if replaced else "nobody was lost"]
    return action, ", ".join(parts)


def _name(ref: SlotRef) -> str:
    return f"replica {ref.replica} slot {ref.slot}"
