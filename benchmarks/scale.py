"""What coordination costs as the cluster grows: one failure, and a second without any.

    python -m benchmarks.scale

Theory of operation. No process is started and no store either: the real controller and planner take
the messages that the agents of so many nodes would write, through the encoding of the store, and
what they write themselves is encoded too. Seconds are CPU seconds of the leader. Bytes are those of
values; etcd adds their keys. Each failure takes one device of another replica, in a job that has
lost the earlier ones; medians are shown, and in brackets the ratio to the smallest cluster.

Without a failure the nodes report the steps that their workers committed, at the step time given,
and renew their leases; health's defaults say how often.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple, TypeVar

import msgspec
from rich.console import Console
from rich.table import Table

from benchmarks.common import progress, run_main
from benchmarks.uneven import SHAPE
from elastic.controller import Controller
from elastic.effects import Effect, Event, Limits, Note, Send
from elastic.health_config import HealthConfig
from elastic.job_shape import JobShape, cluster_devices
from elastic.keys import decode, encode, key_of
from elastic.messages import (
    Adopt,
    AgentRecord,
    Failed,
    NodeProgress,
    NodeReport,
    PhaseDone,
    PlanChange,
    Quiesced,
    RecoveryPhase,
    StepDone,
    StoreMessage,
)
from elastic.plan import Plan
from elastic.serve import collect_rarely
from elastic.session import Session, standing
from elastic.step_log import StepLog
from elastic.topology import Assignment, DeviceId, Member
from elastic.worker_status import Word, fresh_status, summed_up
from health.classify import ProcessExited, classify
from ntp.atoms import atom_elements_by_axis
from ntp.model_shape import atom_counts, tensor_specs

DEVICES_PER_NODE = 8
STAGES = 4
NODES = (100, 1_000, 10_000)
FAILURES = 3
TARGET_SECONDS = 0.100
RENEWALS = 3
"""A lease is renewed so often in its time to live."""
Result = TypeVar("Result")


class Failure(NamedTuple):
    """What one failure cost: CPU seconds, and bytes.

    `planned` is from the last report to the plan, as the store gets it, and what is noted of it;
    `answered` all that the leader does, from the failure on.
    """

    planned: float
    answered: float
    led: int
    change: int
    whole: int
    reported: int


class Calm(NamedTuple):
    """What goes on without a failure: writes, bytes and renewals a second; the leader's CPU."""

    writes: float
    bytes: float
    renewals: float
    busy: float


@dataclass(slots=True)
class Job:
    """A job on `nodes` nodes as its leader sees it, at step `step`. `written` counts bytes."""

    shape: JobShape
    devices: tuple[DeviceId, ...]
    controller: Controller
    incarnations: dict[DeviceId, int]
    step: int = 0
    written: int = 0

    @property
    def plan(self) -> Plan:
        """The newest plan."""
        assert self.controller.plan is not None
        return self.controller.plan

    def tell(self, message: Event) -> list[Effect]:
        """The leader is told by way of the store."""
        assert isinstance(message, StoreMessage)
        value = encode(message)
        self.written += len(value)
        told = decode("job", key_of("job", message), value)
        return self.controller.handle(told, time.time())  # type: ignore[arg-type]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--step-seconds", type=float, default=10.0)
    options = parser.parse_args()
    collect_rarely()
    failures: list[Failure] = []
    calms: list[Calm] = []
    for nodes in options.nodes:
        progress(f"{nodes} nodes: the job starts")
        job = _start(nodes)
        progress(f"{nodes} nodes: {FAILURES} failures")
        costs = [_fail(job, number) for number in range(FAILURES)]
        failures.append(Failure(*map(median, zip(*costs, strict=True))))
        calms.append(_go_on(job, options.step_seconds))
    console = Console()
    console.print(_failure_table(options.nodes, failures))
    console.print(_calm_table(options.nodes, calms, options.step_seconds))
    met = "met" if failures[-1].planned <= TARGET_SECONDS else "missed"
    console.print(f"plan within {TARGET_SECONDS * 1000:.0f} ms at {options.nodes[-1]} nodes: {met}")


def _start(nodes: int) -> Job:
    """All agents register, and the first generation runs."""
    replicas = nodes // STAGES
    shape = JobShape(
        counts=atom_counts(SHAPE),
        sizes=(atom_elements_by_axis(tensor_specs(SHAPE)),) * STAGES,
        tensor=DEVICES_PER_NODE,
        stages=STAGES,
        replicas=replicas,
        global_batch_size=4 * replicas,
        micro_batch_size=1,
        steps=1_000_000,
    )
    devices = cluster_devices(nodes, DEVICES_PER_NODE)
    health = HealthConfig()
    limits = Limits(
        spawn_timeout_seconds=health.spawn_timeout_seconds,
        quiesce_timeout_seconds=health.quiesce_timeout_seconds,
        pause_timeout_seconds=health.quiesce_timeout_seconds,
        corroboration_seconds=health.corroboration_seconds,
        agent_timeout_seconds=health.agent_timeout_seconds,
        max_recoveries=health.max_recoveries,
        max_fruitless_recoveries=health.max_fruitless_recoveries,
        quarantine=health.quarantine,
    )
    controller = Controller(shape, devices, limits, time.time())
    job = Job(shape, devices, controller, dict.fromkeys(devices, 1))
    controller.begin(frozenset(), time.time())
    for node in range(nodes):
        job.tell(_record(job, node))
    _resume(job)
    return job


def _record(job: Job, node: int) -> AgentRecord:
    first = node * DEVICES_PER_NODE
    devices = job.devices[first : first + DEVICES_PER_NODE]
    ready = tuple(Member(d, job.incarnations[d]) for d in devices if job.incarnations[d])
    return AgentRecord(node, 1, devices, ready, f"host{node}.cluster:29500")


def _by_node(places: Iterable[Assignment]) -> dict[int, list[Assignment]]:
    found: dict[int, list[Assignment]] = {}
    for each in places:
        found.setdefault(each.member.device.node, []).append(each)
    return found


def _resume(job: Job) -> None:
    """All workers adopt the newest plan and commit a step."""
    generation, nodes = job.plan.generation, _by_node(job.plan.participants)
    for phase in RecoveryPhase:
        for node, places in nodes.items():
            done = (PhaseDone(generation, m, phase, time.time()) for _, m in places)
            job.tell(_progress(node, places, tuple(done)))
    _commit(job)


def _commit(job: Job) -> list[tuple[int, int]]:
    """All workers commit a step; returns the bytes that each node writes."""
    job.step = max(job.step + 1, job.plan.resume_step)
    written: list[tuple[int, int]] = []
    for node, places in _by_node(job.plan.placement).items():
        before = job.written
        job.tell(_progress(node, places, tuple(_step(job, each) for each in places)))
        written.append((node, job.written - before))
    return written


def _progress(node: int, places: Iterable[Assignment], words: Sequence[Word]) -> NodeProgress:
    statuses = {member: fresh_status(member) for _, member in places}
    for word in words:
        statuses[word.member] = summed_up(statuses[word.member], word)
    return NodeProgress(node, tuple(words), tuple(statuses.values()))


def _step(job: Job, place: Assignment) -> StepDone:
    return StepDone(
        generation=job.plan.generation,
        member=place.member,
        replica=place.coordinate.replica,
        step=job.step,
        loss=2.5,
        grad_norm=1.25,
        tokens=4096 * job.shape.global_batch_size,
        sample_digest="0123456789abcdef",
        sharded_digest=None,
        replicated_digest=None,
        started_at=time.time(),
        compute_seconds=7.5,
        at=time.time(),
        awaited=job.plan.speaks(place.member),
    )


def _fail(job: Job, number: int) -> Failure:
    """A device of another replica than before is lost, and the job goes on without it."""
    places = _by_node(job.plan.placement)
    replica = (number + 1) * job.shape.replicas // (FAILURES + 1)
    lost = next(m for place, m in job.plan.placement if place.replica == replica)
    job.incarnations[lost.device] = 0
    exited = ProcessExited(lost.device, lost.incarnation, -9, "")
    failure = classify(exited, device_healthy=False, now=time.time())
    vote = (1.0,) * 6
    session = Session(job.step - 1).start().prepare().hold_vote(vote).commit()
    generation = job.plan.generation + 1
    answers = {
        member: Quiesced(
            generation,
            member,
            standing(place.slot_ref, session, job.plan.generation, 0),
            True,
            time.time(),
        )
        for place, member in job.plan.placement
        if member != lost
    }
    reports = [
        NodeReport(generation, node, tuple(answers[m] for _, m in on_node if m != lost))
        for node, on_node in places.items()
    ]
    messages: tuple[Event, ...] = (
        Failed(failure, None, None, None),
        _record(job, lost.device.node),
        *reports,
    )
    job.written = 0
    announced, effects = _timed(lambda: _tell_all(job, messages[:-1]))
    assert job.plan.generation < generation, "the last report is awaited"
    planned, last_effects = _timed(lambda: _tell_all(job, messages[-1:]))
    reported = job.written
    orders = [effect.message for effect in effects + last_effects if isinstance(effect, Send)]
    (change,) = (order for order in orders if isinstance(order, PlanChange))
    _resume(job)
    return Failure(
        planned,
        announced + planned,
        sum(len(encode(order)) for order in orders),
        len(encode(change)),
        len(msgspec.msgpack.encode(Adopt(job.plan))),
        reported,
    )


def _tell_all(job: Job, messages: Iterable[Event]) -> list[Effect]:
    """The leader's part: read each message, decide, and encode what comes of it."""
    effects = [effect for message in messages for effect in job.tell(message)]
    for effect in effects:
        if isinstance(effect, Send):
            encode(effect.message)
        elif isinstance(effect, Note):
            msgspec.json.encode(effect.fields)
    return effects


def _go_on(job: Job, step_seconds: float) -> Calm:
    """Steps without a failure."""
    health = HealthConfig()
    log = StepLog(job.controller.plans)
    before = job.written
    busy, written = _timed(lambda: _commit(job))
    lines, _ = _timed(lambda: [log.take(_step(job, each)) for each in job.plan.placement])
    # A node writes once a step, or with what else was said in the same time.
    interval = max(step_seconds, health.report_seconds)
    return Calm(
        writes=len(written) / interval,
        bytes=(job.written - before) / step_seconds,
        renewals=RENEWALS * len(written) / health.lease_seconds,
        busy=(busy + lines) / step_seconds,
    )


def _timed(work: Callable[[], Result]) -> tuple[float, Result]:
    """CPU seconds of `work`, which waits for nothing, and its result."""
    began = time.process_time()
    result = work()
    return time.process_time() - began, result


def _failure_table(nodes: Sequence[int], costs: Sequence[Failure]) -> Table:
    title = f"one failure, {DEVICES_PER_NODE} devices a node, {STAGES} nodes a replica"
    rows: tuple[tuple[str, Callable[[Failure], float]], ...] = (
        ("last report to plan, ms", lambda cost: 1e3 * cost.planned),
        ("failure to plan, leader's ms", lambda cost: 1e3 * cost.answered),
        ("leader writes, kB", lambda cost: cost.led / 1e3),
        ("of that the plan, kB", lambda cost: cost.change / 1e3),
        ("a whole plan, kB", lambda cost: cost.whole / 1e3),
        ("told to each node, kB", lambda cost: cost.led / 1e3),
        ("all nodes report, kB", lambda cost: cost.reported / 1e3),
    )
    return _table(title, nodes, costs, rows)


def _calm_table(nodes: Sequence[int], costs: Sequence[Calm], step_seconds: float) -> Table:
    rows: tuple[tuple[str, Callable[[Calm], float]], ...] = (
        ("writes a second", lambda cost: cost.writes),
        ("kB a second", lambda cost: cost.bytes / 1e3),
        ("renewed leases a second", lambda cost: cost.renewals),
        ("leader busy, %", lambda cost: 100 * cost.busy),
    )
    return _table(f"no failure, steps of {step_seconds:g} s", nodes, costs, rows)


Cost = TypeVar("Cost")


def _table(
    title: str,
    nodes: Sequence[int],
    costs: Sequence[Cost],
    rows: Sequence[tuple[str, Callable[[Cost], float]]],
) -> Table:
    """A row for each figure, a column for each size of the cluster."""
    table = Table(title=title)
    table.add_column("nodes")
    for number in nodes:
        table.add_column(f"{number:,}", justify="right")
    for name, figure in rows:
        values = [figure(cost) for cost in costs]
        table.add_row(name, *(f"{_short(value)} ({_short(value / values[0])})" for value in values))
    return table


def _short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


if __name__ == "__main__":
    run_main(main)
