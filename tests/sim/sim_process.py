"""A simulated process and the tasks in it.

A task is a generator that yields what it waits for. A wait is a function that is given the task,
and sees to it that the task goes on. A process that is dead never goes on; one that is stopped
does, with everything that came meanwhile, in order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from typing import Any, Protocol

from clock import Action, Clock

from elastic.store import GuardFailed, LeaseLost


class Waiter(Protocol):
    """Something that is blocked; `token` names the wait it is in."""

    token: int

    def advance(self, token: int, value: Any = None, error: Exception | None = None) -> None: ...


Wait = Callable[[Any], None]
Body = Generator[Wait, Any, Any]


class Process:
    """One process of the operating system; `name` is for the story."""

    def __init__(self, clock: Clock, name: str) -> None:
        self.name = name
        self.dead = False
        self.stopped = False
        self._clock = clock
        self._held: deque[tuple[Action, tuple[Any, ...]]] = deque()

    def call(self, action: Action, *arguments: Any) -> None:
        """Something happens to this process: now, or once it runs again."""
        if self.stopped:
            self._held.append((action, arguments))
        elif not self.dead:
            action(*arguments)

    def after(self, delay: float, action: Action, *arguments: Any) -> None:
        """A timer of this process."""
        self._clock.after(delay, self.call, action, *arguments)

    def resume(self) -> None:
        """It was stopped, and goes on."""
        self.stopped = False
        while self._held and not self.stopped and not self.dead:
            action, arguments = self._held.popleft()
            action(*arguments)

    def sleep(self, seconds: float) -> Wait:
        """Wait for time to pass."""
        return lambda task: self._clock.after(seconds, task.advance, task.token)


class Task:
    """A thread of control. `ended` is called with its result, or with what the store refused."""

    def __init__(
        self,
        process: Process,
        body: Body,
        ended: Callable[[Any, Exception | None], None] | None = None,
    ) -> None:
        self.token = 0
        self._process = process
        self._body = body
        self._ended = ended
        self._cancelled = False

    def start(self) -> None:
        """Run up to the first wait."""
        self.advance(0)

    def cancel(self) -> None:
        """It never goes on."""
        self._cancelled = True

    def advance(self, token: int, value: Any = None, error: Exception | None = None) -> None:
        """End the wait named `token`, as soon as the process runs."""
        self._process.call(self._go_on, token, value, error)

    def _go_on(self, token: int, value: Any, error: Exception | None) -> None:
        if self._cancelled or token != self.token:
            return
        self.token += 1
        try:
            wait = self._body.throw(error) if error is not None else self._body.send(value)
        except StopIteration as over:
            if self._ended is not None:
                self._ended(over.value, None)
        except (GuardFailed, LeaseLost) as refused:
            if self._ended is None:
                raise
            self._ended(None, refused)
        else:
            wait(self)


class Mailbox:
    """A queue from which one task takes."""

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()
        self._taker: tuple[Waiter, int] | None = None

    def put(self, item: Any) -> None:
        """Add `item`."""
        if self._taker is not None:
            (taker, token), self._taker = self._taker, None
            taker.advance(token, item)
        else:
            self._waiting.append(item)

    def get(self, task: Waiter) -> None:
        """Wait for the next item."""
        if self._waiting:
            task.advance(task.token, self._waiting.popleft())
        else:
            self._taker = (task, task.token)


class Outcome:
    """Something that is decided once, and for which one task waits."""

    def __init__(self) -> None:
        self.is_decided = False
        self._decision: tuple[Any, Exception | None] = (None, None)
        self._waiter: tuple[Waiter, int] | None = None

    def decide(self, value: Any, error: Exception | None = None) -> None:
        """Only the first decision counts."""
        if self.is_decided:
            return
        self.is_decided, self._decision = True, (value, error)
        if self._waiter is not None:
            waiter, token = self._waiter
            waiter.advance(token, value, error)

    def wait(self, task: Waiter) -> None:
        """Wait for the decision."""
        if self.is_decided:
            task.advance(task.token, *self._decision)
        else:
            self._waiter = (task, task.token)
