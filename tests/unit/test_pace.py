"""How fast replicas are: the slowest slot counts, new layouts start anew, oddities are left out."""

from __future__ import annotations

from dataclasses import replace

import pytest
from scenes import Stage, committed, job_shape, step_done

from elastic.messages import NodeProgress
from elastic.pace import NEWEST_WEIGHT, PaceLog
from elastic.topology import Member
from elastic.workload import SplitBatchBy


@pytest.fixture
def stage() -> Stage:
    """Two replicas of two slots, 4 samples each."""
    stage = Stage(job_shape())
    stage.start()
    return stage


def of_replica(stage: Stage, replica: int) -> list[Member]:
    return [a.member for a in stage.plan.placement if a.coordinate.replica == replica]


def report(
    log: PaceLog, stage: Stage, step: int, replica: int, *seconds: float, generation: int = 1
) -> None:
    """The slots of `replica` report, each with its seconds."""
    for member, each in zip(of_replica(stage, replica), seconds, strict=False):
        log.take(step_done(generation, member, step, 0.0, compute_seconds=each))


def seconds_per_sample(log: PaceLog) -> dict[int, float]:
    return {replica: pace.seconds_per_sample for replica, pace in log.paces.items()}


def test_a_replica_is_as_slow_as_its_slowest_slot(stage: Stage) -> None:
    log = PaceLog(stage.controller.plans)
    report(log, stage, 1, 0, 8.0, 4.0)
    report(log, stage, 1, 1, 2.0)
    assert seconds_per_sample(log) == {0: 2.0}
    report(log, stage, 1, 1, 2.0, 6.0)
    assert seconds_per_sample(log) == {0: 2.0, 1: 1.5}
    assert log.paces[0].layout == stage.plan.layout.replica(0)


def test_the_first_step_of_a_generation_does_not_count(stage: Stage) -> None:
    log = PaceLog(stage.controller.plans)
    report(log, stage, 0, 0, 80.0, 80.0)
    assert log.paces == {}


def test_a_step_that_a_generation_only_settles_does_not_count(stage: Stage) -> None:
    """Survivors commit the interrupted step in the new generation, even if their replica ends."""
    log = PaceLog(stage.controller.plans)
    lost = [stage.member(1, 0), stage.member(1, 1)]
    for member in lost:
        stage.failed(member)
    stage.answers({m: committed(3) for m in stage.placed if m not in lost})
    assert len(stage.plan.layout.replicas) == 1
    log.take(step_done(stage.plan.generation, lost[0], 3, 0.0))
    assert log.paces == {}


def test_newer_steps_enter_an_average(stage: Stage) -> None:
    log = PaceLog(stage.controller.plans)
    report(log, stage, 1, 0, 4.0, 4.0)
    report(log, stage, 2, 0, 8.0, 8.0)
    assert seconds_per_sample(log)[0] == pytest.approx(1.0 + NEWEST_WEIGHT)
    for step in range(3, 100):
        report(log, stage, step, 0, 8.0, 8.0)
    assert seconds_per_sample(log)[0] == pytest.approx(2.0)


def test_reports_may_come_in_any_order_and_incomplete_steps_are_forgotten(stage: Stage) -> None:
    log = PaceLog(stage.controller.plans)
    first, second = of_replica(stage, 0)
    for member, step in ((first, 1), (first, 2), (second, 2), (second, 1)):
        log.take(step_done(1, member, step, 0.0, compute_seconds=4.0 * step))
    # Step 1 was overtaken; its late report alone is no step.
    assert seconds_per_sample(log) == {0: 2.0}


def test_a_new_layout_starts_anew_and_until_then_the_old_figure_stands(stage: Stage) -> None:
    log = PaceLog(stage.controller.plans)
    report(log, stage, 1, 0, 4.0, 4.0)
    before = stage.plan.layout.replica(0)
    lost = stage.member(0, 1)
    stage.failed(lost)
    stage.answers({m: committed(1) for m in stage.placed if m != lost})
    assert stage.plan.resume_step == 2 and stage.plan.batch_split == (3, 5)
    report(log, stage, 2, 0, 99.0, generation=2)
    assert (log.paces[0].seconds_per_sample, log.paces[0].layout) == (1.0, before)
    report(log, stage, 3, 0, 6.0, generation=2)
    assert (log.paces[0].seconds_per_sample, log.paces[0].layout) == (
        2.0,
        stage.plan.layout.replica(0),
    )


def test_all_stages_of_a_replica_report_before_a_step_counts() -> None:
    stage = Stage(job_shape(stages=2))
    stage.start()
    log = PaceLog(stage.controller.plans)
    report(log, stage, 1, 0, 1.0, 1.0, 1.0)
    assert log.paces == {}
    report(log, stage, 1, 0, 1.0, 1.0, 1.0, 12.0)
    assert seconds_per_sample(log) == {0: 3.0}


def test_what_cannot_be_a_measurement_is_left_out(stage: Stage) -> None:
    log = PaceLog(stage.controller.plans)
    report(log, stage, 1, 0, 4.0, 4.0, generation=7)
    report(log, stage, 1, 0, 0.0, 0.0)
    assert log.paces == {}


def test_a_slow_replica_gets_fewer_samples_after_the_next_failure() -> None:
    """The controller measures, and hands what it found to the planner."""
    slow = Stage(replace(job_shape(replicas=3), split_batch_by=SplitBatchBy.SPEED))
    slow.start()
    assert slow.plan.batch_split == (3, 3, 2)
    for step in range(3):
        notes = tuple(
            step_done(1, m, step, 0.0, compute_seconds=9.0 if m.device.node == 0 else 2.0)
            for m in slow.placed
        )
        slow.handle(f"step {step}", NodeProgress(0, notes))
    lost = slow.member(2, 0)
    slow.failed(lost)
    slow.answers({m: committed(2) for m in slow.placed if m != lost})
    # Seconds per sample: 3, 2/3, and 1 at TP2, hence nearly 2 at TP1.
    assert slow.plan.batch_split == (1, 5, 2) and "by speed" in slow.plan.reason
