"""What the controller keeps of who is silent and who is idle is what the planner would find."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic import job
from elastic.job_shape import JobShape
from elastic.plan import NoPlan, Plan
from elastic.planner import plan_generation
from elastic.situation import Situation
from tests.sim.world import World

SEEDS = 100


def test_what_is_kept_is_what_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = silent = 0

    def both(shape: JobShape, situation: Situation) -> Plan | NoPlan:
        nonlocal idle, silent
        plan = plan_generation(shape, situation)
        assert plan == plan_generation(shape, replace(situation, silent=None, idle=None))
        idle += bool(situation.previous and situation.idle)
        silent += bool(situation.silent)
        return plan

    monkeypatch.setattr(job, "plan_generation", both)
    for seed in range(SEEDS):
        World(seed).run()
    assert idle > SEEDS // 4 and silent > SEEDS // 4
