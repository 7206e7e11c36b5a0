"""The controller: its table, and what single events do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
from scenarios import running
from scenes import LIMITS, Stage, committed, failure_of, job_shape, prepared

from elastic import job as job_module
from elastic.controller import _TABLE, ProtocolError
from elastic.effects import (
    AgentGone,
    Event,
    Finish,
    NodeLost,
    Note,
    Outage,
    Phase,
    Send,
    StopRequested,
    Tick,
)
from elastic.keys import key_of
from elastic.messages import (
    AgentRecord,
    ComponentFault,
    ConnectionLost,
    Failed,
    NodeAlive,
    NodeProgress,
    NodeReport,
    Quiesce,
    RecoveryPhase,
    Stop,
)
from elastic.plan import StateSource
from elastic.topology import Member

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


@pytest.mark.parametrize("successors", [False, True])
def test_steps_that_were_committed_and_are_done_again_are_counted(
    successors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "successors", successors)
    stage = running()
    stage.steps(5)
    dead = stage.member(0, 0)
    stage.failed(dead)
    # They committed step 5, and answer as if they had never done so.
    stage.answers({m: committed(3) for m in stage.placed if m != dead})
    note = next(e for e in stage.effects if isinstance(e, Note) and e.event == "plan")
    assert (note.fields["resume_step"], note.fields["lost_steps"]) == (4, 2)


def test_a_successor_tells_those_who_stop_who_else_was_lost_meanwhile() -> None:
    stage = running()
    stage.steps(3)
    first, second = stage.member(0, 0), stage.member(1, 1)
    stage.failed(first)
    stage.journaled.clear()
    failed = Failed(failure_of(second, at=stage.now), None, None, None)
    stage.stored[key_of("job", failed)] = failed
    effects = stage.succeed()
    quiesce = next(e.message for e in effects if isinstance(e, Send))
    assert isinstance(quiesce, Quiesce) and quiesce.lost == (first, second)
    told = [(e.event, e.fields.get("generation")) for e in effects if isinstance(e, Note)]
    assert ("quiesce", 2) in told and ("quiesce", 3) in told
