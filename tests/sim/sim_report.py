"""What a simulated worker reports of a step."""

from __future__ import annotations

from elastic.messages import StepDone
from elastic.topology import Member


def step_done(
    member: Member,
    generation: int,
    replica: int,
    step: int,
    vote: tuple[float, ...],
    now: float,
    *,
    awaited: bool,
) -> StepDone:
    """The report of `step`, committed now; its attempt began in `generation`."""
    return StepDone(
        generation=generation,
        member=member,
        replica=replica,
        step=step,
        loss=0.0,
        grad_norm=0.0,
        tokens=int(vote[0]),
        sample_digest="",
        sharded_digest=None,
        replicated_digest=None,
        started_at=now,
        compute_seconds=0.5 + 0.3 * replica,
        at=now,
        awaited=awaited,
    )
