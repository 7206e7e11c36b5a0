"""The learning rate, as a function of the step alone.

Theory of operation. A schedule with state would have to be saved, restored and agreed on after each
failure. This one has none: the learning rate of step s is computed from s and the settings, so a
redone step uses the same rate as its first attempt, on every rank.
"""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, peak: float, minimum: float, warmup_steps: int, total_steps: int
) -> float:
    """Linear warm-up to the peak, then half a cosine down to the minimum.

    The first step has peak / warmup_steps (a rate of zero would waste it), step warmup_steps - 1
    has the peak, and step total_steps - 1, like any step after it, has the minimum. A run that is
    not longer than its warm-up ends while the rate still rises.

    Args:
        step: step of the run, from 0.
        peak: largest learning rate.
        minimum: learning rate at the end.
        warmup_steps: steps of warm-up; 0: none.
        total_steps: steps of the whole run.

    Raises:
        ValueError: step is negative.
    """
    if step < 0:
        raise ValueError(f"step is {step}; steps are counted from 0")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= total_steps - 1:
        return minimum
    progress = (step + 1 - warmup_steps) / (total_steps - warmup_steps)
    return minimum + (peak - minimum) * 0.5 * (1.0 + math.cos(math.pi * progress))
