"""Everybody waits for everybody: told by all nodes of the newest plan, or nothing is done."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scenes import Stage, committed, job_shape

from elastic.adoption import Adoption
from elastic.effects import Effect, Outage, Phase, Send
from elastic.messages import PhaseDone, Quiesce, RecoveryPhase
from elastic.node_news import NodeNews
from elastic.stalls import Stalls
from elastic.topology import DeviceId, Member
from health.heartbeat import Activity
from health.liveness import Stalled
from health.policy import Deadline

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
MEMBERS = [Member(DeviceId(node, index), 1) for node in range(3) for index in range(2)]


def stall(node: int = 0, generation: int = 2, seconds: float = 11.0) -> Stalled:
    return Stalled(
        device=DeviceId(node, 1),
        incarnation=1,
        activity=Activity.VOTE,
        step=7,
        generation=generation,
        waiting_seconds=seconds,
        deadline=Deadline(10.0, "floor"),
    )


words = st.tuples(st.integers(0, 3), st.sampled_from([None, 1, 2, 2, 2, 3]), st.integers(0, 2))


@PROPERTY
@given(st.lists(words, max_size=20), st.sets(st.sampled_from(MEMBERS)), st.integers(0, 10))
def test_the_last_words_of_all_nodes_of_those_who_are_awaited_decide(
    story: list[tuple[int, int | None, int]], awaited: set[Member], watched_from: int
) -> None:
    stalls = Stalls()
    nodes = {member.device.node for member in awaited}
    last_words: dict[int, int | None] = {}
    now, since = 0, None
    for at, (node, generation, seconds) in enumerate(story):
        now += seconds
        if at == watched_from:
            stalls.watch(2)
        stalls.take(node, None if generation is None else stall(node, generation))
        last_words[node] = generation
        agreed = bool(nodes) and all(last_words.get(each) == 2 for each in nodes)
        agreed = agreed and at >= watched_from
        since = (now if since is None else since) if agreed else None
        expected = since is not None and now >= since + 3
        assert (stalls.cause(awaited, now, patience=3) is not None) == expected


def test_the_cause_names_the_longest_wait() -> None:
    stalls = Stalls()
    stalls.watch(2)
    for node, seconds in ((0, 11.0), (1, 12.25), (2, 10.5)):
        assert stalls.cause(MEMBERS, now=5, patience=0) is None
        stalls.take(node, stall(node, seconds=seconds))
    assert stalls.cause(MEMBERS, now=5, patience=0) == (
        "everybody waits for others, node1/1 in vote of step 7 for 12.2 s, more than 10 s (floor)"
    )


# What an agent tells.


def test_a_stall_is_news_when_it_begins_and_when_it_ends_and_told_as_long_as_it_lasts() -> None:
    news = NodeNews(3)
    assert not news.judge(None) and news.tell() is None
    assert news.judge(stall()) and news.judge(stall(seconds=11.5))
    told = news.tell()
    assert told is not None and (told.node, told.stall) == (3, stall(seconds=11.5))
    assert not news.judge(stall(seconds=12.0)) and news.tell() is None
    news.hear(MEMBERS[0], PhaseDone(2, MEMBERS[0], RecoveryPhase.RESUME, 1.0))
    told = news.tell()
    assert told is not None and told.stall == stall(seconds=12.0) and len(told.notes) == 1
    assert news.judge(stall(generation=4))
    assert news.judge(None)
    told = news.tell()
    assert told is not None and told.stall is None and told.notes == ()
    assert news.tell() is None


# What the controller does about it.


def running() -> Stage:
    """Two nodes of two workers each run generation 1."""
    stage = Stage(job_shape())
    stage.start()
    stage.steps(3)
    return stage


def announced(effects: list[Effect]) -> list[Quiesce]:
    sent = [effect.message for effect in effects if isinstance(effect, Send)]
    return [message for message in sent if isinstance(message, Quiesce)]


def broken(stage: Stage) -> list[Quiesce]:
    """What is announced because everybody waits."""
    assert announced(stage.wait(0.1)) == [], "a word may be under way"
    return announced(stage.wait(stage.limits.corroboration_seconds))


@pytest.fixture(params=[False, True], ids=["one controller", "a successor for each event"])
def stage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Stage:
    monkeypatch.setattr(Stage, "successors", request.param)
    return running()


def test_all_nodes_must_be_stalled(stage: Stage) -> None:
    stage.stalled(0, 1)
    assert stage.wait(60) == []
    stage.stalled(1, 1)
    [quiesce] = broken(stage)
    assert (quiesce.generation, quiesce.urgent, quiesce.lost) == (2, True, ())
    assert quiesce.ask_agents and quiesce.sever_all


def test_a_node_that_goes_on_is_not_stalled_any_more(stage: Stage) -> None:
    stage.stalled(0, 1)
    stage.goes_on(0)
    stage.stalled(1, 1)
    assert broken(stage) == []


def test_stalls_of_an_earlier_generation_say_nothing(stage: Stage) -> None:
    stage.stalled(0, 1)
    stage.failed(stage.member(1, 1))
    stage.answers({m: committed(3) for m in stage.placed if m != stage.member(1, 1)})
    stage.phases()
    stage.stalled(1, 1)
    stage.stalled(0, 1)
    assert broken(stage) == []
    stage.stalled(1, 2)
    assert broken(stage) == []
    stage.stalled(0, 2)
    assert [each.generation for each in broken(stage)] == [3]


def test_who_goes_on_may_be_heard_late(stage: Stage) -> None:
    """Also after those who went on have committed the last step, and are awaited no more."""
    stage.stalled(0, 1)
    stage.stalled(1, 1)
    stage.wait(0.1)
    stage.goes_on(0)
    stage.wait(60)
    stage.steps(9, [stage.member(0, 0), stage.member(0, 1)])
    stage.wait(0.1)
    stage.goes_on(1)
    assert broken(stage) == []
    assert stage.controller.generation == 1


def test_nobody_can_go_on_to_say_so_while_the_store_is_silent(stage: Stage) -> None:
    stage.stalled(0, 1)
    stage.stalled(1, 1)
    stage.wait(0.1)
    stage.now += 30
    stage.handle("the store was out for 30 s", Outage(30.0))
    assert announced(stage.wait(0.1)) == []
    stage.goes_on(1)
    assert broken(stage) == []


def test_a_stall_is_broken_once(stage: Stage) -> None:
    """Agents may repeat it until their workers have stopped."""
    for node in (0, 1):
        stage.stalled(node, 1)
    assert broken(stage)
    for node in (0, 1):
        stage.stalled(node, 1, 12.0)
    stage.node_alive(0)
    stage.node_alive(1)
    assert broken(stage) == []
    assert stage.controller.generation == 2


def test_a_stall_while_others_are_asked_to_finish_their_step_is_broken_too(stage: Stage) -> None:
    """Those who have stopped are not waited for; the others wait for each other."""
    stage.failed(stage.member(1, 1))
    stage.answers({m: committed(3) for m in stage.placed if m != stage.member(1, 1)})
    stage.phases()
    stage.returns(1, 1, 2)
    assert stage.controller.phase is Phase.QUIESCING
    stage.answers({stage.member(1, 0): committed(3)})
    assert broken(stage) == []
    stage.stalled(0, 2)
    [quiesce] = broken(stage)
    assert (quiesce.generation, quiesce.urgent, quiesce.sever_all) == (4, True, True)


def test_waits_for_those_who_build_their_groups_are_no_stall(stage: Stage) -> None:
    """That has its own limit, and a worker whose plan is late does not wait."""
    stage.failed(stage.member(1, 1))
    stage.answers({m: committed(3) for m in stage.placed if m != stage.member(1, 1)})
    for node in (0, 1):
        stage.stalled(node, 2)
    assert broken(stage) == []


def test_a_node_without_a_placed_worker_is_not_asked() -> None:
    stage = running()
    stage.node_lost(1)
    stage.answers({stage.member(0, index): committed(3) for index in range(2)})
    stage.phases()
    stage.stalled(0, 2)
    assert [each.generation for each in broken(stage)] == [3]


def test_who_has_committed_the_last_step_is_not_waited_for() -> None:
    stage = running()
    stage.steps(9, [stage.member(1, 0), stage.member(1, 1), stage.member(0, 1)])
    stage.stalled(0, 1)
    assert broken(stage)


@pytest.mark.parametrize("successors", [False, True])
def test_a_failure_on_the_way_out_of_a_stall_forgets_nothing_of_it(
    successors: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Stage, "successors", successors)
    stage = Stage(job_shape())
    stage.start()
    stage.steps(3)
    for node in (0, 1):
        stage.stalled(node, 1, 11.0)
    assert broken(stage)
    effects = stage.failed(stage.member(0, 0))
    quiesce = next(e.message for e in effects if isinstance(e, Send))
    assert isinstance(quiesce, Quiesce) and quiesce.generation == 3
    assert quiesce.sever_all and quiesce.ask_agents
    for node in (0, 1):
        stage.node_alive(node)
    assert broken(stage) == []
    assert stage.controller.generation == 3, "the stall is broken already"


def test_whoever_has_a_part_of_a_change_before_them_is_waited_for() -> None:
    adoption = Adoption(2, MEMBERS)
    for part in RecoveryPhase:
        waited_for = list(MEMBERS)
        for member in MEMBERS:
            assert set(adoption.awaited) == set(waited_for), part
            adoption.take(PhaseDone(2, member, part, 1.0))
            waited_for.remove(member)
    assert adoption.phase is Phase.RUNNING and not adoption.awaited
