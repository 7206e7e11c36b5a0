"""What the runtime inside a worker asks of the thing that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from elastic.plan import Plan
from elastic.topology import Coordinate


@dataclass(frozen=True, slots=True)
class StepFigures:
    """What a trainer tells of a step it committed; the fields are those of `StepDone`.

    `last`: no step follows.
    """

    loss: float
    grad_norm: float
    tokens: int
    sample_digest: str
    sharded_digest: int | None
    replicated_digest: int | None
    last: bool = False


class Trainable(Protocol):
    """What the runtime asks of the thing that is trained."""

    def apply(self, step: int, vote: tuple[float, ...]) -> None:
        """Update parameters from the reduced gradients held for `step`, with its vote."""

    def figures(self, step: int, vote: tuple[float, ...]) -> StepFigures:
        """Describe `step`, which was just applied."""

    def reshard(self, plan: Plan, place: Coordinate) -> None:
        """Receive the shards of `plan` beside the present ones, which stay valid."""

    def donate(self, plan: Plan, place: Coordinate) -> None:
        """Send what others need of the shards held at `place`, which `plan` does not fill."""

    def promote(self) -> None:
        """Switch to the shards received last."""

    def discard(self) -> None:
        """Forget the shards received last, if any."""

    def release(self) -> None:
        """Forget all shards: others go on without this worker."""
