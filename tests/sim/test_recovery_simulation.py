"""Recovery under every interleaving that a seed can think of, with the real decisions.

Default: 2,000 seeds. EVERSTEP_SIM_SEEDS sets another number, EVERSTEP_SIM_SEED plays one alone.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence

import pytest
from world import Ended, World

from elastic import job

SEEDS = int(os.environ.get("EVERSTEP_SIM_SEEDS", "2000"))


QUARTERS = range(4)
"""Parts of the seeds that can be played side by side."""


def seeds(quarter: int) -> Sequence[int]:
    """The seeds to play: one, if a person asks for it."""
    chosen = os.environ.get("EVERSTEP_SIM_SEED")
    mine = range(quarter, SEEDS, len(QUARTERS))
    return mine if chosen is None else [int(chosen)][quarter:]


@pytest.fixture(autouse=True)
def few_plans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plans are deleted as early as may be: in a story there are hardly ever 32."""
    monkeypatch.setattr(job, "KEPT_PLANS", 2)


@pytest.mark.parametrize("quarter", QUARTERS)
def test_all_invariants_hold_for_all_seeds(quarter: int) -> None:
    ended: list[Ended] = [World(seed).run() for seed in seeds(quarter)]
    outcomes = Counter(each.outcome for each in ended)
    assert sum(outcomes.values()) == len(ended)
    if len(ended) >= 100:
        # The seeds must exercise recovery, and mostly a recovery that succeeds.
        assert outcomes["completed"] > 0.6 * len(ended), outcomes
        assert outcomes["halted"] > 0, outcomes
        assert sum(each.generations for each in ended) > 2 * len(ended)
        assert sum(each.salvages for each in ended) > 0.1 * len(ended)
        assert sum(each.leaders for each in ended) > 1.3 * len(ended)


def test_a_seed_tells_the_same_story_twice() -> None:
    first, second = World(8), World(8)
    assert first.run() == second.run()
    assert [at for at, _, _ in first.clock.story] == [at for at, _, _ in second.clock.story]
    assert len(first.clock.story) > 10
