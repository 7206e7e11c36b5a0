"""Whole recoveries as transcripts that a person can read, and by one successor after another.

EVERSTEP_REWRITE=1 rewrites the transcripts; read the difference before you keep it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from node_scenarios import NODE_SCENARIOS
from scenarios import WORKER_SCENARIOS
from scenes import Stage

from elastic.effects import (
    Phase,
)
from elastic.topology import Member

TRANSCRIPTS = Path(__file__).parent / "transcripts"
REWRITE = os.environ.get("EVERSTEP_REWRITE") == "1"
SCENARIOS = (*WORKER_SCENARIOS, *NODE_SCENARIOS)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_scenario_goes_as_its_transcript_says(scenario: Callable[[], Stage]) -> None:
    text = "\n".join(scenario().lines) + "\n"
    path = TRANSCRIPTS / f"{scenario.__name__}.txt"
    if REWRITE:
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    assert text == path.read_text()


def known_steps(stage: Stage) -> dict[Member, int]:
    """What the controller knows to be committed."""
    return {member: step for member, step in stage.controller.committed.items() if step >= 0}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_a_scenario_ends_alike_if_every_event_meets_another_controller(
    scenario: Callable[[], Stage], monkeypatch: pytest.MonkeyPatch
) -> None:
    told = scenario()
    monkeypatch.setattr(Stage, "successors", True)
    again = scenario()
    assert again.controller.phase is told.controller.phase
    assert again.controller.generation == told.controller.generation
    assert again.controller.plans == told.controller.plans
    if told.controller.phase is not Phase.HALTED:
        assert known_steps(again) == known_steps(told)


def test_no_transcript_is_left_over() -> None:
    expected = {f"{scenario.__name__}.txt" for scenario in SCENARIOS}
    assert {path.name for path in TRANSCRIPTS.iterdir()} == expected
