"""Signals become failures that name device, kind, severity and evidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from health.classify import (
    HeartbeatLost,
    NoProgress,
    NotReady,
    ProcessExited,
    Signal,
    Stopped,
    StoppedAnswering,
    classify,
)
from health.events import DeviceId, FailureEvent, FaultKind, Severity
from health.heartbeat import Activity
from health.policy import Deadline
from health.probes.process import LOG_TAIL_CHARACTERS, read_exit

DEVICE = DeviceId(2, 5)


def test_a_failure_names_everything() -> None:
    exited = ProcessExited(DEVICE, 3, -9, "")
    assert classify(exited, device_healthy=False, now=7.5) == FailureEvent(
        id="node2/5#3",
        device=DEVICE,
        incarnation=3,
        kind=FaultKind.PROCESS_EXIT,
        severity=Severity.FATAL,
        at=7.5,
        evidence="process killed by SIGKILL",
    )


@pytest.mark.parametrize(
    ("status", "words", "evidence"),
    [
        (-9, "", "process killed by SIGKILL"),
        (-11, "", "process killed by SIGSEGV"),
        (-250, "", "process killed by signal 250"),
        (0, "", "process exited with code 0"),
        (1, "", "process exited with code 1"),
        (1, "ValueError: x", "process exited with code 1; its log ends: ValueError: x"),
    ],
)
def test_the_evidence_of_an_exit_is_what_a_person_wants_to_read(
    status: int, words: str, evidence: str
) -> None:
    event = classify(ProcessExited(DEVICE, 1, status, words), device_healthy=True, now=0.0)
    assert (event.kind, event.evidence) == (FaultKind.PROCESS_EXIT, evidence)


def test_a_recorded_exception_says_more_than_the_log() -> None:
    exited = ProcessExited(DEVICE, 1, 1, "some warning", raised="ValueError: x")
    event = classify(exited, device_healthy=True, now=0.0)
    assert event.evidence == "process exited with code 1; it raised ValueError: x"


HANGS: dict[Signal, tuple[FaultKind, str]] = {
    StoppedAnswering(DEVICE, 1, "stop", 2.5): (
        FaultKind.HANG,
        "did not stop within 2.5 s and was killed",
    ),
    NotReady(DEVICE, 1, 120.04): (FaultKind.HANG, "not ready 120 s after its start"),
    HeartbeatLost(DEVICE, 1, 3.125, 3.0, Activity.COMPUTING, 17): (
        FaultKind.HEARTBEAT_LOST,
        "no heartbeat for 3.12 s (limit 3 s); the last one told of computing in step 17",
    ),
    Stopped(DEVICE, 1, 0.5, 1.25): (
        FaultKind.HANG,
        "stopped (state T) for 0.5 s, no heartbeat for 1.25 s",
    ),
    NoProgress(DEVICE, 1, Activity.VOTE, 17, 12.5, Deadline(10.0, "floor")): (
        FaultKind.HANG,
        "vote in step 17 took 12.5 s of its own time, without waiting for anybody; "
        "deadline 10 s (floor)",
    ),
}


@pytest.mark.parametrize("signal", HANGS)
def test_the_evidence_of_a_hang_has_its_numbers(signal: Signal) -> None:
    event = classify(signal, device_healthy=False, now=0.0)
    assert (event.kind, event.evidence) == HANGS[signal]


@pytest.mark.parametrize(
    ("healthy", "severity"), [(True, Severity.TRANSIENT), (False, Severity.FATAL)]
)
@pytest.mark.parametrize("signal", [ProcessExited(DEVICE, 1, 1, ""), *HANGS])
def test_the_device_decides_how_bad_it_is(
    signal: Signal, healthy: bool, severity: Severity
) -> None:
    assert classify(signal, device_healthy=healthy, now=0.0).severity is severity


def test_ids_differ_between_incarnations_and_devices() -> None:
    ids = {
        classify(ProcessExited(DeviceId(n, i), k, 1, ""), device_healthy=True, now=0.0).id
        for n in range(2)
        for i in range(2)
        for k in range(2)
    }
    assert len(ids) == 8


@pytest.mark.parametrize(
    ("status", "log", "words"),
    [
        (1, "first\nlast\n\n", "last"),
        (1, "", ""),
        (-9, "first\nlast\n", ""),
        (1, "x" * 1000, "x" * LOG_TAIL_CHARACTERS),
    ],
)
def test_the_probe_reads_the_last_line_of_a_process_that_ended_itself(
    tmp_path: Path, status: int, log: str, words: str
) -> None:
    path = tmp_path / "worker.log"
    path.write_text(log)
    assert read_exit(DEVICE, 4, status, path) == ProcessExited(DEVICE, 4, status, words)


def test_the_probe_does_without_a_log(tmp_path: Path) -> None:
    assert read_exit(DEVICE, 4, 1, tmp_path / "none.log").last_words == ""
