"""Leave no process behind, whatever a launcher starts, detaches or abandons.

torchrun gives each rank a session of its own, and nvidia-resiliency-ext starts monitors that detach
themselves. The benchmark therefore adopts orphans (as a *subreaper*, Linux) and kills its children
until no new one turns up.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from collections.abc import Iterator

from benchmarks.common import children_of

PR_SET_CHILD_SUBREAPER = 36


@contextlib.contextmanager
def no_offspring() -> Iterator[None]:
    """Kill every process that was started within the block, directly or not, at its end."""
    _adopt_orphans(True)
    before = set(children_of(os.getpid()))
    try:
        yield
    finally:
        # The children of a killed process become ours: each round reaches one level deeper.
        while new := set(children_of(os.getpid())) - before:
            for pid in new:
                os.kill(pid, signal.SIGKILL)
            for pid in new:
                os.waitpid(pid, 0)
        _adopt_orphans(False)


def _adopt_orphans(adopt: bool) -> None:
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, int(adopt))
