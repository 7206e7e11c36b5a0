"""What the ranks of a peer's job tell the benchmark, over a FIFO, one JSON line each.

A rank tells every step that it has done, with the *attempt* it belongs to: a number that is the
same for all ranks that work together and grows whenever a job goes on after a failure. A step is
complete when all ranks of one replica have told it in one attempt. What an attempt still completes
after a strike was in flight and does not count as recovered; the first step of a later attempt
does.
"""

from __future__ import annotations

import json
import os
import select
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

POLL_SECONDS = 0.5


@dataclass(frozen=True, slots=True)
class Told:
    """A rank has done `step`; `at` is in seconds since the epoch.

    With `raised`, it is about to raise in that step instead, as it was asked to.
    """

    replica: int
    slot: int
    attempt: int
    step: int
    at: float
    pid: int
    raised: bool = False


class Teller:
    """In a rank: tells the benchmark about this process."""

    def __init__(self, fifo: Path, replica: int, slot: int) -> None:
        self._descriptor = os.open(fifo, os.O_WRONLY)
        self._replica = replica
        self._slot = slot

    def tell(self, attempt: int, step: int, *, raised: bool = False) -> None:
        """Tell that `step` is done, or that it raises."""
        told = Told(self._replica, self._slot, attempt, step, time.time(), os.getpid(), raised)
        # Short enough for a FIFO to take it whole, whoever else writes.
        os.write(self._descriptor, json.dumps(asdict(told)).encode() + b"\n")


def listen(descriptor: int, seconds: float) -> Iterator[Told | None]:
    """What is told within `seconds`; None now and then when nothing is."""
    deadline, rest = time.monotonic() + seconds, b""
    while (left := deadline - time.monotonic()) > 0:
        readable, _, _ = select.select([descriptor], [], [], min(left, POLL_SECONDS))
        if not readable:
            yield None
            continue
        *lines, rest = (rest + os.read(descriptor, 1 << 16)).split(b"\n")
        yield from (Told(**json.loads(line)) for line in lines)


class Progress:
    """Which steps are complete; `pids` are the processes of the ranks, by replica and slot."""

    def __init__(self, degree: int) -> None:
        self.pids: dict[tuple[int, int], int] = {}
        self._degree = degree
        self._slots: defaultdict[tuple[int, int, int], set[int]] = defaultdict(set)
        self._replicas: defaultdict[tuple[int, int], set[int]] = defaultdict(set)

    def take(self, told: Told) -> bool:
        """Note what was told; returns whether it completes the step in its replica."""
        self.pids[told.replica, told.slot] = told.pid
        slots = self._slots[told.attempt, told.step, told.replica]
        slots.add(told.slot)
        if len(slots) < self._degree:
            return False
        self._replicas[told.attempt, told.step].add(told.replica)
        return True

    def replicas_done(self, told: Told) -> int:
        """How many replicas have completed the step of `told` in its attempt."""
        return len(self._replicas[told.attempt, told.step])
