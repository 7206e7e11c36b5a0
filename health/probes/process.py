"""Readers of one source of signals: how a worker process ended, and whether it is stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path

from health.classify import ProcessExited
from health.events import DeviceId

LOG_TAIL_CHARACTERS = 300
PROC = Path("/proc")
STAT_BYTES = 512
"""More than the first three fields of a process's ``stat`` have."""


def read_exit(device: DeviceId, incarnation: int, status: int, log: Path) -> ProcessExited:
    """The signal for a process that ended with `status` and wrote to `log`, if it wrote at all.

    Beside the log may be its error file; see `error_file`.
    """
    last_words = ""
    if status >= 0 and log.exists():
        lines = log.read_text(errors="replace").strip().splitlines()
        last_words = lines[-1][-LOG_TAIL_CHARACTERS:] if lines else ""
    return ProcessExited(device, incarnation, status, last_words, _raised(error_file(log)))


def error_file(log: Path) -> Path:
    """Where the worker that writes to `log` leaves a record of the exception that ends it.

    The record is torch elastic's (`torch.distributed.elastic.multiprocessing.errors`): JSON with
    the message, the call stack and the time.
    """
    return log.with_suffix(".error.json")


def _raised(record: Path) -> str:
    try:
        message = json.loads(record.read_bytes())["message"]["message"]
    except (OSError, ValueError, LookupError, TypeError):
        # It was killed, or died while it wrote the record: the log and the status have to do.
        return ""
    return str(message)[:LOG_TAIL_CHARACTERS]


def is_stopped(pid: int, proc: Path = PROC) -> bool:
    """Whether the process is stopped by a signal (state T) or by a debugger (state t).

    False for one that ended, and on systems without /proc, where a hang is still found, but later.
    """
    # Asked of every worker some times a second: a Path and a file object would cost twice as much.
    try:
        file = os.open(f"{proc}/{pid}/stat", os.O_RDONLY)
        try:
            stat = os.read(file, STAT_BYTES)
        finally:
            os.close(file)
    except OSError:
        return False
    # The second field, in parentheses, is the program's name and may itself contain anything.
    _, _, after_name = stat.rpartition(b")")
    return after_name.split()[:1] in ([b"T"], [b"t"])
