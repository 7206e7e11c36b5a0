"""What a worker reports of a step: how long it computed, without the wait for others; and when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import Stage, job_shape

from elastic import worker as worker_module
from elastic.heart import Heart
from elastic.messages import StepDone
from elastic.topology import Member
from elastic.trainable import StepFigures
from elastic.worker import Worker

VOTE = (1.0, 2.0)


class Wire:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.kept: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)

    def send_later(self, message: Any) -> None:
        self.kept.append(message)


class Nothing:
    """A trainable whose steps are empty."""

    def __init__(self, sharded_digest: int | None) -> None:
        self._sharded_digest = sharded_digest

    def apply(self, step: int, vote: tuple[float, ...]) -> None:
        assert vote == VOTE

    def figures(self, step: int, vote: tuple[float, ...]) -> StepFigures:
        return StepFigures(2.0, 1.0, 64, "cafe", self._sharded_digest, None)


def commit_a_step(
    replica: int, slot: int, sharded_digest: int | None = None
) -> tuple[Wire, Member]:
    """What the worker in a place says of its first step, and who it is."""
    stage = Stage(job_shape())
    stage.start()
    wire, member = Wire(), stage.member(replica, slot)
    heart = Heart(member, wire, 1.0)  # type: ignore[arg-type]
    worker = Worker(member, wire, heart, None, torch.device("cpu"))  # type: ignore[arg-type]
    worker.join(stage.plan, stage.placed.index(member))
    worker.begin_step()
    worker.reach_boundary(unmixed=False)
    worker.session = worker.session.prepare().hold_vote(VOTE)
    worker.commit(Nothing(sharded_digest), VOTE)  # type: ignore[arg-type]
    return wire, member


def test_the_report_says_how_long_the_step_took_up_to_the_boundary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(worker_module.time, "perf_counter", lambda: next(clock))
    wire, member = commit_a_step(1, 0)
    (report,) = wire.kept
    assert isinstance(report, StepDone)
    assert (report.member, report.replica, report.step) == (member, 1, 0)
    assert report.compute_seconds == 2.5


@pytest.mark.parametrize(
    ("replica", "slot", "sharded_digest", "at_once"),
    [(0, 0, None, True), (1, 1, None, True), (1, 0, None, False), (1, 0, 7, True)],
)
def test_only_a_report_that_somebody_waits_for_is_sent_at_once(
    replica: int, slot: int, sharded_digest: int | None, at_once: bool
) -> None:
    wire, _ = commit_a_step(replica, slot, sharded_digest)
    assert (len(wire.sent), len(wire.kept)) == ((1, 0) if at_once else (0, 1))
