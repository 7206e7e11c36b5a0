"""An injected fault strikes whom, when and how its file says, once, and says so first."""

from __future__ import annotations

import os
import signal
from typing import Any

import pytest

from elastic import fault_hook
from elastic.fault_hook import SLOW_SECONDS, FaultHook, InjectedFault
from elastic.faults import (
    RECOVERY_PHASES,
    Fault,
    FaultInjection,
    FaultPhase,
    NodeTarget,
    SlotTarget,
)
from elastic.topology import Coordinate

HERE = Coordinate(1, 0, 2)


class Exited(BaseException):
    """Stands for the end of the process."""


class Told:
    """Collects announcements and, in order with them, what was done to the process."""

    def __init__(self) -> None:
        self.seen: list[object] = []

    def announce(self, fault: Fault, step: int, phase: FaultPhase) -> None:
        self.seen.append((fault.id, step, phase))


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> Told:
    told = Told()

    def leave(code: int) -> None:
        told.seen.append(code)
        raise Exited

    def kill(pid: int, number: int) -> None:
        told.seen.append((pid, number))
        raise Exited

    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(os, "kill", kill)
    return told


def fault(**changes: Any) -> Fault:
    fields: dict[str, Any] = {
        "id": 1,
        "at_step": 3,
        "at_seconds": None,
        "phase": FaultPhase.VOTE,
        "target": SlotTarget(replica=1, slot=2),
        "kind": FaultInjection.RAISE,
        "heal_at_step": None,
    }
    return Fault(**(fields | changes))


def hook(told: Told, *faults: Fault, node: int = 0) -> FaultHook:
    return FaultHook(faults, node, 100.0, told.announce)


@pytest.mark.parametrize(
    ("where", "step", "phase", "strikes"),
    [
        (HERE, 3, FaultPhase.VOTE, True),
        (HERE, 2, FaultPhase.VOTE, False),
        (HERE, 4, FaultPhase.VOTE, False),
        (HERE, 3, FaultPhase.OPTIMIZER, False),
        (Coordinate(1, 0, 1), 3, FaultPhase.VOTE, False),
        (Coordinate(0, 0, 2), 3, FaultPhase.VOTE, False),
        (Coordinate(1, 1, 2), 3, FaultPhase.VOTE, False),
    ],
)
def test_step_phase_and_place_must_all_fit(
    told: Told, where: Coordinate, step: int, phase: FaultPhase, strikes: bool
) -> None:
    assert (hook(told, fault()).due(where, step, phase, 100.0) is not None) is strikes


@pytest.mark.parametrize("phase", FaultPhase)
def test_a_fault_without_a_phase_strikes_in_any_of_a_step(told: Told, phase: FaultPhase) -> None:
    struck = hook(told, fault(phase=None)).due(HERE, 3, phase, 100.0)
    assert struck == (None if phase in RECOVERY_PHASES else fault(phase=None))


@pytest.mark.parametrize("phase", RECOVERY_PHASES)
@pytest.mark.parametrize(("step", "strikes"), [(2, False), (3, True), (9, True)])
def test_a_fault_in_a_recovery_waits_for_one(
    told: Told, phase: FaultPhase, step: int, strikes: bool
) -> None:
    one = hook(told, fault(phase=phase))
    assert one.due(HERE, 3, FaultPhase.VOTE, 100.0) is None
    assert (one.due(HERE, step, phase, 100.0) is not None) is strikes


@pytest.mark.parametrize(("now", "strikes"), [(104.9, False), (105.0, True), (200.0, True)])
def test_a_fault_by_time_counts_from_the_start(told: Told, now: float, strikes: bool) -> None:
    timed = fault(at_step=None, at_seconds=5.0)
    assert (hook(told, timed).due(HERE, 77, FaultPhase.VOTE, now) is not None) is strikes


@pytest.mark.parametrize(("node", "strikes"), [(0, False), (3, True)])
def test_a_node_fault_strikes_every_worker_of_its_node(
    told: Told, node: int, strikes: bool
) -> None:
    one = hook(told, fault(target=NodeTarget(3)), node=node)
    for where in (HERE, Coordinate(0, 0, 0)):
        assert (one.due(where, 3, FaultPhase.VOTE, 100.0) is not None) is strikes


def test_workers_leave_a_partition_to_the_launcher(told: Told) -> None:
    cut = fault(kind=FaultInjection.PARTITION, target=NodeTarget(3), phase=None)
    assert hook(told, cut, node=3).due(HERE, 3, FaultPhase.VOTE, 100.0) is None


def test_a_raised_fault_is_announced_and_strikes_once(told: Told) -> None:
    one = hook(told, fault())
    with pytest.raises(InjectedFault, match="fault 1"):
        one.strike(HERE, 3, FaultPhase.VOTE, 100.0)
    assert told.seen == [(1, 3, FaultPhase.VOTE)] and one.is_empty
    one.strike(HERE, 3, FaultPhase.VOTE, 100.0)
    assert len(told.seen) == 1


def test_what_struck_another_strikes_nobody_else(told: Told) -> None:
    one = hook(told, fault(id=1), fault(id=2), fault(id=3, target=NodeTarget(0)))
    one.forget({1, 3})
    for number in (2, 3):
        with pytest.raises(InjectedFault, match=f"fault {number}"):
            one.strike(HERE, 3, FaultPhase.VOTE, 100.0)
    assert one.is_empty


def test_nothing_due_is_nothing_done(told: Told) -> None:
    one = hook(told, fault())
    one.strike(HERE, 2, FaultPhase.VOTE, 100.0)
    assert told.seen == [] and not one.is_empty


@pytest.mark.parametrize(
    ("changes", "done"),
    [
        ({"kind": FaultInjection.EXIT}, 1),
        ({"kind": FaultInjection.EXIT, "args": (("code", 7),)}, 7),
        ({"kind": FaultInjection.SIGKILL}, (os.getpid(), signal.SIGKILL)),
    ],
)
def test_a_process_says_that_it_ends_before_it_ends(
    told: Told, changes: dict[str, Any], done: object
) -> None:
    with pytest.raises(Exited):
        hook(told, fault(**changes)).strike(HERE, 3, FaultPhase.VOTE, 100.0)
    assert told.seen == [(1, 3, FaultPhase.VOTE), done]


@pytest.mark.parametrize(("args", "seconds"), [((), SLOW_SECONDS), ((("seconds", 0.25),), 0.25)])
def test_a_slow_worker_is_held_up_for_its_seconds(
    told: Told,
    monkeypatch: pytest.MonkeyPatch,
    args: tuple[tuple[str, float], ...],
    seconds: float,
) -> None:
    monkeypatch.setattr(fault_hook.time, "sleep", told.seen.append)
    slow = fault(kind=FaultInjection.SLOW, args=args)
    hook(told, slow).strike(HERE, 3, FaultPhase.VOTE, 100.0)
    assert told.seen == [(1, 3, FaultPhase.VOTE), seconds]


def test_the_first_of_several_faults_strikes_first(told: Told) -> None:
    one = hook(told, fault(id=1), fault(id=2))
    for number in (1, 2):
        with pytest.raises(InjectedFault, match=f"fault {number}"):
            one.strike(HERE, 3, FaultPhase.VOTE, 100.0)
    assert one.is_empty
