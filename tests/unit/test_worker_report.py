"""What a worker reports of a step: how long it computed, without the wait for others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from scenes import Stage, job_shape

from elastic import worker as worker_module
from elastic.heart import Heart
from elastic.messages import StepDone
from elastic.trainable import StepFigures
from elastic.worker import Worker

VOTE = (1.0, 2.0)


class Wire:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


class Nothing:
    """A trainable whose steps are empty."""

    def apply(self, step: int, vote: tuple[float, ...]) -> None:
        assert vote == VOTE

    def figures(self, step: int, vote: tuple[float, ...]) -> StepFigures:
        return StepFigures(2.0, 1.0, 64, "cafe", None, None)


def test_the_report_says_how_long_the_step_took_up_to_the_boundary(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stage = Stage(job_shape())
    stage.start()
    wire, member = Wire(), stage.member(1, 0)
    heart = Heart(member, wire, 1.0)  # type: ignore[arg-type]
    worker = Worker(member, wire, heart, None, torch.device("cpu"))  # type: ignore[arg-type]
    worker.plan = stage.plan
    clock = iter([10.0, 12.5])
    monkeypatch.setattr(worker_module.time, "perf_counter", lambda: next(clock))
    worker.begin_step()
    worker.reach_boundary(unmixed=False)
    worker.session = worker.session.prepare().hold_vote(VOTE)
    worker.commit(Nothing(), VOTE)  # type: ignore[arg-type]
    (report,) = wire.sent
    assert isinstance(report, StepDone)
    assert (report.member, report.replica, report.step) == (member, 1, 0)
    assert report.compute_seconds == 2.5
