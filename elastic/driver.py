"""A candidate for the lead of a job: stands by until it leads, and drives the job while it does.

If the lead is lost in the middle of it, which the store tells with the next write, the driver
stands by again. It returns when the job is over, whoever ended it.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable

from elastic.controller import Controller
from elastic.effects import Finish, StopRequested
from elastic.journal import Recorder
from elastic.keys import decode, job_prefix, position_key
from elastic.leadership import Leadership, elected
from elastic.recorded import Recorded, read_messages
from elastic.store import GuardFailed, LeaseLost, Store
from elastic.term import Term, replay

MakeController = Callable[[Recorded, float], Controller]
"""Given what the store says of the job, and the time."""
OpenRecorder = Callable[[Controller], Recorder]

_log = logging.getLogger(__name__)


class Driver:
    """One candidate. `stop` may be called at any time from the event loop.

    `name` tells this candidate from others; `lease_seconds` is how long its lead outlives it.
    """

    def __init__(
        self,
        store: Store,
        job: str,
        name: str,
        lease_seconds: float,
        make_controller: MakeController,
        open_recorder: OpenRecorder,
    ) -> None:
        self._store = store
        self._job = job
        self._name = name
        self._lease_seconds = lease_seconds
        self._make_controller = make_controller
        self._open_recorder = open_recorder
        self._wish: StopRequested | None = None
        self._term: Term | None = None

    def stop(self, reason: str, outcome: str = "interrupted") -> None:
        """End the job, now or as soon as this driver leads it."""
        self._wish = StopRequested(reason, outcome)
        if self._term is not None:
            self._term.take(self._wish)

    async def run(self) -> Finish:
        """Drive until the job is over; returns how it ended."""
        while True:
            try:
                async with elected(
                    self._store, self._job, self._name, self._lease_seconds
                ) as leadership:
                    return await self._lead(leadership)
            except (GuardFailed, LeaseLost) as error:
                _log.warning("%s leads no more and stands by: %s", self._name, error)

    async def _lead(self, leadership: Leadership) -> Finish:
        snapshot = await self._store.get_prefix(job_prefix(self._job))
        found = [decode(self._job, key, value) for key, value in snapshot.values.items()]
        recorded = read_messages(message for message in found if message is not None)
        controller = self._make_controller(recorded, time.time())
        position = snapshot.values.get(position_key(self._job))
        written_to = int(position) if position is not None else snapshot.revision
        with contextlib.closing(self._open_recorder(controller)) as recorder:
            if recorded.stop is not None:
                finish = Finish(recorded.stop.outcome, recorded.stop.reason)
                if not recorder.is_concluded:
                    await self._conclude(leadership, recorder, finish, written_to)
                return finish
            self._term = Term(
                self._store,
                self._job,
                leadership,
                controller,
                recorder,
                agents=recorded.nodes,
                lease_seconds=self._lease_seconds,
                begins_at=snapshot.revision,
                written_to=written_to,
            )
            if self._wish is not None:
                self._term.take(self._wish)
            elif recorded.wish is not None:
                self._term.take(StopRequested(recorded.wish.reason, recorded.wish.outcome))
            try:
                return await self._term.run()
            finally:
                self._term = None

    async def _conclude(
        self, leadership: Leadership, recorder: Recorder, finish: Finish, written_to: int
    ) -> None:
        """Write the end of the run's files for a leader that was lost once it had ended the job."""
        await replay(self._store, self._job, leadership, recorder, written_to)
        recorder.observe(time.time(), finish)
