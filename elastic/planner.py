"""What to do about the workers that are there: the next generation's plan.

Pure. The planner is given who is ready, what the survivors hold, and the plans of the run so far,
and returns a Plan or, if nothing can be done, NoPlan; either carries its reason. In order:

1. what state there is: nobody's yet, that which survivors hold (`elastic.held_state`), or a
   checkpoint's;
2. at which degree each replica runs and who sits where (`elastic.candidates`,
   `elastic.placement`): vacancies are filled by returned devices and spares, replicas that cannot
   be filled go on reduced (REDUCE_TP) or are left out (DROP_REPLICA) until devices are back;
3. the layout that follows, and what moves from whom to whom (`ntp.reshard_plan`);
4. the split of the global batch, which stays what it was, and what replicas keep of the step that
   was interrupted (`elastic.kept_gradients`).

A slot that lacks a worker in one pipeline stage is vacated in all; its other workers are free for
other places. What is the same as in the source's plan is taken over as it is, so the work
of a plan is mostly that of what changed.

Devices that are to be avoided (`elastic.situation`) are used if there is no plan without them, and
the reason says so.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from operator import itemgetter

from elastic.answers import Answers
from elastic.apportion import apportion
from elastic.candidates import Choice, choose
from elastic.held_state import State, find_state, free_workers, other_states
from elastic.job_shape import JobShape as JobShape
from elastic.job_shape import PlacementRules as PlacementRules
from elastic.job_shape import home_devices as home_devices
from elastic.kept_gradients import kept_gradients
from elastic.missing_state import missing_state
from elastic.moves import aside, plan_moves
from elastic.pace import Pace
from elastic.placement import Row, Seating, roster_at_home, roster_of_survivors
from elastic.plan import Action, NoPlan, Plan, StateSource
from elastic.plan_reason import change, few, first_change
from elastic.salvage import Salvage, salvage
from elastic.session import Resume
from elastic.situation import Situation as Situation
from elastic.throughput import planned_throughput, relative_paces
from elastic.topology import Assignment, DeviceId, Member
from elastic.workload import sample_costs, split_reason
from ntp.geometry import ParallelLayout, ReplicaLayout, full_layout, with_active
from ntp.reshard_plan import NoHolder, ReshardPlan


def plan_generation(shape: JobShape, situation: Situation) -> Plan | NoPlan:
    """The next generation, or why there can be none."""
    wanted = _plan_with(shape, situation)
    if isinstance(wanted, Plan):
        if _has_one_copy(shape, wanted) and situation.quarantined:
            plan = _plan_with(shape, situation.without_quarantine())
            if isinstance(plan, Plan) and not _has_one_copy(shape, plan):
                return _excused(plan, situation, "there is a single copy of the state")
        return wanted
    for second_best in situation.less_avoided():
        plan = _plan_with(shape, second_best)
        if isinstance(plan, Plan):
            return _excused(plan, situation, wanted.reason)
    return wanted


def _has_one_copy(shape: JobShape, plan: Plan) -> bool:
    """Whether the state is held once, in a job that could hold it more often."""
    return len(plan.layout.replicas) == 1 < shape.replicas


def _excused(plan: Plan, situation: Situation, otherwise: str) -> Plan:
    placed = {member.device for _, member in plan.placement}
    names = ", ".join(few(map(str, sorted(placed & situation.avoided))))
    why = f"devices to be avoided take part ({names}), as otherwise {otherwise}"
    return replace(plan, reason=f"{plan.reason}; {why}")


def _plan_with(shape: JobShape, situation: Situation) -> Plan | NoPlan:
    """The next generation without the devices that are to be avoided, or why there is none."""
    workers = situation.admitted
    if not workers:
        return NoPlan("no worker is left")
    state = find_state(situation)
    if isinstance(state, State):
        for held in chain((state,), other_states(situation, state)):
            with suppress(NoHolder):
                return _plan(shape, situation, workers, held)
        state = NoPlan(f"nobody alive holds {_missing(state)}")
    if situation.checkpoint is None:
        return NoPlan(f"{state.reason}, and there are no checkpoints")
    step = situation.checkpoint
    reason = f"{state.reason}; step {step} is restored from its checkpoint"
    restored = State(StateSource.CHECKPOINT, Resume(step + 1, None, False, 0, reason))
    return _plan(shape, situation, workers, restored)


def _missing(state: State) -> str:
    assert state.source is not None
    held = dict(state.source.placement).keys() - dict(state.lost).keys()
    return missing_state(state.source, held)


def newcomers(shape: JobShape, situation: Situation, present: Plan) -> tuple[Member, ...]:
    """The idle workers that a plan made now would place; none if it is better to go on as is.

    `present` is the plan that runs. Nothing is asked of `situation` but workers, homes, paces and
    what is to be avoided.
    """
    if sum(replica.degree for replica in present.layout.replicas) == shape.tensor * shape.replicas:
        return ()
    if _has_one_copy(shape, present) and situation.quarantined:
        rows, found = _seated_newcomers(shape, situation.without_quarantine(), present)
        if rows > 1:
            return found
    return _seated_newcomers(shape, situation, present)[1]


def _seated_newcomers(
    shape: JobShape, situation: Situation, present: Plan
) -> tuple[int, tuple[Member, ...]]:
    """How many replicas a plan made now would have, and the idle workers that it would place."""
    idle = _idle(situation, present)
    choice = _choose_now(shape, situation, present, idle, ()) if idle else NoPlan("nobody idles")
    if isinstance(choice, NoPlan):
        return 0, ()
    rows = choice.seating.rows
    seated = {member for row in rows.values() for _, member in row}
    return len(rows), tuple(sorted(seated.intersection(idle)))


def still_needed(shape: JobShape, situation: Situation, present: Plan) -> str | None:
    """Why a plan made now could not do without the leaving devices, which `present` makes use of;
    None if it could.

    Asks the same of `situation` as `newcomers`.
    """
    left = [each for each in present.placement if each.member.device in situation.leaving]
    choice = _choose_now(shape, situation, present, _idle(situation, present), left)
    return choice.reason if isinstance(choice, NoPlan) else None


def _idle(situation: Situation, present: Plan) -> list[Member]:
    placed = set(map(itemgetter(1), present.placement))
    return [member for member in situation.admitted.values() if member not in placed]


def _choose_now(
    shape: JobShape,
    situation: Situation,
    present: Plan,
    idle: Sequence[Member],
    left: Sequence[Assignment],
) -> Choice | NoPlan:
    """The placement if the workers of `present` stop now, but those in `left` are not to stay."""
    roster = roster_of_survivors(shape, present.rows(), left, idle, situation.homes)
    return choose(shape, roster, situation.homes, relative_paces(shape, situation.paces))


def _plan(
    shape: JobShape, situation: Situation, workers: Mapping[DeviceId, Member], state: State
) -> Plan | NoPlan:
    """The plan on this state. Raises NoHolder if the survivors do not hold all of it."""
    source, homes, previous = state.source, situation.homes, situation.previous
    paces = relative_paces(shape, situation.paces)
    old_rows: Mapping[int, Row] = source.rows() if source else {}
    if source is None:
        roster = roster_at_home(shape, workers, homes)
    else:
        free = free_workers(workers, situation, state)
        roster = roster_of_survivors(shape, old_rows, state.lost + state.leaving, free, homes)
    choice = choose(shape, roster, homes, paces)
    if isinstance(choice, NoPlan):
        return choice
    layout = _layout(shape, source.layout if source else None, choice.seating)
    rows = {replica.replica: choice.seating.rows[replica.replica] for replica in layout.replicas}
    placement = tuple(chain.from_iterable(rows.values()))
    came, donors, movers = _changes(old_rows, rows, state.lost + state.leaving)
    moves = (ReshardPlan(()),) * shape.stages
    if source is not None:
        moves = plan_moves(shape, source.layout, layout, state.lost, state.leaving, movers)
    batch_split = split_batch(shape, layout, situation.paces)
    before = old_rows if previous is source else previous.rows() if previous else {}
    if previous is None:
        action, words = Action.CONTINUE, first_change(layout, len(workers))
    else:
        idle = len(workers) - len(placement)
        action, words = change(before, rows, movers, homes, shape.stages, idle)
    if state.kind is StateSource.CHECKPOINT:
        action = Action.RESTORE
    division = split_reason(shape.split_batch_by, batch_split, situation.paces)
    kept = _salvage(shape, situation, state, layout, rows)
    resumption = state.resume.reason
    if kept is not None:
        resumption += f", {kept.kept_samples} of its {shape.global_batch_size} samples are kept"
    return Plan(
        generation=situation.generation,
        action=action,
        placement=placement,
        donors=donors + tuple(aside(shape, each) for each in state.leaving),
        movers=movers,
        newcomers=came if source else (),
        stages=shape.stages,
        layout=layout,
        source_layout=source.layout if source else None,
        source_generation=source.generation if source else 0,
        kept_replicas=_kept_replicas(old_rows, before, rows, situation.answers),
        reshard=moves,
        batch_split=batch_split,
        resume_step=state.resume.resume_step,
        apply_vote=state.resume.vote,
        redone=state.resume.redone,
        state_source=state.kind,
        rendezvous=situation.rendezvous,
        throughput=planned_throughput(shape, layout, batch_split, paces),
        alternatives=choice.alternatives,
        reason=f"{words}; {resumption}; {division}",
        salvage=kept,
        unbroken=_is_unbroken(situation, state),
    )


def split_batch(
    shape: JobShape, layout: ParallelLayout, paces: Mapping[int, Pace]
) -> tuple[int, ...]:
    """Samples per replica of `layout`, so that all are done as early as can be."""
    costs = sample_costs(shape.split_batch_by, layout, shape.sizes, paces)
    return apportion(shape.global_batch_size, costs, shape.least_share)


def _salvage(
    shape: JobShape,
    situation: Situation,
    state: State,
    layout: ParallelLayout,
    rows: Mapping[int, Row],
) -> Salvage | None:
    """What is kept of the step in flight, and the split of the rest of it."""
    if state.source is None:
        return None
    answers, history = situation.answers, situation.history
    kept = kept_gradients(state.resume.resume_step, state.source, layout, rows, answers, history)
    costs = sample_costs(shape.split_batch_by, layout, shape.sizes, situation.paces) if kept else ()
    return salvage(kept, shape.global_batch_size, costs, shape.least_share)


def _layout(shape: JobShape, source: ParallelLayout | None, seating: Seating) -> ParallelLayout:
    """The layout of those who are seated, moving as little as can be of the source's."""
    known = {replica.replica: replica for replica in source.replicas} if source else {}
    template: Mapping[int, ReplicaLayout] = {}
    if not seating.rows.keys() <= known.keys():
        full = full_layout(shape.counts, shape.tensor, shape.replicas)
        template = {replica.replica: replica for replica in full.replicas}
    return ParallelLayout(
        shape.tensor,
        tuple(
            with_active(layout, seating.active.get(number, layout.active))
            for number in sorted(seating.rows)
            if (layout := known.get(number) or template[number])
        ),
    )


def _changes(
    before: Mapping[int, Row], after: Mapping[int, Row], lost: Sequence[Assignment]
) -> tuple[tuple[Member, ...], tuple[Assignment, ...], tuple[Assignment, ...]]:
    """Who is new; and which survivors lose their place, named with it: donors, and movers, who get
    another.

    All of them, also those that need not send: what they hold may be the last copy if another
    worker is lost before everybody has switched.
    """
    # A worker that lost what it held may be seated where it was.
    wounded = {place.replica for place, _ in lost}
    changed = [
        number
        for number in {*before, *after}
        if before.get(number) != after.get(number) or number in wounded
    ]
    old = {each for number in changed for each in before.get(number, ())}.difference(lost)
    new = {each for number in changed for each in after.get(number, ())}
    left = sorted(old - new)
    placed = {member for _, member in new}
    holding = {member for _, member in old}
    return (
        tuple(member for _, member in sorted(new) if member not in holding),
        tuple(each for each in left if each.member not in placed),
        tuple(each for each in left if each.member in placed),
    )


def _is_unbroken(situation: Situation, state: State) -> bool:
    """Whether all workers of the plan before stopped between two steps, with all of their groups.

    An urgent announcement severs groups before it is answered, so nobody says so after one.
    """
    resume = state.resume
    return (
        state.source is not None
        and state.source is situation.previous
        and not state.lost
        and not resume.redone
        and resume.vote is None
        and all(each[0].unbroken for each in situation.answers.alike)
    )


def _kept_replicas(
    source: Mapping[int, Row],
    before: Mapping[int, Row],
    after: Mapping[int, Row],
    answers: Answers,
) -> tuple[int, ...]:
    """Replicas that have the members they had, all of them saying that their groups work.

    They must have had them in the source's plan too: whoever is new there since then may speak of
    other groups.
    """
    broken = {
        answer.member
        for group in answers.alike
        if not group[0].replica_groups_intact
        for answer in group
    }
    return tuple(
        replica
        for replica, row in after.items()
        if row == before.get(replica) == source.get(replica)
        and (not broken or broken.isdisjoint(map(itemgetter(1), row)))
    )
