"""Signals -> failures.

Pure: a signal and the policy go in, a FailureEvent comes out.
"""

from __future__ import annotations

import signal as signals
from dataclasses import dataclass

from health.events import DeviceId, FailureEvent, FaultKind, Severity
from health.heartbeat import Activity
from health.policy import Deadline


@dataclass(frozen=True, slots=True)
class ProcessExited:
    """A worker process ended although nobody asked it to.

    `status` is what multiprocessing reports: an exit code, or minus the number of the signal.
    `last_words` is the end of its log, empty where it left none; `raised` the exception that ended
    it, as its error file has it.
    """

    device: DeviceId
    incarnation: int
    status: int
    last_words: str
    raised: str = ""


@dataclass(frozen=True, slots=True)
class StoppedAnswering:
    """A worker did not do what it was told within `waited_seconds`, and was killed for it."""

    device: DeviceId
    incarnation: int
    asked_to: str
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class NotReady:
    """A worker process sent no heartbeat at all in the `waited_seconds` since its start."""

    device: DeviceId
    incarnation: int
    waited_seconds: float


@dataclass(frozen=True, slots=True)
class HeartbeatLost:
    """A worker's heartbeats ceased for `silent_seconds`; the last told of `activity` in `step`."""

    device: DeviceId
    incarnation: int
    silent_seconds: float
    limit_seconds: float
    activity: Activity
    step: int


@dataclass(frozen=True, slots=True)
class Stopped:
    """A worker process is stopped, by SIGSTOP or a debugger, and has been for too long."""

    device: DeviceId
    incarnation: int
    stopped_seconds: float
    silent_seconds: float


@dataclass(frozen=True, slots=True)
class NoProgress:
    """A worker lives and waits for nobody, but its activity takes longer than it ever should.

    `own_seconds` is the activity's own time (see `health.heartbeat`).
    """

    device: DeviceId
    incarnation: int
    activity: Activity
    step: int
    own_seconds: float
    deadline: Deadline


@dataclass(frozen=True, slots=True)
class NodeGone:
    """The agent of the worker's node is gone, and the worker with it."""

    device: DeviceId
    incarnation: int
    evidence: str


Signal = (
    ProcessExited | StoppedAnswering | NotReady | HeartbeatLost | Stopped | NoProgress | NodeGone
)


def classify(signal: Signal, *, device_healthy: bool, now: float) -> FailureEvent:
    """The failure that `signal` means. `now` in seconds since the epoch.

    `device_healthy`: no probe holds anything against the device, so only the process failed.
    """
    kind, evidence = _kind_and_evidence(signal)
    return FailureEvent(
        id=f"{signal.device}#{signal.incarnation}",
        device=signal.device,
        incarnation=signal.incarnation,
        kind=kind,
        severity=Severity.TRANSIENT if device_healthy else Severity.FATAL,
        at=now,
        evidence=evidence,
    )


def _kind_and_evidence(signal: Signal) -> tuple[FaultKind, str]:
    match signal:
        case ProcessExited():
            evidence = _describe_exit(signal.status)
            if signal.raised:
                evidence += f"; it raised {signal.raised}"
            elif signal.last_words:
                evidence += f"; its log ends: {signal.last_words}"
            return FaultKind.PROCESS_EXIT, evidence
        case StoppedAnswering():
            return (
                FaultKind.HANG,
                f"did not {signal.asked_to} within {signal.waited_seconds:g} s and was killed",
            )
        case NotReady():
            return FaultKind.HANG, f"not ready {signal.waited_seconds:.3g} s after its start"
        case HeartbeatLost():
            return (
                FaultKind.HEARTBEAT_LOST,
                f"no heartbeat for {signal.silent_seconds:.3g} s (limit "
                f"{signal.limit_seconds:g} s); the last one told of {signal.activity} in step "
                f"{signal.step}",
            )
        case Stopped():
            return (
                FaultKind.HANG,
                f"stopped (state T) for {signal.stopped_seconds:.3g} s, no heartbeat for "
                f"{signal.silent_seconds:.3g} s",
            )
        case NodeGone():
            return FaultKind.NODE_LOST, signal.evidence
        case NoProgress():
            return (
                FaultKind.HANG,
                f"{signal.activity} in step {signal.step} took {signal.own_seconds:.3g} s of its "
                f"own time, without waiting for anybody; deadline {signal.deadline.seconds:.3g} s "
                f"({signal.deadline.basis})",
            )


def _describe_exit(status: int) -> str:
    if status >= 0:
        return f"process exited with code {status}"
    try:
        name = signals.Signals(-status).name
    except ValueError:
        name = f"signal {-status}"
    return f"process killed by {name}"
