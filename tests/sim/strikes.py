"""What goes wrong in a simulated run, and when."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from random import Random

from elastic.effects import Phase


class Kind(StrEnum):
    """Kinds of bad luck."""

    KILL = "kill workers"
    HANG = "stop a worker"
    SLOW = "let a worker take its time"
    FALSE_ALARM = "fence a worker that works"
    FLAP = "kill the workers of one device again and again"
    CUT = "break a worker's connections"
    LOSE = "lose a result that a worker waits for"
    PARTITION = "cut nodes off from nodes"
    AGENT_KILL = "kill an agent"
    AGENT_STOP = "stop an agent"
    AGENT_CUT = "cut an agent off from the store"
    NODE_CUT = "cut a node off from all others and the store"
    DRAIN = "ask an agent to leave"
    LEADER_KILL = "kill the leader"
    LEADER_STOP = "stop the leader"
    LEADER_CUT = "cut the leader off from the store"
    OUTAGE = "silence the store"


_WORKERS = (Kind.KILL,) * 10 + (Kind.HANG,) * 3 + (Kind.CUT, Kind.LOSE) * 2
_WORKERS += (Kind.FALSE_ALARM, Kind.FLAP, Kind.SLOW)
_LEADER = (Kind.LEADER_KILL,) * 4 + (Kind.LEADER_STOP,) * 2 + (Kind.LEADER_CUT,)
_REST = (
    Kind.PARTITION,
    Kind.AGENT_KILL,
    Kind.AGENT_KILL,
    Kind.AGENT_STOP,
    Kind.AGENT_CUT,
    Kind.AGENT_CUT,
    Kind.NODE_CUT,
    Kind.OUTAGE,
)


_NARROW = (
    # Nobody fails: nothing may be redone.
    (Kind.DRAIN,),
    # Devices are quarantined, and nothing else excuses their use.
    (Kind.FLAP,),
    # Nodes wait for long, and go on.
    (Kind.SLOW, Kind.SLOW, Kind.SLOW, Kind.LOSE),
)
"""What some stories are about alone."""

_BUSY = (
    "commands",
    "plan",
    "events",
    "reports",
    "alive",
    "no agents",
    Phase.REBUILDING,
    Phase.RESHARDING,
    Phase.RESUMING,
    Phase.RUNNING,
)


@dataclass(slots=True)
class Strike:
    """Something bad that happens once, when its trigger comes.

    `trigger`: "time" (at `at` seconds), the name of a phase that a controller enters (for the
    `at`-th time), a point of a step (in step `at`), "salvaging" (the `at`-th time that a worker
    goes on with a step from gradients that it kept), or a kind of key that is written, or deleted
    ("no ..."), for the `at`-th time. `seconds` is how long it lasts, where it passes.
    """

    trigger: str
    at: int
    kind: Kind
    victims: int
    delay: float
    seconds: float
    done: bool = False


def new_strikes(rng: Random, steps: int) -> list[Strike]:
    """Random strikes on a job of so many steps."""
    if rng.random() < 0.1:
        narrow = rng.choice(_NARROW)
        return [_new_strike(rng, steps, rng.choice(narrow)) for _ in range(rng.randint(1, 4))]
    if rng.random() < 0.12:
        # Somebody is to leave, and meanwhile connections break that no failure explains.
        point = rng.choice(("prepared", "voted", "computing"))
        return [
            Strike(point, at, kind, 1, delay, 0.5)
            for at in rng.sample(range(1, steps), 3)
            for kind, delay in ((Kind.DRAIN, 0.1 * rng.random()), (Kind.CUT, 0.5 + rng.random()))
        ]
    # Many stories are about workers and leaders alone: there nothing excuses a slow recovery.
    kinds = _WORKERS + _LEADER + (Kind.DRAIN,) * 2 + (2 * _REST if rng.random() < 0.6 else ())
    strikes = [_new_strike(rng, steps, rng.choice(kinds)) for _ in range(rng.randint(1, 5))]
    if rng.random() < 0.5:
        # The leader is lost in the middle of what it does about something.
        kind = rng.choice((Kind.LEADER_KILL, Kind.LEADER_STOP, Kind.LEADER_CUT))
        trigger = rng.choice(_BUSY)
        at, delay, seconds = rng.randint(1, 3), 0.1 * rng.random(), 8.0 * rng.random()
        strikes.append(Strike(trigger, at, kind, 1, delay, seconds))
    if rng.random() < 0.4:
        # Somebody is lost in a step that goes on from what is left of its last attempt.
        at, delay = rng.randint(1, 6), 0.8 * rng.random()
        strikes.append(Strike("salvaging", at, Kind.KILL, 1, delay, 0.5))
    return strikes


def _new_strike(rng: Random, steps: int, kind: Kind) -> Strike:
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
        kind=kind,
        victims=rng.choice((1, 1, 1, 2, 3)),
        delay=rng.choice((0.0, 0.05, 0.3, 1.0)) * rng.random(),
        seconds=0.5 + 15.0 * rng.random() ** 2,
    )
