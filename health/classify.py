"""Signals -> failures.

Pure: a signal and the policy go in, a FailureEvent comes out.
"""

from __future__ import annotations

import signal as signals
from dataclasses import dataclass

from health.events import DeviceId, FailureEvent, FaultKind, Severity


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A worker process ended although nobody asked it to.

    `status` is what multiprocessing reports: an exit code, or minus the number of the signal.
    `last_words` is the end of its log, empty where it left none.
    """

    device: DeviceId
    incarnation: int
    status: int
    last_words: str


@dataclass(frozen=True, slots=True)
class StoppedAnswering:
    """A worker did not do what it was told within `waited_seconds`, and was killed for it."""

    device: DeviceId
    incarnation: int
    asked_to: str
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class NodeGone:
    """The agent of the worker's node is gone, and the worker with it."""

    device: DeviceId
    incarnation: int
    evidence: str


Signal = ProcessExited | StoppedAnswering | NodeGone


def classify(signal: Signal, *, device_healthy: bool, now: float) -> FailureEvent:
    """The failure that `signal` means. `now` in seconds since the epoch.

    `device_healthy`: no probe holds anything against the device, so only the process failed.
    """
    match signal:
        case ProcessExited(device, incarnation, status, last_words):
            kind = FaultKind.PROCESS_EXIT
            evidence = _describe_exit(status)
            if last_words:
                evidence += f"; its log ends: {last_words}"
        case StoppedAnswering(device, incarnation, asked_to, waited):
            kind = FaultKind.HANG
            evidence = f"did not {asked_to} within {waited:g} s and was killed"
        case NodeGone(device, incarnation, evidence):
            kind = FaultKind.NODE_LOST
    severity = Severity.TRANSIENT if device_healthy else Severity.FATAL
    return FailureEvent(
        id=f"{device}#{incarnation}",
        device=device,
        incarnation=incarnation,
        kind=kind,
        severity=severity,
        at=now,
        evidence=evidence,
    )


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"process exited with code {status}"
    try:
        name = signals.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"process killed by {name}"
