"""The one loop around the controller: store changes and time in, effects out.

Effects are performed in the order in which the machine gave them. What goes to the store is written
before the next event is taken, so a controller that restarts finds what it had decided.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from elastic.controller import Controller
from elastic.effects import Effect, Event, Finish, Note, Send, StopRequested, Tick
from elastic.keys import decode, encode, job_prefix, key_of
from elastic.messages import Adopt, AgentRecord, Failed, NodeProgress, NodeReport, StoreMessage
from elastic.store import Change, Store

TICK_SECONDS = 0.1

Observer = Callable[[float, StoreMessage | Note | Finish], None]
"""Called with the time for every message taken and every note and finish given."""


class Driver:
    """Runs one controller. `stop` may be called at any time from the event loop."""

    def __init__(self, controller: Controller, store: Store, job: str, observe: Observer) -> None:
        self._controller = controller
        self._store = store
        self._job = job
        self._observe = observe
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._changes = store.watch(job_prefix(job))

    def stop(self, reason: str) -> None:
        """End the job as interrupted."""
        self._events.put_nowait(StopRequested(reason))

    async def run(self) -> Finish:
        """Drive until the job is over; returns how it ended."""
        feeders = [
            asyncio.create_task(self._feed(self._changes)),
            asyncio.create_task(self._tick()),
        ]
        try:
            while True:
                event = await self._events.get()
                now = time.time()
                if isinstance(event, AgentRecord | Failed | NodeReport | NodeProgress):
                    self._observe(now, event)
                for effect in self._controller.handle(event, now):
                    await self._perform(effect)
                    if isinstance(effect, Finish):
                        return effect
        finally:
            for feeder in feeders:
                feeder.cancel()
            await asyncio.gather(*feeders, return_exceptions=True)

    async def _perform(self, effect: Effect) -> None:
        match effect:
            case Send(message):
                write: Any = self._store.create if isinstance(message, Adopt) else self._store.put
                await write(key_of(self._job, message), encode(message))
            case Note() | Finish():
                self._observe(time.time(), effect)

    async def _feed(self, changes: AsyncIterator[Change]) -> None:
        async for change in changes:
            if change.value is None:
                continue
            message = decode(change.value)
            if isinstance(message, AgentRecord | Failed | NodeReport | NodeProgress):
                self._events.put_nowait(message)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_SECONDS)
            self._events.put_nowait(Tick())
