"""A worker's heart: what its training thread does, told to the agent at short intervals.

The training thread says where it is and when it waits for others; a thread of its own sends that,
so heartbeats also come while the training thread is blocked. Once they cease, or show no progress,
the agent judges (see `health.liveness`).

Hearts beat at multiples of their interval of the host's monotonic clock, which all of its processes
share. So those of a host beat together: their agent wakes once for all of them, and what they take
from the training threads they take at the same moment, not from one after the other while the rest
wait in a collective (as Petrini et al. 2003, "The Case of the Missing Supercomputer Performance",
found for the daemons of compute nodes).
"""

from __future__ import annotations

import threading
import time

from elastic.agent_link import AgentLink
from elastic.messages import Beat
from elastic.topology import Member
from health.heartbeat import ActivityLog


class Heart:
    """Heart of one worker process; it beats from `start` on, until the process ends.

    `log` is for the training thread, to say what it does and when it waits for others.
    """

    def __init__(self, member: Member, link: AgentLink, interval_seconds: float) -> None:
        self.log = ActivityLog(member.device, member.incarnation, time.monotonic())
        self._link = link
        self._interval_seconds = interval_seconds

    def start(self) -> None:
        """Begin to beat."""
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def _beat(self) -> None:
        while True:
            self._link.send(Beat(self.log.heartbeat(time.monotonic())))
            time.sleep(self._interval_seconds - time.monotonic() % self._interval_seconds)
