"""The controller: its table, and whole recoveries as transcripts that a person can read.

EVERSTEP_REWRITE=1 rewrites the transcripts; read the difference before you keep it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from scenes import LIMITS, Stage, committed, failure_of, job_shape, keeping, prepared

from elastic import job as job_module
from elastic.controller import _TABLE, ProtocolError
from elastic.effects import (
    AgentGone,
    Event,
    Finish,
    ForgetNode,
    NodeLost,
    Note,
    Outage,
    Phase,
    Send,
    StopRequested,
    Tick,
)
from elastic.messages import (
    AgentRecord,
    ComponentFault,
    ConnectionLost,
    Failed,
    Fence,
    Leave,
    NodeAlive,
    NodeProgress,
    NodeReport,
    Quiesce,
    RecoveryPhase,
    Stop,
)
from elastic.plan import Action, StateSource
from elastic.session import Session
from elastic.topology import Member

TRANSCRIPTS = Path(__file__).parent / "transcripts"
REWRITE = os.environ.get("EVERSTEP_REWRITE") == "1"

EVENTS: dict[type[Event], Callable[[Stage], Event]] = {
    AgentRecord: lambda stage: AgentRecord(0, 1, (), (), "node0:7"),
    Failed: lambda stage: Failed(failure_of(stage.member(7, 7), at=stage.now), None, None, None),
    ComponentFault: lambda stage: ComponentFault(1, "agent", 7, 3, stage.now),
    NodeAlive: lambda stage: NodeAlive(stage.controller.generation, 0),
    AgentGone: lambda stage: AgentGone(7, 1),
    NodeLost: lambda stage: NodeLost(7, "its agent's lease ended"),
    Outage: lambda stage: Outage(3.0),
    NodeReport: lambda stage: NodeReport(stage.controller.generation, 0, ()),
    NodeProgress: lambda stage: NodeProgress(0, ()),
    Tick: lambda stage: Tick(),
    StopRequested: lambda stage: StopRequested("enough"),
}


def running(**shape: int) -> Stage:
    stage = Stage(job_shape(**shape))
    stage.start()
    return stage


def in_phase(phase: Phase) -> Stage:
    """A stage whose controller came to `phase` by events."""
    stage = running()
    match phase:
        case Phase.RUNNING:
            return stage
        case Phase.COMPLETED:
            stage.steps(9)
            return stage
        case Phase.HALTED:
            stage.stop("enough")
            return stage
    stage.failed(stage.member(0, 1))
    if phase is Phase.QUIESCING:
        return stage
    stage.answers({m: committed(3) for m in stage.placed if m != stage.member(0, 1)})
    if phase is Phase.RESHARDING:
        stage.phases(RecoveryPhase.REBUILD)
    if phase is Phase.RESUMING:
        stage.phases(RecoveryPhase.REBUILD, RecoveryPhase.RESHARD)
    return stage


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("event", EVENTS)
def test_every_event_is_taken_in_every_phase(phase: Phase, event: type[Event]) -> None:
    stage = in_phase(phase)
    assert stage.controller.phase is phase
    assert (phase, event) in _TABLE
    generation = stage.controller.generation
    effects = stage.controller.handle(EVENTS[event](stage), stage.now)
    assert stage.controller.generation >= generation
    if phase in (Phase.COMPLETED, Phase.HALTED):
        assert effects == [] and stage.controller.phase is phase
    elif event is StopRequested:
        assert effects == [Send(Stop("enough", "interrupted")), Finish("interrupted", "enough")]
        assert stage.controller.phase is Phase.HALTED


@pytest.mark.parametrize("phase", Phase)
def test_a_foreign_event_is_a_protocol_error_that_names_event_and_phase(phase: Phase) -> None:
    foreign = Quiesce(1, True, (), "")
    with pytest.raises(ProtocolError, match=f"Quiesce in phase {phase}"):
        in_phase(phase).controller.handle(foreign, 0.0)  # type: ignore[arg-type]


def test_the_table_has_nothing_beside_the_phases_and_events() -> None:
    assert set(_TABLE) == {(phase, event) for phase in Phase for event in EVENTS}


# Scenarios. Each ends with what matters in it; the transcript holds the rest.


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
    stage.wait(0.1)
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


def node_lost_and_back() -> Stage:
    stage = running()
    stage.node_lost(1)
    stage.answers({m: prepared(0) for m in stage.placed if m.device.node == 0})
    assert stage.plan.action is Action.DROP_REPLICA
    stage.phases()
    stage.node_returns(1)
    newcomers = stage.newcomers(1)
    stage.answers({m: committed(0) for m in stage.placed} | newcomers)
    assert stage.plan.degrees() == ((2,), (2,))
    return stage


def agent_that_began_anew_unseen() -> Stage:
    stage = running()
    stage.node_returns(1)
    stage.answers({m: prepared(0) for m in stage.placed if m.device.node == 0})
    assert stage.plan.action is Action.CONTINUE
    assert stage.newcomers(1).keys() <= set(stage.placed)
    return stage


def silent_agent() -> Stage:
    stage = running()
    stage.connection_lost(stage.member(0, 0))
    stage.wait(1.0)
    stage.node_alive(0)
    stage.wait(0.4)
    assert stage.effects == []
    stage.wait(0.1)
    assert ForgetNode(1) in stage.effects
    stage.answers({m: prepared(0) for m in stage.placed if m.device.node == 0})
    assert stage.plan.action is Action.DROP_REPLICA and stage.plan.generation == 3
    return stage


def agent_gone_and_back() -> Stage:
    stage = running()
    stage.agent_gone(1)
    assert ForgetNode(1) in stage.effects
    stage.answers({m: prepared(0) for m in stage.placed if m.device.node == 0})
    assert stage.plan.action is Action.DROP_REPLICA
    stage.phases()
    stage.node_returns(1)
    assert stage.agent_gone(1, life=1) == [], "an earlier life's end says nothing of this one"
    newcomers = stage.newcomers(1)
    stage.answers({m: committed(0) for m in stage.placed} | newcomers)
    assert stage.plan.degrees() == ((2,), (2,))
    return stage


def store_outage_while_quiescing() -> Stage:
    stage = running()
    lost = stage.member(0, 0)
    stage.failed(lost)
    stage.now += 30.0
    stage.handle("the store was out for 30 s", Outage(30.0))
    stage.wait(9.0)
    assert stage.effects == []
    stage.answers({m: prepared(0) for m in stage.placed if m != lost})
    assert stage.plan.generation == 2
    return stage


def node_that_drains_and_returns() -> Stage:
    stage = running()
    stage.steps(0)
    stage.drains(1)
    assert Send(Quiesce(2, False, (), "node1 drains: stop after the step in flight")) in (
        stage.effects
    )
    stage.answers({m: committed(1) for m in stage.placed})
    assert stage.plan.resume_step == 2 and not stage.plan.redone
    assert {m for _, m in stage.plan.donors} == {stage.member(1, 0), stage.member(1, 1)}
    stage.phases()
    assert Send(Leave(1, 1)) in stage.effects
    stage.steps(2)
    stage.node_lost(1)
    assert stage.effects == []
    stage.node_returns(1)
    newcomers = stage.newcomers(1)
    stage.answers({m: committed(3) for m in stage.placed} | newcomers)
    assert stage.plan.degrees() == ((2,), (2,))
    stage.phases()
    assert Send(Leave(1, 1)) not in stage.effects
    return stage


def worker_lost_while_the_node_with_its_copy_drains() -> Stage:
    stage = running()
    stage.drains(1)
    lost = stage.member(0, 0)
    stage.failed(lost)
    stage.answers({m: committed(3) for m in stage.placed if m != lost})
    # Nobody else holds what was lost: node 1 gives it before it goes.
    assert stage.plan.degrees() == ((1,),) and stage.plan.donors
    assert stage.plan.reshard[0].moves
    stage.phases()
    assert Send(Leave(1, 1)) in stage.effects
    return stage


def device_that_returns_while_a_node_drains() -> Stage:
    stage = running()
    lost = stage.member(0, 0)
    stage.failed(lost)
    stage.answers({m: committed(3) for m in stage.placed if m != lost})
    stage.phases()
    stage.drains(1)
    stage.answers({m: committed(4) for m in stage.placed})
    stage.returns(0, 0, 2)
    stage.phases()
    # The next generation is announced with the same event, and does not hold node 1 up.
    assert stage.controller.generation == 4 and stage.controller.phase is Phase.QUIESCING
    assert Send(Leave(1, 1)) in stage.effects
    back: dict[Member, Session | None] = {stage.member(0, 0, 2): None}
    stage.answers({m: committed(5) for m in stage.placed} | back)
    assert {m.device.node for m in stage.placed} == {0} and stage.plan.rendezvous == "node0:7"
    return stage


def draining_node_that_is_lost() -> Stage:
    stage = running()
    stage.drains(1)
    stage.node_lost(1)
    stage.answers({m: prepared(0) for m in stage.placed if m.device.node == 0})
    assert stage.plan.action is Action.DROP_REPLICA and stage.plan.redone
    assert stage.plan.donors == ()
    return stage


def drain_that_waits_for_others() -> Stage:
    stage = running()
    stage.node_lost(0)
    stage.answers({m: committed(3) for m in stage.placed if m.device.node == 1})
    stage.phases()
    stage.drains(1)
    assert stage.controller.phase is Phase.RUNNING and len(stage.effects) == 1
    stage.node_returns(0)
    newcomers = stage.newcomers(0)
    stage.answers({m: committed(4) for m in stage.placed} | newcomers)
    assert {m.device.node for m in stage.placed} == {0} and not stage.plan.redone
    stage.phases()
    assert Send(Leave(1, 1)) in stage.effects
    return stage


def node_that_drains_before_the_start() -> Stage:
    stage = Stage(job_shape())
    stage.ready(0)
    stage.drains(1)
    assert Send(Leave(1, 1)) in stage.effects and stage.controller.plan is None
    stage.node_lost(1)
    stage.node_returns(1)
    assert stage.plan.degrees() == ((2,), (2,))
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


SCENARIOS = (
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
    node_lost_and_back,
    agent_that_began_anew_unseen,
    silent_agent,
    agent_gone_and_back,
    store_outage_while_quiescing,
    node_that_drains_and_returns,
    worker_lost_while_the_node_with_its_copy_drains,
    device_that_returns_while_a_node_drains,
    draining_node_that_is_lost,
    drain_that_waits_for_others,
    node_that_drains_before_the_start,
    device_that_flaps,
    step_salvaged_twice,
)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_scenario_goes_as_its_transcript_says(scenario: Callable[[], Stage]) -> None:
    text = "\n".join(scenario().lines) + "\n"
    path = TRANSCRIPTS / f"{scenario.__name__}.txt"
    if REWRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def known_steps(stage: Stage) -> dict[Member, int]:
    """What the controller knows to be committed."""
    return {member: step for member, step in stage.controller.committed.items() if step >= 0}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_scenario_ends_alike_if_every_event_meets_another_controller(
    scenario: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scenario()
    monkeypatch.setattr(Stage, "successors", True)
    again = scenario()
    assert again.controller.phase is told.controller.phase
    assert again.controller.generation == told.controller.generation
    assert again.controller.plans == told.controller.plans
    if told.controller.phase is not Phase.HALTED:
        assert known_steps(again) == known_steps(told)


def test_no_transcript_is_left_over() -> None:
    expected = {f"{scenario.__name__}.txt" for scenario in SCENARIOS}
    assert {path.name for path in TRANSCRIPTS.iterdir()} == expected


def test_effects_of_a_failure_are_ordered_the_decision_before_what_follows_from_it() -> None:
    stage = running()
    effects = stage.failed(stage.member(0, 0))
    assert isinstance(effects[0], Note) and effects[0].event == "failure"
    assert isinstance(effects[1], Send) and isinstance(effects[1].message, Quiesce)
    assert isinstance(effects[2], Note) and effects[2].event == "quiesce"


def test_a_dead_worker_is_not_believed_when_a_late_record_still_lists_it() -> None:
    stage = running()
    lost = stage.member(0, 0)
    stage.failed(lost)
    stage.returns(0, 0, 1)
    stage.answers({m: committed(0) for m in stage.placed if m != lost})
    assert lost not in stage.placed


def test_a_long_job_leaves_no_more_keys_than_a_short_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whoever takes over in the end knows the same plans."""
    monkeypatch.setattr(job_module, "KEPT_PLANS", 2)
    stage = Stage(job_shape(steps=100), replace(LIMITS, max_recoveries=100))
    stage.start()
    stage.steps(0)
    sizes = []
    for round_number in range(1, 13):
        stage.now += LIMITS.quarantine.flap_window_seconds
        stage.failed(stage.member(0, 0, round_number))
        stage.answers({m: committed(2 * round_number - 2) for m in alive(stage, round_number)})
        stage.phases()
        stage.steps(2 * round_number - 1)
        stage.returns(0, 0, round_number + 1)
        stage.answers({m: committed(2 * round_number - 1) for m in stage.placed})
        stage.phases()
        stage.steps(2 * round_number)
        # Failures stay: who died is not to be believed, whatever comes late.
        sizes.append(len([key for key in stage.stored if "/events/" not in key]))
    assert stage.controller.generation == 25
    assert max(sizes[3:]) == max(sizes[3:6])
    plans = dict(stage.controller.plans)
    assert 2 <= len(plans) < 4
    stage.succeed()
    assert stage.controller.plans.items() >= dict(list(plans.items())[-2:]).items()


def alive(stage: Stage, incarnation: int) -> list[Member]:
    return [m for m in stage.placed if m != stage.member(0, 0, incarnation)]


def test_nobody_is_asked_to_grow_in_the_last_step() -> None:
    stage = running(steps=3)
    lost = stage.member(0, 1)
    stage.failed(lost)
    stage.answers({m: committed(1) for m in stage.placed if m != lost})
    stage.phases()
    stage.returns(0, 1, 2)
    assert stage.effects == [] and stage.controller.phase is Phase.RUNNING


def test_late_words_of_an_earlier_generation_change_nothing() -> None:
    stage = in_phase(Phase.REBUILDING)
    stage.connection_lost(stage.member(1, 0), generation=1)
    assert stage.effects == []
    stage.wait(5.0)
    assert stage.effects == [] and stage.controller.phase is Phase.REBUILDING


def test_a_step_that_only_the_dead_committed_is_redone_and_not_lost() -> None:
    stage = running()
    stage.steps(3)
    dead = stage.member(0, 0)
    stage.steps(4, [dead])
    stage.failed(dead)
    stage.answers({m: prepared(4) for m in stage.placed if m != dead})
    note = next(e for e in stage.effects if isinstance(e, Note) and e.event == "plan")
    assert (note.fields["resume_step"], note.fields["lost_steps"]) == (4, 0)
    assert note.fields["redone"] is True


def test_a_job_is_not_complete_before_a_survivor_applied_the_last_vote() -> None:
    stage = running(steps=4)
    stage.steps(2)
    dead, behind, ahead = stage.member(0, 0), stage.member(0, 1), stage.member(1, 0)
    stage.failed(dead)
    stage.answers({behind: prepared(3), ahead: committed(3), stage.member(1, 1): committed(3)})
    assert stage.plan.resume_step == 4 and stage.plan.apply_vote is not None
    # A word of anybody, before `behind` has said that it committed step 3.
    stage.steps(3, [ahead])
    assert stage.controller.phase is Phase.REBUILDING


@pytest.mark.parametrize("received", [True, False])
def test_a_kill_while_the_first_generation_is_adopted_does_not_end_the_job(
    received: bool,
) -> None:
    stage = Stage(job_shape())
    for node in (0, 1):
        stage.ready(node)
    dead = stage.member(0, 0)
    stage.failed(dead)
    alive = [m for m in stage.placed if m != dead]
    for report in stage.initial_answers(alive, received=received):
        stage.handle("answers of workers without a layout", report)
    # Nothing was computed yet: whoever is left can be initialised again.
    assert stage.controller.phase is Phase.REBUILDING, stage.lines[-1]
    assert stage.plan.generation == 2 and stage.plan.state_source is StateSource.INITIALIZE


def test_recoveries_that_lead_nowhere_end_the_job_with_the_last_cause() -> None:
    stage = running()
    for _ in range(LIMITS.max_fruitless_recoveries + 1):
        broken = ConnectionLost(stage.controller.generation, stage.member(0, 0), "out of luck")
        stage.handle("a connection is lost", NodeProgress(0, (broken,)))
        stage.wait(2.0)
        if stage.controller.phase is Phase.QUIESCING:
            stage.answers({member: committed(-1) for member in stage.placed})
    assert stage.controller.phase is Phase.HALTED
    finish = next(effect for effect in stage.effects if isinstance(effect, Finish))
    assert "4 recoveries in a row without a committed step" in finish.reason
