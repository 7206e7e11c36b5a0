"""What to do about the workers that are there: the next generation's plan.

Pure. The planner is given who is alive, what the survivors hold, and the plan they come from, and
returns a Plan or, if nothing can be done, NoPlan; either carries its reason. Every place in the
grid belongs to one device (its *home*), so the choice here is which slots of each replica are
active: those whose home device has a ready worker. A replica that lost some goes on at the reduced
degree (REDUCE_TP), one that got a device back grows (GROW_TP), one that lost all is left out until
a device returns (DROP_REPLICA). The global batch stays what it was and is split anew.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from elastic.messages import Quiesced
from elastic.plan import Action, NoPlan, Plan, StateSource
from elastic.session import Resume, Standing, UnrecoverableStep, decide_resume
from elastic.topology import Assignment, Coordinate, DeviceId, Member
from ntp.atoms import AtomCounts, AtomSizes
from ntp.geometry import ParallelLayout, ReplicaLayout, SlotRef, full_layout, with_active
from ntp.groups import plan_groups
from ntp.reshard_plan import NoHolder, ReshardPlan, plan_reshard


@dataclass(frozen=True, slots=True)
class JobShape:
    """What a plan needs to know of the job: the model in atoms, the grid, the batch, its length."""

    counts: AtomCounts
    sizes: AtomSizes
    tensor: int
    replicas: int
    global_batch_size: int
    micro_batch_size: int
    steps: int


def home_devices(shape: JobShape, devices: Sequence[DeviceId]) -> dict[DeviceId, Coordinate]:
    """The place of each device: replica by replica, slot by slot, over `devices` in order."""
    places = [
        Coordinate(replica, 0, slot)
        for replica in range(shape.replicas)
        for slot in range(shape.tensor)
    ]
    return dict(zip(devices, places, strict=False))


@dataclass(frozen=True, slots=True)
class Situation:
    """What is known when a plan is made.

    `workers` are the ready processes by place; `answers` what those of them that were running said
    when they stopped; `history` the plans of this run by generation.
    """

    generation: int
    workers: Mapping[Coordinate, Member]
    answers: Mapping[Member, Quiesced]
    history: Mapping[int, Plan]
    rendezvous: str


def plan_generation(shape: JobShape, situation: Situation) -> Plan | NoPlan:
    """The next generation, or why there can be none."""
    if not situation.workers:
        return NoPlan("no worker is left")
    standings = {
        member: answer.standing
        for member, answer in situation.answers.items()
        if answer.standing is not None
    }
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
        reshard = _reshard(shape, source, layout, situation.workers, standings)
    except NoHolder as error:
        return NoPlan(f"{error}: nobody holds this state any more, and no checkpoint is configured")
    batch_split = split_batch(shape, layout)
    previous = situation.history[max(situation.history)] if situation.history else None
    action, change = _action(previous, layout, situation.workers)
    return Plan(
        generation=situation.generation,
        action=action,
        placement=_placement(layout, situation.workers),
        layout=layout,
        source_layout=source.layout if source else None,
        source_generation=resume.layout_generation if source else 0,
        groups=plan_groups(layout),
        kept_tensor_groups=_kept_groups(previous, layout, situation),
        reshard=reshard,
        batch_split=batch_split,
        resume_step=resume.resume_step,
        apply_vote=resume.vote,
        redone=resume.redone,
        state_source=StateSource.PEERS if source else StateSource.INITIALIZE,
        rendezvous=situation.rendezvous,
        reason=f"{change}; {resume.reason}",
    )


def split_batch(shape: JobShape, layout: ParallelLayout) -> tuple[int, ...]:
    """Samples per replica of `layout`: whole microbatches, as even as they divide."""
    micro_batches = shape.global_batch_size // shape.micro_batch_size
    count = len(layout.replicas)
    return tuple(
        shape.micro_batch_size * (micro_batches // count + (index < micro_batches % count))
        for index in range(count)
    )


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
    replicas: list[ReplicaLayout] = []
    for replica in full.replicas:
        active = tuple(sorted(c.slot for c in workers if c.replica == replica.replica))
        if active:
            replicas.append(with_active(known.get(replica.replica, replica), active))
    return ParallelLayout(shape.tensor, tuple(replicas))


def _reshard(
    shape: JobShape,
    source: Plan | None,
    layout: ParallelLayout,
    workers: Mapping[Coordinate, Member],
    standings: Mapping[Member, Standing],
) -> ReshardPlan:
    if source is None:
        return ReshardPlan(())
    placed = {a.coordinate: a.member for a in source.placement}
    holders = frozenset(
        coordinate.slot_ref
        for coordinate, member in workers.items()
        if member in standings and placed.get(coordinate) == member
    )
    return plan_reshard(source.layout, layout, holders, shape.sizes)


def _placement(
    layout: ParallelLayout, workers: Mapping[Coordinate, Member]
) -> tuple[Assignment, ...]:
    by_slot = {coordinate.slot_ref: coordinate for coordinate in workers}
    return tuple(Assignment(by_slot[ref], workers[by_slot[ref]]) for ref in layout.slots())


def _kept_groups(
    previous: Plan | None, layout: ParallelLayout, situation: Situation
) -> tuple[int, ...]:
    """Replicas whose tensor-parallel group has the members it had, all of them saying it works."""
    if previous is None:
        return ()
    before = _members_by_replica(previous.placement)
    now = _members_by_replica(_placement(layout, situation.workers))
    return tuple(
        replica
        for replica, members in now.items()
        if before.get(replica) == members
        and all(
            (answer := situation.answers.get(member)) is not None and answer.tensor_group_intact
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
    previous: Plan | None, layout: ParallelLayout, workers: Mapping[Coordinate, Member]
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
    kept = {replica.replica for replica in layout.replicas}
    dropped = sorted({ref.replica for ref in lost} - kept)
    parts += [f"replica {replica} has no device left and is dropped" for replica in dropped]
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
