"""What `benchmarks.recovery` does to a job, and what it learns from it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from statistics import median
from typing import TypeAlias


class Strike(StrEnum):
    """One way to fail, without a warning."""

    SIGKILL = "SIGKILL"
    SIGSTOP = "SIGSTOP"
    RAISE = "raise"
    AGENT_KILL = "agent kill"
    NODE_LOSS = "node loss"


@dataclass(frozen=True, slots=True)
class Recovery:
    """The answer to one strike.

    Attributes:
        seconds: from the strike to the next completed step of the job; infinite beyond the limit.
        lost_steps: steps that had been completed before the strike and were done again.
    """

    seconds: float
    lost_steps: int


@dataclass(frozen=True, slots=True)
class Missing:
    """Why a cell of the table has no figures."""

    reason: str


Cell: TypeAlias = Sequence[Recovery] | Missing
"""The runs of one system under one strike: at least one, or the reason why there is none."""


def median_seconds(cell: Cell) -> float:
    """Median over the runs of a cell; infinite where most runs, or all, have no end."""
    if isinstance(cell, Missing):
        return math.inf
    return median(recovery.seconds for recovery in cell)


def cell_text(cell: Cell, limit_seconds: float) -> str:
    """Median seconds with their range, and the range of lost steps."""
    if isinstance(cell, Missing):
        return cell.reason
    ended = [recovery for recovery in cell if math.isfinite(recovery.seconds)]
    if not ended:
        return f"> {limit_seconds:g}"
    lost = sorted({recovery.lost_steps for recovery in ended})
    steps = f"{lost[0]}" if len(lost) == 1 else f"{lost[0]}-{lost[-1]}"
    seconds = [recovery.seconds for recovery in cell]
    low, middle, high = (
        _seconds(value, limit_seconds) for value in (min(seconds), median(seconds), max(seconds))
    )
    return f"{middle} ({low} .. {high}), {steps} lost"


def _seconds(value: float, limit_seconds: float) -> str:
    return f"{value:.2f}" if math.isfinite(value) else f"> {limit_seconds:g}"
