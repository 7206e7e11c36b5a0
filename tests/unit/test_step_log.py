"""Every committed step gets one line, in order, whoever died before reporting it."""

from __future__ import annotations

import pytest
from scenes import Stage, committed, job_shape, step_done

from elastic.messages import StepDone
from elastic.plan import Plan
from elastic.step_log import DIGEST_MODULUS, StepLine, StepLog
from elastic.topology import Member


@pytest.fixture
def stage() -> Stage:
    stage = Stage(job_shape())
    stage.start()
    return stage


def plans(stage: Stage) -> dict[int, Plan]:
    return stage.controller.plans


def take(log: StepLog, reports: list[StepDone]) -> list[StepLine]:
    return [line for report in reports for line in log.take(report)]


def reports(
    stage: Stage, step: int, members: list[Member] | None = None, generation: int = 1, **fields: int
) -> list[StepDone]:
    return [
        step_done(generation, member, step, 10.0 + step, **fields)
        for member in (stage.placed if members is None else members)
    ]


def test_a_line_is_due_when_all_ranks_have_reported(stage: Stage) -> None:
    log = StepLog(plans(stage))
    *early, last = reports(stage, 0)
    assert take(log, early) == []
    (line,) = log.take(last)
    assert (line.step, line.generation, line.loss, line.tokens) == (0, 1, 2.0, 64)
    assert line.degrees == ((2,), (2,)) and line.sample_digest == "cafe"
    assert line.weights_digest is None and line.replicas_equal is None
    assert log.flush() == []


def test_the_oldest_report_that_waits_is_known(stage: Stage) -> None:
    log = StepLog(plans(stage))
    assert log.waits_since is None
    for revision, report in enumerate(reports(stage, 0, stage.placed[1:]), start=7):
        log.take(report, revision)
    log.take(reports(stage, 1)[0], 20)
    assert log.waits_since == 7
    log.take(reports(stage, 0, stage.placed[:1])[0], 21)
    assert log.waits_since == 20
    assert [line.step for line in log.flush()] == [1] and log.waits_since is None


def test_seconds_run_from_the_previous_line_and_the_first_from_its_own_start(stage: Stage) -> None:
    log = StepLog(plans(stage))
    lines = take(log, reports(stage, 0)) + take(log, reports(stage, 1))
    assert [line.seconds for line in lines] == [1.0, 1.0]
    assert [line.at for line in lines] == [10.0, 11.0]


def test_a_complete_step_brings_the_incomplete_ones_before_it(stage: Stage) -> None:
    log = StepLog(plans(stage))
    assert take(log, reports(stage, 0, stage.placed[1:])) == []
    lines = take(log, reports(stage, 1))
    assert [line.step for line in lines] == [0, 1]


def test_what_is_left_at_the_end_comes_out_in_order(stage: Stage) -> None:
    log = StepLog(plans(stage))
    take(log, reports(stage, 1, stage.placed[:1]) + reports(stage, 0, stage.placed[:1]))
    assert [line.step for line in log.flush()] == [0, 1]
    assert log.flush() == []


def test_a_replica_digest_is_the_sum_of_its_slots_and_counts_replicated_tensors_once(
    stage: Stage,
) -> None:
    log = StepLog(plans(stage))
    big = DIGEST_MODULUS - 1
    (line,) = take(log, reports(stage, 0, sharded_digest=big, replicated_digest=5))
    assert line.replica_digests == ((0, f"{3:016x}"), (1, f"{3:016x}"))
    assert line.weights_digest == f"{3:016x}" and line.replicas_equal is True


def test_replicas_that_differ_are_told_apart(stage: Stage) -> None:
    log = StepLog(plans(stage))
    every = reports(stage, 0, stage.placed[:3], sharded_digest=1, replicated_digest=5)
    every += reports(stage, 0, stage.placed[3:], sharded_digest=2, replicated_digest=5)
    (line,) = take(log, every)
    assert line.replicas_equal is False


def test_slots_that_disagree_on_replicated_tensors_make_their_replica_differ(stage: Stage) -> None:
    log = StepLog(plans(stage))
    every = reports(stage, 0, stage.placed[:3], sharded_digest=1, replicated_digest=5)
    every += reports(stage, 0, stage.placed[3:], sharded_digest=1, replicated_digest=6)
    (line,) = take(log, every)
    assert dict(line.replica_digests)[1] == "differs-within-replica"
    assert line.replicas_equal is False


def test_a_rank_that_died_after_its_commit_leaves_only_its_replica_unknown(stage: Stage) -> None:
    log = StepLog(plans(stage))
    take(log, reports(stage, 0, stage.placed[1:], sharded_digest=1, replicated_digest=5))
    (line,) = log.flush()
    assert [replica for replica, _ in line.replica_digests] == [1]
    assert line.replicas_equal is True and line.weights_digest == f"{7:016x}"


def test_a_redone_step_has_one_line_of_the_later_generation(stage: Stage) -> None:
    log = StepLog(plans(stage))
    dead, *alive = stage.placed
    take(log, reports(stage, 4, [dead]))
    stage.failed(dead)
    stage.answers({member: committed(3) for member in alive})
    (line,) = take(log, reports(stage, 4, alive, generation=2))
    assert (line.generation, line.degrees) == (2, ((1,), (2,)))


def test_a_report_of_an_unknown_generation_is_left_out(stage: Stage) -> None:
    log = StepLog(plans(stage))
    take(log, reports(stage, 0, generation=7))
    assert log.flush() == []


def test_two_ranks_may_speak_for_all(stage: Stage) -> None:
    log = StepLog(plans(stage))
    first, *others, last = (
        step_done(1, member, 0, 10.0, awaited=member in (stage.placed[0], stage.placed[-1]))
        for member in stage.placed
    )
    assert take(log, [first, *others]) == []
    (line,) = log.take(last)
    assert (line.step, line.loss) == (0, 2.0)
    assert take(log, others) == [] and log.flush() == []


def test_nobody_speaks_for_others_where_digests_are_to_be_compared(stage: Stage) -> None:
    log = StepLog(plans(stage))
    every = [
        step_done(1, member, 0, 10.0, awaited=True, sharded_digest=1, replicated_digest=5)
        for member in stage.placed
    ]
    assert take(log, every[:-1]) == []
    (line,) = log.take(every[-1])
    assert line.replicas_equal is True


def test_a_dropped_attempt_of_one_speaker_is_no_line(stage: Stage) -> None:
    log = StepLog(plans(stage))
    dead, *alive = stage.placed
    assert take(log, [step_done(1, dead, 4, 10.0, awaited=True)]) == []
    stage.failed(dead)
    stage.answers({member: committed(3) for member in alive})
    speakers = [step_done(2, member, 4, 11.0, awaited=True) for member in (alive[0], alive[-1])]
    assert log.take(speakers[0]) == []
    (line,) = log.take(speakers[1])
    assert line.generation == 2


def test_a_late_report_brings_no_second_line(stage: Stage) -> None:
    log = StepLog(plans(stage))
    take(log, reports(stage, 0, stage.placed[1:]))
    assert [line.step for line in take(log, reports(stage, 1))] == [0, 1]
    assert take(log, reports(stage, 0)) == [] and log.flush() == []
