"""Virtual time, the one source of randomness, and the story of a run so far.

An event is an action at a time. Events of one time happen in the order in which they were asked
for, and everything random comes from the seed: so a seed is a story that can be told again.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

Action = Callable[..., None]


class Violation(AssertionError):
    """An invariant is broken. The message has the story, and how to play it again."""


class Clock:
    """Time in seconds, from 0."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.now = 0.0
        self.story: list[tuple[float, str, tuple[Any, ...]]] = []
        self._events: list[tuple[float, int, Action, tuple[Any, ...]]] = []
        self._order = 0

    def after(self, delay: float, action: Action, *arguments: Any) -> None:
        """Call `action` in `delay` seconds."""
        self._order += 1
        heapq.heappush(self._events, (self.now + delay, self._order, action, arguments))

    def play(self) -> None:
        """Let the next event happen. Whatever it raises that is not a Violation becomes one."""
        self.now, _, action, arguments = heapq.heappop(self._events)
        try:
            action(*arguments)
        except Violation:
            raise
        except Exception as error:
            raise self.violation(f"{type(error).__name__}: {error}") from error

    def delay(self, scale: float = 0.2) -> float:
        """How long something takes: mostly little, now and then up to `scale` seconds."""
        return 0.01 + scale * self.rng.random() ** 3

    def tell(self, text: str, *arguments: Any) -> None:
        """A line of the story. It is put together only where somebody reads it."""
        self.story.append((self.now, text, arguments))

    def check(self, holds: bool, what: str, *arguments: Any) -> None:
        """An invariant; `what` and its arguments describe its breach. Raises Violation."""
        if not holds:
            raise self.violation(what % arguments if arguments else what)

    def violation(self, what: str) -> Violation:
        """`what` happened, with everything that led to it."""
        story = "\n".join(f"{at:8.2f}  {text % arguments}" for at, text, arguments in self.story)
        rerun = (
            f"EVERSTEP_SIM_SEED={self.seed} .venv/bin/python -m pytest -q "
            "tests/sim/test_recovery_simulation.py -k seeds"
        )
        return Violation(f"{what}\n{story}\n{self.now:8.2f}  {what}\nrerun: {rerun}")
