"""Two running jobs that take turns on one machine, so that its drift strikes both alike.

A shared machine changes its speed by a tenth within a minute, in wall-clock and in processor time:
runs one after the other cannot show a difference of a hundredth. Here both jobs are alive, and one
is stopped (SIGSTOP, all of its processes) while the other has its turn of a second. The time of
a job is what it had in its turns. Whatever changes more slowly than the turns do cancels out.

The jobs must bear to stand still: no timeout of theirs may be near the length of a turn.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from bisect import bisect_right
from collections.abc import Iterator

from benchmarks.common import children_of

_SCHEDULER_CLOCK = 2
"""CPUCLOCK_SCHED in the kernel's posix-timers.h: nanoseconds of all threads of a process."""


class Turns:
    """The turns of one job, of which the process `pid` is the first. It begins in a turn."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._members: list[int] = []
        self._began = [time.time()]
        self._had = [0.0]
        self._used = [0.0]

    def stop(self) -> None:
        """End the turn: stop the processes of the job, parents first, as they watch the others."""
        # To find them takes milliseconds, and in its steady state a job starts no processes.
        self._members = self._members or list(_tree(self._pid))
        self._had.append(self._had[-1] + time.time() - self._began[-1])
        for pid in self._members:
            _signal(pid, signal.SIGSTOP)
        self._used.append(sum(_processor_seconds(pid) for pid in self._members))

    def begin(self) -> None:
        """Begin the next turn."""
        assert len(self._had) > len(self._began), "the last turn has not been ended"
        for pid in reversed(self._members):
            _signal(pid, signal.SIGCONT)
        self._began.append(time.time())

    def release(self) -> None:
        """Let the job run from now on; no turn is counted."""
        # A member whose parent is gone is no longer in the tree.
        for pid in {*self._members, *_tree(self._pid)}:
            _signal(pid, signal.SIGCONT)

    def had(self, moment: float) -> float:
        """Seconds that the job had in its turns until `moment`, in seconds since the epoch."""
        turn = bisect_right(self._began, moment) - 1
        assert turn >= 0, "the job had not begun"
        running = self._had[turn] + moment - self._began[turn]
        # Between two turns, and after the last one.
        return min([running, *self._had[turn + 1 : turn + 2]])

    def used(self, moment: float) -> float:
        """Processor seconds that the job had used until `moment`, in a turn that is over.

        They are known at the ends of turns, and taken to grow evenly within one.
        """
        turn = bisect_right(self._began, moment) - 1
        (had, at_end), (used, used_at_end) = (
            known[turn : turn + 2] for known in (self._had, self._used)
        )
        return used + (used_at_end - used) * (self.had(moment) - had) / (at_end - had)


def _tree(root: int) -> Iterator[int]:
    """A process and its descendants, parents before their children."""
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children_of(pid)


def _processor_seconds(pid: int) -> float:
    try:
        return time.clock_gettime((~pid << 3) | _SCHEDULER_CLOCK)
    except OSError:
        return 0.0  # It ended meanwhile.


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
