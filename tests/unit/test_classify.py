"""Signals become failures that name device, kind, severity and evidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from health.classify import ProcessExited, StoppedAnswering, classify
from health.events import DeviceId, FailureEvent, FaultKind, Severity
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


def test_a_worker_that_stopped_answering_hangs() -> None:
    event = classify(StoppedAnswering(DEVICE, 1, "stop", 2.5), device_healthy=False, now=0.0)
    assert event.kind is FaultKind.HANG
    assert event.evidence == "did not stop within 2.5 s and was killed"


@pytest.mark.parametrize(
    ("healthy", "severity"), [(True, Severity.TRANSIENT), (False, Severity.FATAL)]
)
@pytest.mark.parametrize(
    "signal", [ProcessExited(DEVICE, 1, 1, ""), StoppedAnswering(DEVICE, 1, "stop", 1.0)]
)
def test_the_device_decides_how_bad_it_is(
    signal: ProcessExited | StoppedAnswering, healthy: bool, severity: Severity
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
