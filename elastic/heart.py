"""A worker's heart: what its training thread does, told to the agent at short intervals.

The training thread says where it is and when it waits for others; a thread of its own sends that,
so heartbeats also come while the training thread is blocked. Once they cease, or show no progress,
the agent judges (see `health.liveness`).
"""

from __future__ import annotations

import threading
import time

from elastic.agent_link import AgentLink
from elastic.messages import Beat
from elastic.topology import Member
from health.heartbeat import Activity, ActivityLog


class Heart:
    """Heart of one worker process; it beats from `start` on, until the process ends."""

    def __init__(self, member: Member, link: AgentLink, interval_seconds: float) -> None:
        self._log = ActivityLog(member.device, member.incarnation, time.monotonic())
        self._link = link
        self._interval_seconds = interval_seconds

    def start(self) -> None:
        """Begin to beat."""
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def begin(self, activity: Activity, step: int, *, generation: int, cold: bool) -> None:
        """The training thread turns to `activity`; `cold`: what it takes says nothing of later."""
        self._log.begin(activity, step, time.monotonic(), generation=generation, cold=cold)

    @property
    def waits(self) -> ActivityLog:
        """Who is to be told when it waits for others."""
        return self._log

    def _beat(self) -> None:
        while True:
            self._link.send(Beat(self._log.heartbeat(time.monotonic())))
            time.sleep(self._interval_seconds)
