"""Reader of one source of signals: how a worker process ended."""

from __future__ import annotations

from pathlib import Path

from health.classify import ProcessExited
from health.events import DeviceId

LOG_TAIL_CHARACTERS = 300


def read_exit(device: DeviceId, incarnation: int, status: int, log: Path) -> ProcessExited:
    """The signal for a process that ended with `status` and wrote to `log`, if it wrote at all."""
    last_words = ""
    if status >= 0 and log.exists():
        lines = log.read_text(errors="replace").strip().splitlines()
        last_words = lines[-1][-LOG_TAIL_CHARACTERS:] if lines else ""
    return ProcessExited(device, incarnation, status, last_words)
