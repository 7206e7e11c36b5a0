"""Which devices are kept out for failing too often, and what the journal is told of it.

Pure. `health.quarantine` judges a device by its failures and returns. The failures are in the
store, so a controller that takes over judges by the same ones; but nobody writes down when a device
was back, nor the loss of a node. Times are seconds since the epoch, by the clocks of several hosts:
they need to agree only within what a quarantine is long.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastic.effects import Effect, Note
from elastic.messages import Failed
from health.events import DeviceId, FailureEvent
from health.policy import QuarantinePolicy
from health.quarantine import Quarantine


class Probation:
    """The devices that failed."""

    def __init__(self, policy: QuarantinePolicy) -> None:
        self._quarantine = Quarantine(policy)
        self._told: frozenset[DeviceId] = frozenset()

    def held(self, now: float) -> frozenset[DeviceId]:
        """The devices that are kept out."""
        return self._quarantine.held(now)

    def failed(self, failure: FailureEvent, now: float) -> list[Effect]:
        """A device failed, or the process on it did."""
        device, quarantine = failure.device, self._quarantine
        # The clock of another host may be ahead.
        quarantine.failed(device, failure.severity, min(failure.at, now))
        if quarantine.allowed(device, now):
            return []
        self._told |= {device}
        fields = {
            "device": str(device),
            "release_at": quarantine.release_at(device),
            "reason": quarantine.reason(device, now),
        }
        return [Note("quarantined", fields)]

    def returned(self, device: DeviceId, now: float) -> None:
        """A process on the device is ready."""
        self._quarantine.returned(device, now)

    def recall(
        self, failures: Sequence[Failed], is_ready: Callable[[DeviceId], bool], now: float
    ) -> None:
        """What a predecessor knew, from the `failures` that are recorded, oldest first.

        A device is taken to have been back at once, so it is forgiven a little earlier than by a
        controller that saw it return.
        """
        newest = {failed.failure.device: failed.failure.id for failed in failures}
        for failed in failures:
            failure, at = failed.failure, min(failed.failure.at, now)
            self._quarantine.failed(failure.device, failure.severity, at)
            if failure.id != newest[failure.device] or is_ready(failure.device):
                self._quarantine.returned(failure.device, at)
        self._told = self.held(now)

    def release(self, now: float) -> list[Effect]:
        """Say whose quarantine is over."""
        held = self.held(now)
        over, self._told = self._told - held, held
        return [Note("quarantine_over", {"device": str(device)}) for device in sorted(over)]
