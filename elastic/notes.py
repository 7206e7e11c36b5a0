"""The entries of the journal that the summary is made from: a failure, a fault, and a plan.

Pure. Programs outside read these fields, so they are written in one place.

A leader writes to the store first and to the journal next. Its successor tells again what may lie
between the two; `entry_id` shows which of that the journal has.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from elastic.answers import Answers
from elastic.effects import Note, Phase
from elastic.messages import ComponentFault, Failed, FaultFired, NodeProgress, Quiesce
from elastic.plan import Plan, changed_rows
from elastic.plan_reason import few
from elastic.recorded import Recorded
from elastic.session import Standing
from ntp.atoms import AtomSizes

EntryId: TypeAlias = tuple[Any, ...]
"""The name of an event, and those of its fields that tell it from others of the name."""

_TOLD_ONCE: Mapping[str, tuple[str, ...]] = {
    "failure": ("id",),
    # A fault of a node strikes each of its workers.
    "fault_injected": ("fault", "member", "component"),
    "quiesce": ("generation",),
    "plan": ("generation",),
    "groups_not_kept": ("generation",),
    "phase_done": ("generation", "phase"),
    "running": ("generation",),
    "resumed": ("generation",),
    "replicas_differ": ("step",),
    "non_finite": ("step",),
    "drained": ("node", "life"),
}


def entry_id(event: str, fields: Mapping[str, Any]) -> EntryId | None:
    """What identifies an entry that a journal has once; None if there may be more like it."""
    names = _TOLD_ONCE.get(event)
    return None if names is None else (event, *map(fields.get, names))


def failure_note(
    event: Failed, *, phase: Phase, step_in_flight: int, placed: bool, generation: int
) -> Note:
    """A failure, met in `phase`; `generation` is that of the newest plan (0: none yet)."""
    failure = event.failure
    return Note(
        "failure",
        {
            "id": failure.id,
            "kind": failure.kind,
            "severity": failure.severity,
            "device": str(failure.device),
            "member": str(event.member),
            "evidence": failure.evidence,
            "detected_at": failure.at,
            "fault": event.fault,
            "fault_at": event.fault_at,
            "fault_phase": event.fault_phase,
            "phase": phase,
            "at_step": step_in_flight if event.fault_step is None else event.fault_step,
            "placed": placed,
            "generation": generation,
        },
    )


def fault_note(fired: FaultFired) -> Note:
    """An injected fault struck."""
    return Note(
        "fault_injected",
        {
            "fault": fired.fault,
            "member": str(fired.member),
            "step": fired.step,
            "phase": fired.phase,
            "fired_at": fired.at,
        },
    )


def component_fault_note(fault: ComponentFault) -> Note:
    """An injected fault struck a part of the runtime."""
    return Note(
        "fault_injected",
        {
            "fault": fault.fault,
            "component": fault.component,
            "step": fault.step,
            "fired_at": fault.at,
        },
    )


def fault_notes(event: object) -> list[Note]:
    """The injected faults that `event`, of whatever kind, tells of."""
    match event:
        case ComponentFault():
            return [component_fault_note(event)]
        case NodeProgress():
            return [fault_note(note) for note in event.notes if isinstance(note, FaultFired)]
        case _:
            return []


def quiesce_note(quiesce: Quiesce, awaited: int) -> Note:
    """An announcement, and how many workers are to answer it."""
    return Note(
        "quiesce",
        {
            "generation": quiesce.generation,
            "urgent": quiesce.urgent,
            "lost": [str(member) for member in quiesce.lost],
            "awaited": awaited,
            "reason": quiesce.reason,
        },
    )


def drained_note(node: int, life: int) -> Note:
    """An agent may leave."""
    return Note("drained", {"node": node, "life": life})


def plan_notes(
    plan: Plan,
    before: Plan | None,
    sizes: Sequence[AtomSizes],
    answers: Answers,
    lost_steps: int,
) -> list[Note]:
    """A plan; when the last worker had stopped for it, if any had to; and why healthy replicas do
    not keep their groups, if some do not."""
    notes = [plan_note(plan, before, sizes, lost_steps)]
    if answers.last_at:
        fields = {"generation": plan.generation, "phase": "quiesce", "done_at": answers.last_at}
        notes.insert(0, Note("phase_done", fields))
    if before is not None and (workers := list(few(_without_groups(plan, before, answers)))):
        notes.append(Note("groups_not_kept", {"generation": plan.generation, "workers": workers}))
    return notes


def newest_plan_notes(recorded: Recorded, sizes: Sequence[AtomSizes]) -> list[Note]:
    """The newest plan that is recorded, with those who stopped for it."""
    *earlier, plan = recorded.plans.values()
    answers = [answer for report in recorded.reports for answer in report.workers]
    steps = [each.standing.committed for each in answers if each.standing is not None]
    before_it = (s for s in recorded.statuses.values() if s.generation < plan.generation)
    steps += [status.committed for status in before_it]
    return plan_notes(
        plan,
        earlier[-1] if earlier else None,
        sizes,
        answers=Answers(answers),
        lost_steps=max(0, max(steps, default=-1) + 1 - plan.resume_step),
    )


def plan_note(plan: Plan, before: Plan | None, sizes: Sequence[AtomSizes], lost_steps: int) -> Note:
    """A plan, and how many committed steps it could not keep; `sizes` are those of each stage.

    `kept_samples` are those of the step in flight whose gradients go on; `redone_samples` are the
    others of a step on which work had begun. Slots are told where they are not as in the plan
    `before`; those that are vacant now have no member.
    """
    kept = plan.salvage.kept_samples if plan.salvage else 0
    return Note(
        "plan",
        {
            "generation": plan.generation,
            "action": plan.action,
            "reason": plan.reason,
            "resume_step": plan.resume_step,
            "applies_vote": plan.apply_vote is not None,
            "redone": plan.redone,
            "kept_samples": kept,
            "redone_samples": sum(plan.batch_split) - kept if plan.redone else 0,
            "lost_steps": lost_steps,
            "degrees": plan.degrees(),
            "batch_split": plan.batch_split,
            "kept_replicas": plan.kept_replicas,
            "moves": sum(len(stage.moves) for stage in plan.reshard),
            "moved_elements": sum(
                stage.elements(size) for stage, size in zip(plan.reshard, sizes, strict=True)
            ),
            "slots": _changed_slots(plan, before),
            "throughput": round(plan.throughput, 4),
            "alternatives": [
                {
                    "action": each.action.value,
                    "throughput": round(each.throughput, 4),
                    "why_not": each.why_not,
                }
                for each in plan.alternatives
            ],
            "digest": plan.digest,
        },
    )


def _without_groups(plan: Plan, before: Plan, answers: Answers) -> Iterator[str]:
    """Workers whose groups were not whole, in replicas that have all of their workers, and what
    they were in the middle of: one of each kind."""
    kinds = [alike for alike in answers.alike if not alike[0].replica_groups_intact]
    if not kinds:
        return
    old, kept = before.rows(), set(plan.kept_replicas)
    rebuilt = {n for n, row in plan.rows().items() if n not in kept and old.get(n) == row}
    for alike in kinds:
        for each in alike:
            if each.standing is not None and each.standing.slot.replica in rebuilt:
                yield f"{each.member} {_where(each.standing)}"
                break


def _where(standing: Standing) -> str:
    """What a worker was in the middle of when it stopped."""
    if standing.pending_generation:
        return f"in the barrier of generation {standing.pending_generation}"
    if standing.prepared > standing.committed:
        voted = "after" if standing.voted == standing.prepared else "in"
        return f"{voted} the vote of step {standing.prepared}"
    if standing.begun > standing.committed:
        return f"before the vote of step {standing.begun}"
    return f"before step {standing.committed + 1}"


def _changed_slots(plan: Plan, before: Plan | None) -> dict[str, str | None]:
    now, then = plan.rows(), before.rows() if before else {}
    changed = changed_rows(before, plan) if before else now
    slots: dict[str, str | None] = {}
    for replica in changed:
        slots |= {str(place): None for place, _ in then.get(replica, ())}
        slots |= {str(place): str(member) for place, member in now.get(replica, ())}
    return slots
