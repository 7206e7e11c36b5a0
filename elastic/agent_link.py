"""A worker's line to its agent: a socket, a thread that reads it, and a queue.

The training thread may be blocked inside a collective for as long as a dead peer's connection
lives, so somebody else has to hear that it should stop. The reader hands every message to
`on_message` first, in its own thread, and then queues it for the training thread. Plans are made
whole before: they come as changes to the ones before, and this worker has those.

What a worker says goes out in lists of messages. One that nobody waits for is kept until the next
that is sent, a heartbeat at the latest: it costs the training thread no system call, and does not
wake the agent. What was said first is heard first.

If the agent is gone the worker must not outlive it: end of file ends the process.
"""

from __future__ import annotations

import os
import queue
import threading
import traceback
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection

import msgspec

from elastic.messages import Adopt, AgentMessage, PlanChange, WorkerMessage
from elastic.plan_chain import PlanChain


class AgentLink:
    """Both directions of the line. `send` and `send_later` may be called from any thread."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._inbox: queue.SimpleQueue[AgentMessage] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._kept: deque[WorkerMessage] = deque()
        self._decoder = msgspec.msgpack.Decoder(AgentMessage)
        self._plans = PlanChain()

    def start(self, on_message: Callable[[AgentMessage], None]) -> None:
        """Begin to read."""
        reader = threading.Thread(
            target=self._read, args=(on_message,), name="agent-link", daemon=True
        )
        reader.start()

    def send(self, message: WorkerMessage) -> None:
        """Tell the agent this, and what was kept.

        Returns once the kernel has the bytes, so they survive this process.
        """
        with self._sending:
            kept = [self._kept.popleft() for _ in range(len(self._kept))]
            self._connection.send_bytes(msgspec.msgpack.encode([*kept, message]))

    def send_later(self, message: WorkerMessage) -> None:
        """Keep this for the next `send`. It is lost if the process ends before, however it ends."""
        self._kept.append(message)

    def receive(self) -> AgentMessage:
        """The next message, waiting for it."""
        return self._inbox.get()

    def _read(self, on_message: Callable[[AgentMessage], None]) -> None:
        while True:
            try:
                message = self._decoder.decode(self._connection.recv_bytes())
            except (EOFError, OSError, msgspec.DecodeError):
                os._exit(1)
            try:
                message = self._whole(message)
                on_message(message)
            except BaseException:
                # A worker that no longer hears its agent must not live on.
                traceback.print_exc()
                os._exit(1)
            self._inbox.put(message)

    def _whole(self, message: AgentMessage) -> AgentMessage:
        """Raises ValueError for a plan that cannot be what its author had."""
        if not isinstance(message, Adopt | PlanChange):
            return message
        self._plans.take(message)
        plan = self._plans.newest()
        assert plan is not None, "a plan was just taken"
        return Adopt(plan)
