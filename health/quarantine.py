"""Which devices keep failing, and how long they are left out for it.

Pure. A device that fails may come back. If it fails again soon after, each return and each loss
costs everybody a recovery, so it stays out for a while, twice as long with every relapse. A device
that stayed well for the whole window after its return, or after its quarantine where that ended
later, starts with a clean record.

The first failure costs nothing here: being lost once is not flapping. A process that fails on a
device which nothing is held against (TRANSIENT) says less about the device, so the first relapse of
that kind is free too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from health.events import DeviceId, Severity
from health.policy import QuarantinePolicy


@dataclass(frozen=True, slots=True)
class _Record:
    """A device's failures since it was last forgiven.

    `relapses` are those that count, and `pardoned` says whether there was a free one beside them.
    `returned_at` is None until the device is back from the newest failure; `release_at` is the end
    of the newest quarantine, None before the first.
    """

    relapses: int = 0
    pardoned: bool = False
    returned_at: float | None = None
    release_at: float | None = None


class Quarantine:
    """Book of failures by device. `now` is any clock that does not go back, in seconds: the epoch's
    will do, as a clock that is set back only keeps a device out for longer."""

    def __init__(self, policy: QuarantinePolicy) -> None:
        self._policy = policy
        self._records: dict[DeviceId, _Record] = {}

    def failed(self, device: DeviceId, severity: Severity, now: float) -> None:
        """The device failed, or the process on it did. Failing again before a return counts too."""
        known = self._records.get(device)
        if known is None or self._is_forgiven(known, now):
            self._records[device] = _Record()
        elif severity is Severity.TRANSIENT and not known.pardoned:
            self._records[device] = replace(known, pardoned=True, returned_at=None)
        else:
            relapses = known.relapses + 1
            release_at = now + self._length(relapses)
            self._records[device] = _Record(relapses, known.pardoned, None, release_at)

    def returned(self, device: DeviceId, now: float) -> None:
        """A process on the device is ready again: from here on it has to stay well."""
        known = self._records.get(device)
        if known is not None and known.returned_at is None:
            self._records[device] = replace(known, returned_at=now)

    def allowed(self, device: DeviceId, now: float) -> bool:
        """Whether a plan may use the device."""
        release_at = self.release_at(device)
        return release_at is None or now >= release_at

    def held(self, now: float) -> frozenset[DeviceId]:
        """The devices that no plan may use."""
        return frozenset(device for device in self._records if not self.allowed(device, now))

    def release_at(self, device: DeviceId) -> float | None:
        """When the device's newest quarantine ends or ended; None if it had none."""
        known = self._records.get(device)
        return known.release_at if known is not None else None

    def reason(self, device: DeviceId, now: float) -> str:
        """Why the device may be used at `now`, or not: a sentence with the numbers."""
        known = self._records.get(device)
        if known is None or self._is_forgiven(known, now):
            return f"{device} has no recent failure"
        window = f"{self._policy.flap_window_seconds:g} s"
        failures = 1 + known.relapses + known.pardoned
        times = "once" if failures == 1 else f"{failures} times"
        if known.release_at is None or now >= known.release_at:
            return f"{device} failed {times} and is forgiven once it stays well for {window}"
        length, left = self._length(known.relapses), known.release_at - now
        return (
            f"{device} failed {times} and never stayed well for {window} in between; it is left "
            f"out for {length:g} s, of which {left:g} s remain"
        )

    def _is_forgiven(self, record: _Record, now: float) -> bool:
        if record.returned_at is None:
            return False
        # A quarantine is no proof: nothing asks anything of the device meanwhile.
        on_trial_since = record.returned_at
        if record.release_at is not None:
            on_trial_since = max(on_trial_since, record.release_at)
        return now - on_trial_since >= self._policy.flap_window_seconds

    def _length(self, relapses: int) -> float:
        """Seconds of the quarantine after that many relapses."""
        # A float overflows at 1024 doublings.
        doublings = min(relapses - 1, 1000)
        length = self._policy.quarantine_seconds * 2.0**doublings
        return min(length, self._policy.quarantine_max_seconds)
