"""Plays seeds until one breaks an invariant."""

from __future__ import annotations

from clock import Violation
from world import World

SEEDS = 1000


def first_violation() -> list[str]:
    """What the first failing seed violates, its story, and how to play it again."""
    for seed in range(SEEDS):
        try:
            World(seed).run()
        except Violation as violation:
            print(f"found by seed {seed}: {str(violation).splitlines()[0]}")
            return str(violation).splitlines()
    raise AssertionError(f"{SEEDS} seeds did not find it")
