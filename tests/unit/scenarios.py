"""Whole recoveries, told event by event: each drives a stage through one story."""

from __future__ import annotations

from dataclasses import replace

from scenes import LIMITS, Stage, committed, job_shape, keeping, prepared

from elastic.effects import (
    Finish,
    Phase,
    Send,
)
from elastic.messages import (
    Fence,
    RecoveryPhase,
)
from elastic.plan import Action, StateSource


def running(**shape: int) -> Stage:
    stage = Stage(job_shape(**shape))
    stage.start()
    return stage


def start() -> Stage:
    stage = Stage(job_shape())
    stage.start()
    stage.steps(0)
    assert stage.plan.state_source is StateSource.INITIALIZE
    assert stage.controller.phase is Phase.RUNNING
    return stage


def kill_and_return() -> Stage:
    stage = running()
    for step in range(3):
        stage.steps(step)
    lost = stage.member(0, 1)
    stage.failed(lost)
    stage.answers({m: prepared(3) for m in stage.placed if m != lost})
    assert stage.plan.action is Action.REDUCE_TP and stage.plan.resume_step == 3
    stage.phases()
    stage.steps(3)
    stage.returns(0, 1, 2)
    stage.answers({m: committed(4) for m in stage.placed} | {stage.member(0, 1, 2): None})
    assert stage.plan.action is Action.GROW_TP and stage.plan.resume_step == 5
    stage.phases()
    stage.steps(5)
    return stage


def two_kills_at_once() -> Stage:
    stage = running()
    first, second = stage.member(0, 0), stage.member(1, 1)
    stage.failed(first)
    stage.failed(second)
    alive = [m for m in stage.placed if m not in (first, second)]
    stage.answers({alive[0]: committed(2), alive[1]: prepared(2)})
    assert stage.controller.generation == 3 and list(stage.controller.plans) == [1, 3]
    assert stage.plan.resume_step == 3 and stage.plan.apply_vote is not None
    return stage


def kill_while_quiescing() -> Stage:
    stage = running()
    first, second = stage.member(0, 0), stage.member(1, 1)
    stage.failed(first)
    stage.answers({stage.member(0, 1): prepared(0)})
    stage.failed(second)
    # The answer of before counts no more.
    stage.answers({stage.member(0, 1): prepared(0)}, generation=2)
    assert stage.controller.phase is Phase.QUIESCING
    stage.answers({stage.member(0, 1): prepared(0), stage.member(1, 0): prepared(0)})
    assert stage.plan.generation == 3
    return stage


def kill_while_rebuilding() -> Stage:
    stage = running()
    first, second = stage.member(0, 0), stage.member(1, 0)
    stage.failed(first)
    alive = [m for m in stage.placed if m != first]
    stage.answers({m: committed(4) for m in alive})
    assert stage.controller.phase is Phase.REBUILDING
    stage.failed(second)
    assert stage.controller.phase is Phase.QUIESCING
    return stage


def connection_lost_without_culprit() -> Stage:
    stage = running()
    stage.connection_lost(stage.member(0, 0))
    stage.connection_lost(stage.member(1, 0))
    stage.wait(0.9)
    assert stage.controller.phase is Phase.RUNNING
    stage.wait(0.2)
    stage.answers({m: prepared(0) for m in stage.placed})
    assert stage.plan.action is Action.CONTINUE and len(stage.plan.placement) == 4
    return stage


def connection_lost_with_culprit() -> Stage:
    stage = running()
    stage.connection_lost(stage.member(0, 0))
    stage.now += 0.5
    stage.failed(stage.member(1, 0))
    stage.wait(2.0)
    # The failure explained it: one generation, not two.
    assert stage.controller.generation == 2
    return stage


def stalled_collective() -> Stage:
    stage = running()
    stage.steps(3)
    stage.now += 12
    stage.stalled(0, 1, 11.0)
    assert stage.wait(1) == []
    stage.goes_on(0)
    stage.stalled(1, 1, 12.0)
    assert stage.wait(1) == []
    stage.stalled(0, 1, 10.5)
    assert stage.wait(0.1) == []
    stage.wait(1)
    for node in (0, 1):
        stage.node_alive(node)
    stage.answers({member: committed(3) for member in stage.placed}, intact=False)
    stage.phases()
    assert (stage.plan.generation, stage.plan.action) == (2, Action.CONTINUE)
    assert len(stage.placed) == 4 and stage.plan.kept_replicas == ()
    return stage


def worker_that_never_answers() -> Stage:
    stage = running()
    lost, silent = stage.member(0, 0), stage.member(1, 1)
    stage.failed(lost)
    stage.answers({stage.member(0, 1): prepared(0), stage.member(1, 0): prepared(0)})
    stage.wait(9.0)
    assert not stage.effects
    stage.wait(1.0)
    fence = Fence(silent, "stop for generation 2", LIMITS.quiesce_timeout_seconds)
    assert stage.effects == [Send(fence)]
    stage.wait(1.0)
    assert not stage.effects
    stage.failed(silent, hang=True)
    stage.answers({stage.member(0, 1): prepared(0), stage.member(1, 0): prepared(0)})
    assert stage.controller.phase is Phase.REBUILDING
    return stage


def spawn_timeout() -> Stage:
    stage = Stage(job_shape())
    stage.ready(0)
    stage.wait(59.0)
    stage.wait(2.0)
    assert isinstance(stage.effects[-1], Finish) and stage.effects[-1].outcome == "halted"
    assert "node1/0, node1/1" in stage.effects[-1].reason
    return stage


def spares_begin_for_a_late_node() -> Stage:
    stage = Stage(job_shape(), spares=2)
    stage.ready(0)
    stage.ready(2)
    stage.wait(59.0)
    assert stage.effects == []
    stage.wait(2.0)
    assert {member.device.node for member in stage.placed} == {0, 2}
    assert stage.plan.degrees() == ((2,), (2,))
    stage.ready(1)
    return stage


def replica_lost_and_back() -> Stage:
    stage = running()
    stage.failed(stage.member(0, 0))
    stage.failed(stage.member(0, 1))
    stage.answers({m: committed(3) for m in stage.placed if m.device.node == 1})
    assert stage.plan.action is Action.DROP_REPLICA and stage.plan.batch_split == (8,)
    stage.phases()
    stage.steps(4)
    stage.returns(0, 1, 2)
    stage.answers({m: committed(5) for m in stage.placed} | {stage.member(0, 1, 2): None})
    assert stage.plan.action is Action.GROW_TP and stage.plan.degrees() == ((1,), (2,))
    return stage


def last_holder_lost() -> Stage:
    stage = running()
    stage.failed(stage.member(0, 0))
    stage.failed(stage.member(1, 0))
    stage.answers({stage.member(0, 1): committed(3), stage.member(1, 1): committed(3)})
    assert isinstance(stage.effects[-1], Finish)
    assert "nobody alive holds KV groups 0-1" in stage.effects[-1].reason
    return stage


def completion() -> Stage:
    stage = running(steps=2)
    stage.steps(0)
    stage.steps(1, stage.placed[:3])
    assert stage.controller.phase is Phase.RUNNING
    stage.steps(1, stage.placed[3:])
    assert stage.effects[-1] == Finish("completed", "all 2 steps are committed")
    return stage


def interrupted() -> Stage:
    stage = running()
    stage.failed(stage.member(0, 0))
    stage.stop("the launcher received SIGINT")
    assert stage.controller.phase is Phase.HALTED
    return stage


def too_many_recoveries() -> Stage:
    stage = Stage(job_shape(), replace(LIMITS, max_recoveries=1))
    stage.start()
    for _ in range(2):
        stage.connection_lost(stage.member(0, 0))
        stage.wait(1.5)
        if stage.controller.phase is Phase.QUIESCING:
            stage.answers({m: prepared(0) for m in stage.placed})
    assert isinstance(stage.effects[-1], Finish)
    assert "health.max_recoveries" in stage.effects[-1].reason
    return stage


def device_that_flaps() -> Stage:
    stage = running()
    for incarnation in (1, 2):
        lost = stage.member(0, 1, incarnation)
        stage.failed(lost)
        stage.answers({m: committed(incarnation) for m in stage.placed if m != lost})
        stage.phases()
        stage.now += 1
        stage.returns(0, 1, incarnation + 1)
        if incarnation == 1:
            back = stage.member(0, 1, 2)
            stage.answers({m: committed(1) for m in stage.placed} | {back: None})
            stage.phases()
    # It is ready, and kept out.
    assert stage.controller.phase is Phase.RUNNING and stage.effects == []
    stage.wait(18.0)
    assert stage.effects == []
    stage.wait(2.0)
    assert stage.controller.phase is Phase.QUIESCING
    return stage


def step_salvaged_twice() -> Stage:
    stage = running()
    stage.steps(2)
    healthy = [stage.member(1, 0), stage.member(1, 1)]
    stage.failed(stage.member(0, 1))
    stage.answers({stage.member(0, 0): committed(2)} | {m: keeping(3, 1) for m in healthy})
    assert stage.plan.salvage is not None and stage.plan.salvage.kept_samples == 4
    stage.phases(RecoveryPhase.REBUILD)
    # The rest of replica 0 is lost before anybody went on with the step.
    stage.failed(stage.member(0, 0))
    stage.answers({m: keeping(3, 1).drop(salvaged=True) for m in healthy})
    assert stage.plan.salvage is not None and stage.plan.salvage.shares == (4,)
    stage.phases()
    stage.steps(3)
    return stage


WORKER_SCENARIOS = (
    start,
    kill_and_return,
    two_kills_at_once,
    kill_while_quiescing,
    kill_while_rebuilding,
    connection_lost_without_culprit,
    connection_lost_with_culprit,
    stalled_collective,
    worker_that_never_answers,
    spawn_timeout,
    spares_begin_for_a_late_node,
    replica_lost_and_back,
    last_holder_lost,
    completion,
    interrupted,
    too_many_recoveries,
    device_that_flaps,
    step_salvaged_twice,
)
