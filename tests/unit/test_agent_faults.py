"""A lost node is put down to the fault that struck its agent in that life, and to no other;
by the controller that heard of it, and by its successor."""

from __future__ import annotations

import pytest
from scenes import Stage, job_shape

from elastic.effects import Effect, Note
from elastic.messages import ComponentFault


@pytest.fixture(params=[False, True], ids=["same controller", "successors"])
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(Stage, "successors", request.param)
    stage = Stage(job_shape())
    stage.start()
    stage.steps(0)
    return stage


def strike(stage: Stage, life: int | None) -> None:
    """Fault 4 strikes the agent of node 1."""
    told = ComponentFault(4, "agent of node1", 1, 2, stage.now, life)
    stage.handle("a fault strikes the agent of node1", told)


def blamed(effects: list[Effect]) -> list[tuple[int | None, int]]:
    """The fault, and the step, of each failure."""
    notes = [each for each in effects if isinstance(each, Note) and each.event == "failure"]
    return [(note.fields["fault"], note.fields["at_step"]) for note in notes]


def test_a_node_that_a_fault_took_is_put_down_to_it(stage: Stage) -> None:
    strike(stage, life=1)
    assert blamed(stage.node_lost(0)) == [(None, 1)] * 2
    assert blamed(stage.node_lost(1)) == [(4, 2)] * 2
    assert blamed(stage.node_lost(1)) == []


def test_a_fault_says_nothing_of_a_later_life(stage: Stage) -> None:
    strike(stage, life=1)
    assert blamed(stage.node_lost(1)) == [(4, 2)] * 2
    stage.node_returns(1)
    assert blamed(stage.node_lost(1)) == [(None, 1)] * 2


def test_a_fault_whose_loss_nobody_saw_says_nothing_of_a_later_life(stage: Stage) -> None:
    strike(stage, life=1)
    stage.node_returns(1)
    assert blamed(stage.node_lost(1)) == [(None, 1)] * 2


def test_a_fault_that_struck_an_agent_before_it_had_a_record_took_no_node(stage: Stage) -> None:
    strike(stage, life=None)
    assert blamed(stage.node_lost(1)) == [(None, 1)] * 2
