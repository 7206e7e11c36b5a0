"""What a simulated worker says, at once or with its next word, as in `elastic.agent_link`."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from elastic.messages import WorkerMessage


class SimLink:
    """`wrote` is called when something new is in `pipe`, from which the agent reads it.

    What is in the pipe survives the process; what is only kept does not.
    """

    def __init__(self, wrote: Callable[[], None]) -> None:
        self.pipe: deque[WorkerMessage] = deque()
        self._kept: list[WorkerMessage] = []
        self.wrote = wrote

    def send(self, message: WorkerMessage) -> None:
        """Say what was kept, and this."""
        self._kept.append(message)
        self.beat()

    def send_later(self, message: WorkerMessage) -> None:
        """Keep this until something is sent, or the heart beats."""
        self._kept.append(message)

    def beat(self) -> None:
        """The heart speaks, with whom goes what was kept."""
        if self._kept:
            self.pipe.extend(self._kept)
            self._kept.clear()
            self.wrote()
