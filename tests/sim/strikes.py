"""What goes wrong in a simulated run, and when."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from elastic.effects import Phase


@dataclass(slots=True)
class Strike:
    """Something bad that happens once, when its trigger comes.

    `trigger`: "time" (at `at` seconds), the name of a phase that the controller enters (for the
    `at`-th time), or a point of a step (in step `at`). `kind`: kill, hang or cut.
    """

    trigger: str
    at: int
    kind: str
    victims: int
    delay: float
    done: bool = False


def new_strike(rng: Random, steps: int) -> Strike:
    """A random strike on a job of so many steps."""
    trigger = rng.choice(
        (
            "time",
            "time",
            "prepared",
            "voted",
            "committed",
            "computing",
            Phase.QUIESCING,
            Phase.REBUILDING,
            Phase.RESHARDING,
            Phase.RESUMING,
        )
    )
    match trigger:
        case "time":
            at = rng.randint(3, 40)
        case Phase():
            at = rng.randint(1, 4)
        case _:
            at = rng.randrange(steps)
    return Strike(
        trigger=trigger,
        at=at,
        kind=rng.choice(("kill", "kill", "kill", "kill", "hang", "cut")),
        victims=rng.choice((1, 1, 1, 2, 3)),
        delay=rng.choice((0.0, 0.05, 0.3, 1.0)) * rng.random(),
    )
