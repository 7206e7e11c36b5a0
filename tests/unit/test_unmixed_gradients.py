"""Whose gradients a step that is given up holds: what is launched when, and what a worker keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from scenes import Stage, job_shape

from elastic.heart import Heart
from elastic.messages import Quiesce
from elastic.session import StepPoint
from elastic.worker import StepAborted, Worker
from ntp import grad_sync
from ntp.buckets import Bucket
from ntp.grad_sync import GradientSync, _Bound
from ntp.process_groups import Link, ProcessGroups
from ntp.stable_group import GroupSevered

BUCKETS = tuple(Bucket((name,), False, turn) for turn, name in enumerate("xy"))


class Log:
    """What happens, in order, on the stream that is current."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.current = "backward"

    def __call__(self, line: str) -> None:
        self.lines.append(f"{self.current}: {line}")

    def take(self) -> list[str]:
        """What happened since the last time."""
        lines, self.lines = self.lines, []
        return lines


class FakeStream:
    """What of torch's streams is used."""

    def __init__(self, log: Log, name: str) -> None:
        self.name = name
        self._log = log

    def wait_stream(self, other: FakeStream) -> None:
        self._log.lines.append(f"{self.name} waits for {other.name}")


class FakeBucket:
    """A bucket of two steps; `breaks` at the first."""

    def __init__(self, log: Log, name: str, breaks: bool = False) -> None:
        self._log, self._name, self._breaks = log, name, breaks

    def steps(self, answers: list[Any]) -> Iterator[None]:
        self._log(f"{self._name} gives")
        if self._breaks:
            raise GroupSevered("a peer is gone")
        yield
        self._log(f"{self._name} takes")


class Rig:
    """A sync of two buckets, x and y, on an accelerator of its own kind or on none."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, *, accelerator: bool, breaks: bool = False
    ) -> None:
        self.log = log = Log()
        self.held = False
        backward, beside = FakeStream(log, "backward"), FakeStream(log, "beside")

        @contextmanager
        def on(stream: FakeStream) -> Iterator[None]:
            log.current = stream.name
            yield
            log.current = "backward"

        cuda = SimpleNamespace(current_stream=lambda: backward, stream=on)
        monkeypatch.setattr(grad_sync.torch, "cuda", cuda)
        syncs = tuple(FakeBucket(log, name, breaks) for name in "xy")
        gradients = torch.zeros(2)
        bound: Any = _Bound(gradients, BUCKETS, syncs, beside if accelerator else None)  # type: ignore[arg-type]
        monkeypatch.setattr(GradientSync, "_bind", lambda sync, _: bound)
        nothing: Any = None
        self.sync = GradientSync(
            nothing, nothing, nothing, nothing, nothing, nothing, True, bucket_bytes=1
        )
        self.sync.begin(gradients, 1, lambda: self.held)


def test_without_a_step_there_are_no_gradients_to_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, accelerator=False)
    assert rig.sync.unmixed
    rig.sync.abandon()
    assert not rig.sync.unmixed


def test_over_gloo_gradients_are_unmixed_until_finish_takes_what_others_sent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, accelerator=False)
    rig.sync.ready("x")
    rig.sync.ready("y")
    assert rig.log.take() == ["backward: x gives", "backward: y gives"]
    assert rig.sync.unmixed
    between: list[bool] = []
    rig.sync.finish(lambda: between.append(rig.sync.unmixed))
    assert rig.log.take() == ["backward: x takes", "backward: y takes"]
    assert between == [False] and not rig.sync.unmixed


def test_over_gloo_a_launch_that_breaks_mixes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = Rig(monkeypatch, accelerator=False, breaks=True)
    rig.sync.ready("x")
    rig.sync.ready("y")
    assert rig.log.take() == ["backward: x gives"], "nothing follows a broken bucket"
    assert rig.sync.unmixed
    with pytest.raises(GroupSevered):
        rig.sync.finish()
    assert not rig.sync.unmixed


def test_on_an_accelerator_a_launched_bucket_takes_all_steps_beside_backward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, accelerator=True)
    assert rig.sync.unmixed
    rig.sync.ready("x")
    # What backward has computed so far comes first, and y is not complete.
    assert rig.log.take() == ["beside waits for backward", "beside: x gives", "beside: x takes"]
    assert not rig.sync.unmixed
    rig.sync.finish(lambda: rig.log("between"))
    assert rig.log.take() == [
        "beside waits for backward",
        "beside: y gives",
        "beside: y takes",
        "backward: between",
        "backward waits for beside",
    ]


def test_on_an_accelerator_a_launch_that_breaks_may_have_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, accelerator=True, breaks=True)
    rig.sync.ready("x")
    assert not rig.sync.unmixed


def test_on_an_accelerator_what_is_under_way_ends_before_a_step_is_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, accelerator=True)
    rig.sync.ready("x")
    rig.log.take()
    rig.sync.abandon()
    assert rig.log.take() == ["backward waits for beside"]


@pytest.mark.parametrize("accelerator", [False, True])
def test_a_held_step_launches_nothing_and_stays_unmixed(
    monkeypatch: pytest.MonkeyPatch, accelerator: bool
) -> None:
    rig = Rig(monkeypatch, accelerator=accelerator)
    rig.held = True
    rig.sync.ready("x")
    rig.sync.ready("y")
    assert rig.log.take() == [] and rig.sync.unmixed


def test_on_an_accelerator_a_step_that_is_held_too_late_is_mixed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rig = Rig(monkeypatch, accelerator=True)
    rig.sync.ready("x")
    rig.held = True
    rig.log.take()
    rig.sync.ready("y")
    assert rig.log.take() == [] and not rig.sync.unmixed


class Wire:
    """A link that nobody listens to."""

    def send(self, message: Any) -> None:
        """Say nothing."""


def computing() -> Worker:
    """A worker in its first step."""
    stage = Stage(job_shape())
    stage.start()
    wire, member = Wire(), stage.member(1, 0)
    heart = Heart(member, wire, 1.0)  # type: ignore[arg-type]
    groups = ProcessGroups(Link("gloo", "127.0.0.1", 1.0, 1.0))
    worker = Worker(member, wire, heart, groups, torch.device("cpu"))  # type: ignore[arg-type]
    worker.join(stage.plan, stage.placed.index(member))
    worker.begin_step()
    return worker


@pytest.mark.parametrize(("unmixed", "kept"), [(True, 1), (False, 0)])
def test_a_worker_keeps_the_gradients_of_a_step_that_is_given_up_only_if_they_are_unmixed(
    unmixed: bool, kept: int
) -> None:
    worker = computing()
    worker._hear(Quiesce(2, True, (), "a device failed"))
    with pytest.raises(StepAborted, match="a device failed"):
        worker.reach_boundary(unmixed=unmixed)
    assert worker.generation == 1 and worker.session.kept == kept
    assert worker.session.point is StepPoint.COMPUTING


@pytest.mark.parametrize("unmixed", [True, False])
@pytest.mark.parametrize("quiesce", [None, Quiesce(2, False, (), ""), Quiesce(1, True, (), "")])
def test_a_step_that_goes_on_keeps_nothing_apart(quiesce: Quiesce | None, unmixed: bool) -> None:
    worker = computing()
    if quiesce is not None:
        worker._hear(quiesce)
    worker.reach_boundary(unmixed=unmixed)
    assert worker.session.kept == 0
    worker.session = worker.session.prepare()
