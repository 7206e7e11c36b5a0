"""Whole recoveries of nodes, agents and drains, told event by event."""

from __future__ import annotations

from scenarios import running
from scenes import Stage, committed, job_shape, prepared

from elastic.effects import (
    ForgetNode,
    Outage,
    Phase,
    Send,
)
from elastic.messages import (
    Leave,
    Quiesce,
)
from elastic.plan import Action
from elastic.session import Session
from elastic.topology import Member


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


NODE_SCENARIOS = (
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
)
