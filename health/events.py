"""What can go wrong with hardware and processes, as data.

A probe reads one source and reports signals; `health.classify` turns signals into FailureEvents.
An event names the device, what happened, how bad it is, when it was seen, and the evidence, so that
a decision made on it can be explained afterwards.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple


class DeviceId(NamedTuple):
    """One accelerator, or one CPU worker of a local run: `index` counts within `node`.

    A named tuple, as tens of thousands are hashed and compared in every plan of a large job.
    """

    node: int
    index: int  # type: ignore[assignment]  # hides tuple.index

    def __str__(self) -> str:
        return f"node{self.node}/{self.index}"


class FaultKind(StrEnum):
    """Kinds of failure the runtime distinguishes."""

    PROCESS_EXIT = "process_exit"
    HEARTBEAT_LOST = "heartbeat_lost"
    HANG = "hang"
    STRAGGLER = "straggler"
    XID = "xid"
    ECC = "ecc"
    NVLINK = "nvlink"
    THERMAL = "thermal"
    NIC_DOWN = "nic_down"
    NODE_LOST = "node_lost"
    SDC = "sdc"
    LOSS_ANOMALY = "loss_anomaly"


class Severity(StrEnum):
    """TRANSIENT: the process failed, the device may be used again at once. DEGRADED: usable but
    impaired. FATAL: the device is out until something declares it healthy."""

    TRANSIENT = "transient"
    DEGRADED = "degraded"
    FATAL = "fatal"


@dataclass(frozen=True, slots=True)
class FailureEvent:
    """One classified failure.

    `id` is unique within a run; `incarnation` is the worker process that failed; `at` is when it
    was seen (seconds since the epoch); `evidence` is what a person would want to read.
    """

    id: str
    device: DeviceId
    incarnation: int
    kind: FaultKind
    severity: Severity
    at: float
    evidence: str
