"""What the store says of a job, for a controller that begins in the middle of it.

Pure. Whatever a controller decides is in the store before anybody acts on it, and agents keep there
what a successor must know of them. So the job's keys, read at one revision, are all that a standby
needs in order to go on where the leader stopped, in whatever phase that was. What they do not say
is only bookkeeping: measured speeds, and how often recovery failed in a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from elastic.messages import (
    Adopt,
    AgentRecord,
    ComponentFault,
    Failed,
    Leave,
    NodeAlive,
    NodeProgress,
    NodeReport,
    PlanChange,
    Quiesce,
    Stop,
    StopWish,
    StoreMessage,
    WholePlan,
    WorkerStatus,
)
from elastic.plan import Plan
from elastic.plan_chain import generation_of, rebuilt
from elastic.topology import Member
from health.liveness import Stalled


@dataclass(frozen=True, slots=True)
class Recorded:
    """A job as its keys tell it.

    `announced` is the newest announcement, if no plan answered it yet; `reports` the answers to the
    newest one, also if a plan did, and `heard` the nodes whose agents said that they heard it.
    `outdated` are the plans older than the last one that was written whole, which nobody needs.
    `nodes` are the agents that live, but those that were told that they may leave, which are
    `dismissed`, by node and life. `failures` are all that were reported, oldest first, and
    `component_faults` those that were injected into the runtime itself. `committed` is the last
    step that each worker is known to have committed. `stalls` is what each node says of itself.
    `wish`: somebody wants the job to end.
    """

    plans: Mapping[int, Plan]
    outdated: tuple[int, ...]
    announced: Quiesce | None
    reports: tuple[NodeReport, ...]
    heard: frozenset[int]
    nodes: tuple[AgentRecord, ...]
    dismissed: frozenset[tuple[int, int]]
    statuses: Mapping[Member, WorkerStatus]
    committed: Mapping[Member, int]
    stalls: Mapping[int, Stalled | None]
    failures: tuple[Failed, ...]
    component_faults: tuple[ComponentFault, ...]
    stop: Stop | None
    wish: StopWish | None

    @property
    def generation(self) -> int:
        """The newest generation that was announced or planned; 0 if the job has not begun."""
        planned = max(self.plans, default=0)
        return self.announced.generation if self.announced is not None else planned


NOTHING_RECORDED = Recorded(
    {}, (), None, (), frozenset(), (), frozenset(), {}, {}, {}, (), (), None, None
)
"""A job that has not begun."""


def read_messages(messages: Iterable[StoreMessage]) -> Recorded:
    """The values of a job's keys, in any order, as one value.

    Raises ValueError if the plans do not go together.
    """
    published: list[Adopt | PlanChange] = []
    whole: WholePlan | None = None
    quiesces: list[Quiesce] = []
    reports: list[NodeReport] = []
    alive: list[NodeAlive] = []
    nodes: list[AgentRecord] = []
    dismissed: set[tuple[int, int]] = set()
    statuses: dict[Member, WorkerStatus] = {}
    stalls: dict[int, Stalled | None] = {}
    failures: list[Failed] = []
    component_faults: list[ComponentFault] = []
    stop: Stop | None = None
    wish: StopWish | None = None
    for message in messages:
        match message:
            case Adopt() | PlanChange():
                published.append(message)
            case WholePlan():
                whole = message
            case Quiesce():
                quiesces.append(message)
            case NodeReport():
                reports.append(message)
            case NodeAlive():
                alive.append(message)
            case AgentRecord():
                nodes.append(message)
            case Leave(node, life):
                dismissed.add((node, life))
            case NodeProgress():
                statuses |= {status.member: status for status in message.statuses}
                stalls[message.node] = message.stall
            case Failed():
                failures.append(message)
            case ComponentFault():
                component_faults.append(message)
            case Stop():
                stop = message
            case StopWish():
                wish = message
            case _:
                # Orders to agents: whoever they concern has seen them.
                continue
    plans = rebuilt(whole, published)
    newest = max(quiesces, key=lambda quiesce: quiesce.generation, default=None)
    if newest is not None and newest.generation <= max(plans, default=0):
        newest = None
    asked = newest.generation if newest is not None else max(plans, default=0)
    oldest = whole.plan.generation if whole is not None else 0
    return Recorded(
        plans={number: plan for number, plan in plans.items() if number >= oldest},
        outdated=tuple(sorted(n for n in map(generation_of, published) if n < oldest)),
        announced=newest,
        reports=tuple(report for report in reports if report.generation == asked),
        heard=frozenset(each.node for each in alive if each.generation == asked),
        nodes=tuple(
            record
            for record in sorted(nodes, key=lambda record: record.node)
            if (record.node, record.life) not in dismissed
        ),
        dismissed=frozenset(dismissed),
        statuses=statuses,
        committed=_committed(statuses, reports),
        stalls=stalls,
        failures=tuple(sorted(failures, key=lambda failed: failed.failure.at)),
        component_faults=tuple(sorted(component_faults, key=lambda fault: fault.at)),
        stop=stop,
        wish=wish,
    )


def _committed(
    statuses: Mapping[Member, WorkerStatus], reports: Iterable[NodeReport]
) -> dict[Member, int]:
    steps = [(member, status.committed) for member, status in statuses.items()]
    steps += [
        (answer.member, answer.standing.committed)
        for report in reports
        for answer in report.workers
        if answer.standing is not None
    ]
    newest: dict[Member, int] = {}
    for member, step in steps:
        newest[member] = max(step, newest.get(member, -1))
    return newest
