"""How long to wait before something counts as failed, and how much of that is learned.

Pure. A fixed limit on an activity of the training thread is either too short for a large model or
useless for a small one. So the limit follows the run: a multiple of the longest recent duration,
but at least a floor below which only noise would be measured, and a generous value while nothing
is known. A false alarm costs a recovery, a late one costs only time: where in doubt, it is late.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import astuple, dataclass, fields


@dataclass(frozen=True, slots=True)
class LivenessPolicy:
    """When a worker process counts as hung.

    heartbeat_seconds: a worker sends a heartbeat this often.
    heartbeat_timeout_seconds: silence after which a worker counts as hung. A training thread that
        holds the interpreter's lock this long, less one heartbeat, may look the same.
    stopped_timeout_seconds: how long a process may be stopped (state T: SIGSTOP, or a debugger).
    spawn_timeout_seconds: time from the start of a process to its first heartbeat.
    progress_floor_seconds, progress_factor, progress_initial_seconds: see `progress_deadline`.

    Raises ValueError for values that are not positive or that contradict each other.
    """

    heartbeat_seconds: float
    heartbeat_timeout_seconds: float
    stopped_timeout_seconds: float
    spawn_timeout_seconds: float
    progress_floor_seconds: float
    progress_factor: float
    progress_initial_seconds: float

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.heartbeat_timeout_seconds <= self.overdue_seconds:
            raise ValueError(
                f"heartbeat_timeout_seconds: {self.heartbeat_timeout_seconds:g} must be above "
                f"2 x heartbeat_seconds ({self.overdue_seconds:g}), or one late heartbeat would "
                "count as a failure"
            )
        if self.progress_factor < 1:
            raise ValueError(
                f"progress_factor: {self.progress_factor:g} must be at least 1, or the longest "
                "duration of a healthy run would itself count as a failure"
            )
        if self.progress_initial_seconds < self.progress_floor_seconds:
            raise ValueError(
                f"progress_initial_seconds: {self.progress_initial_seconds:g} must be at least "
                f"progress_floor_seconds ({self.progress_floor_seconds:g}), as it applies while "
                "less is known"
            )

    @property
    def look_seconds(self) -> float:
        """An agent looks at its workers this often: often enough to see a stop in time."""
        return min(self.heartbeat_seconds, self.stopped_timeout_seconds / 2)

    @property
    def overdue_seconds(self) -> float:
        """Silence that one late heartbeat does not explain."""
        return 2 * self.heartbeat_seconds


@dataclass(frozen=True, slots=True)
class QuarantinePolicy:
    """How long a device that keeps failing is left out.

    flap_window_seconds: a failure this soon after the device's return is a relapse; a device that
        stays well for as long is forgiven.
    quarantine_seconds: length of the first quarantine; each relapse doubles it.
    quarantine_max_seconds: length that no quarantine exceeds.

    Raises ValueError for values that are not positive or that contradict each other.
    """

    flap_window_seconds: float
    quarantine_seconds: float
    quarantine_max_seconds: float

    def __post_init__(self) -> None:
        _check_positive(self)
        if self.quarantine_max_seconds < self.quarantine_seconds:
            raise ValueError(
                f"quarantine_max_seconds: {self.quarantine_max_seconds:g} must be at least "
                f"quarantine_seconds ({self.quarantine_seconds:g})"
            )


@dataclass(frozen=True, slots=True)
class Deadline:
    """Seconds that something may take, and where that number comes from, for a person to read."""

    seconds: float
    basis: str


def progress_deadline(policy: LivenessPolicy, durations: Collection[float]) -> Deadline:
    """The deadline that recent `durations` (seconds, any order) of an activity justify.

    `progress_factor` times the longest of them, but at least `progress_floor_seconds`; without any,
    `progress_initial_seconds`.
    """
    if not durations:
        return Deadline(policy.progress_initial_seconds, "initial value, nothing learned yet")
    longest = max(durations)
    basis = (
        f"{policy.progress_factor:g} x the longest of the last {len(durations)}, {longest:.3g} s"
    )
    learned = policy.progress_factor * longest
    if learned < policy.progress_floor_seconds:
        return Deadline(policy.progress_floor_seconds, f"floor, above {basis}")
    return Deadline(learned, basis)


def _check_positive(policy: LivenessPolicy | QuarantinePolicy) -> None:
    for field, value in zip(fields(policy), astuple(policy), strict=True):
        if not (value > 0 and math.isfinite(value)):
            raise ValueError(f"{field.name}: {value:g} must be a positive, finite number")
