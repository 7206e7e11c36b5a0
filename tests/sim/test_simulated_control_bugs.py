"""Planted bugs in controllers and agents: each is found, by the invariant that it breaks."""

from __future__ import annotations

from collections.abc import Collection, Generator, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import sim_candidate
from links import Broken
from sim_agent import Life, SimAgent
from sim_process import Wait
from sim_store import SimStore
from sim_worker import SimWorker
from violations import first_violation

from elastic.adoption import Adoption
from elastic.controller import Controller
from elastic.effects import Effect, ForgetPlan, Phase
from elastic.job import Job
from elastic.membership import Membership
from elastic.messages import Adopt, PlanChange, StoreMessage
from elastic.node_news import NodeNews
from elastic.notes import newest_plan_notes
from elastic.plan import Plan
from elastic.plan_chain import publication
from elastic.recorded import Recorded, read_messages
from elastic.stalls import Stalls
from elastic.store import Guard
from elastic.topology import Member
from health.classify import Signal
from health.liveness import Stalled


def test_a_fence_that_also_strikes_those_who_answered_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Life, "spares", lambda life, member: False)
    found = first_violation()[0]
    assert "is fenced, but works" in found


def test_a_write_whose_guard_is_not_checked_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def unguarded(store: SimStore, guard: Guard) -> bool:
        return True

    monkeypatch.setattr(SimStore, "holds", unguarded)
    found = first_violation()[0]
    assert "not leading" in found or "exists already" in found


def test_a_failure_that_is_reported_before_its_process_is_dead_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def report_only(life: Life, worker: SimWorker, signal: Signal) -> None:
        life.ended(worker, "at once")

    monkeypatch.setattr(Life, "kill", report_only)
    assert "is reported, but lives" in first_violation()[0]


def test_a_take_over_that_forgets_the_answers_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(messages: Iterable[StoreMessage]) -> Recorded:
        return replace(read_messages(messages), reports=())

    monkeypatch.setattr(sim_candidate, "read_messages", forgetful)
    assert "is fenced, but answered" in first_violation()[0]


def test_a_take_over_that_forgets_who_failed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(messages: Iterable[StoreMessage]) -> Recorded:
        return replace(read_messages(messages), failures=())

    monkeypatch.setattr(sim_candidate, "read_messages", forgetful)
    found = first_violation()[0]
    assert "the journal lacks" in found or "are placed" in found or found == "stuck"


def test_a_take_over_that_counts_on_the_living_alone_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def go_on(controller: Controller, now: float) -> list[Effect]:
        """Nobody looks who was lost while nobody led."""
        job = controller._job
        job.phase = Phase.REBUILDING
        job.adoption = Adoption(job.generation, job.involved() & job.members.alive())
        return [*newest_plan_notes(controller._recorded, job.shape.sizes)]

    monkeypatch.setattr(Controller, "_go_on", go_on)
    assert first_violation()[0] == "stuck"


def test_a_take_over_that_leaves_a_plan_untold_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("elastic.notes.newest_plan_notes", lambda recorded, sizes: [])
    found = first_violation()[0]
    assert "the journal lacks" in found and "'plan'" in found


def test_a_take_over_that_leaves_the_loss_of_a_node_untold_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mourn = Controller._mourn

    def late(
        controller: Controller, lost: Collection[Member], evidence: str, now: float
    ) -> list[Effect]:
        return [] if "began to lead" in evidence else mourn(controller, lost, evidence, now)

    monkeypatch.setattr(Controller, "_mourn", late)
    found = first_violation()[0]
    assert "the journal lacks" in found and "'failure'" in found


def test_a_node_that_is_cut_off_and_commits_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    vote = SimWorker.vote

    def alone(worker: SimWorker) -> Generator[Wait, Any, tuple[float, ...]]:
        """Whoever has lost both the others and the store takes the rest for dead."""
        try:
            return (yield from vote(worker))
        except Broken:
            agent = worker.world.agents[worker.member.device.node]
            if worker.world.store.reaches(agent.process):
                raise
            return float(worker.world.shape.global_batch_size), 0.0

    monkeypatch.setattr(SimWorker, "vote", alone)
    found = first_violation()[0]
    assert "are prepared" in found or "resumed at" in found


def test_an_agent_that_takes_its_old_workers_up_again_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: dict[SimAgent, Life] = {}
    begin = Life.begin

    def spare(life: Life) -> None:
        left[life.agent] = life

    def take_up(life: Life) -> None:
        if (before := left.pop(life.agent, None)) is not None:
            life.processes, life.ready = before.processes, before.ready
            for worker in life.processes.values():
                worker.link.wrote = partial(life.wrote, worker)
            life.changed()
        begin(life)

    monkeypatch.setattr(Life, "kill_all", spare)
    monkeypatch.setattr(Life, "begin", take_up)
    found = first_violation()[0]
    assert "are placed" in found or "changes plan" in found


def test_an_agent_that_leaves_before_it_handed_over_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Life, "drain", Life.leave)
    assert first_violation()[0].startswith("a drain alone")


def test_a_node_that_may_leave_while_it_hands_over_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dismiss = Job.dismiss

    def without_donors(job: Job) -> list[Effect]:
        placed = job.placed()
        with monkeypatch.context() as patch:
            patch.setattr(Job, "involved", lambda job: placed)
            return dismiss(job)

    monkeypatch.setattr(Job, "dismiss", without_donors)
    assert first_violation()[0].startswith("a drain alone")


def test_a_draining_node_that_is_used_again_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Membership, "leaving", lambda membership: frozenset())
    found = first_violation()[0]
    assert "which were to be avoided" in found or found.startswith("a drain alone")


def test_a_quarantined_device_that_is_used_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "_kept_out", lambda job, now: frozenset())
    assert "which were to be avoided" in first_violation()[0]


def test_a_plan_told_as_a_change_to_an_older_one_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def late(plans: Mapping[int, Plan], plan: Plan) -> Adopt | PlanChange:
        known = dict(plans)
        if len(known) > 1:
            known.popitem()
        return publication(known, plan)

    monkeypatch.setattr("elastic.job.publication", late)
    assert "not the newest one" in first_violation()[0]


def test_plans_deleted_without_a_whole_one_before_the_rest_are_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forget(decided: Job) -> list[Effect]:
        effects = forget_plans(decided)
        return [effect for effect in effects if isinstance(effect, ForgetPlan)]

    forget_plans = Job._forget_plans
    monkeypatch.setattr("elastic.job.KEPT_PLANS", 1)
    monkeypatch.setattr(Job, "_forget_plans", forget)
    assert "is gone before" in first_violation()[0]


def test_a_stall_of_one_node_that_suffices_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def one(stalls: Stalls, awaited: Collection[Member]) -> Stalled | None:
        return next((stall for m in awaited if (stall := longest(stalls, [m]))), None)

    longest = Stalls._longest
    monkeypatch.setattr(Stalls, "_longest", one)
    assert "everybody is said to wait, but" in first_violation()[0]


def test_a_node_that_goes_on_and_is_not_believed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def take(stalls: Stalls, node: int, stall: Stalled | None) -> None:
        if stall is not None:
            taken(stalls, node, stall)

    taken = Stalls.take
    monkeypatch.setattr(Stalls, "take", take)
    assert "everybody is said to wait, but" in first_violation()[0]


def test_a_stall_that_counts_after_its_generation_is_found(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def judge(news: NodeNews, stall: Stalled | None) -> bool:
        """Words of a stall outlive it by much: its generation alone tells that it is over."""
        return stall is not None and judged(news, stall)

    def of_any(stalls: Stalls, awaited: Collection[Member]) -> Stalled | None:
        for node, stall in stalls._stalled.items():
            stalls._stalled[node] = replace(stall, generation=stalls._watched)
        return longest(stalls, awaited)

    judged, longest = NodeNews.judge, Stalls._longest
    monkeypatch.setattr(NodeNews, "judge", judge)
    monkeypatch.setattr(Stalls, "_longest", of_any)
    assert "everybody is said to wait, but" in first_violation()[0]


def test_a_stall_that_nobody_breaks_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Job, "break_stall", lambda job, now: [])
    assert "is left waiting" in first_violation()[0]
