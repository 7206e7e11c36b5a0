"""What a simulated worker's gradient is the sum of."""

from __future__ import annotations

from clock import Clock

from elastic.plan import Plan
from ntp.ranges import Range


class Gradient:
    """The samples that are behind a gradient, by their indices.

    `mixed`: other replicas' may have come into it, so that it is of no use to go on from.
    `goes_on`: the step in flight began with what was kept of it.
    """

    def __init__(self) -> None:
        self.samples: list[int] = []
        self.mixed = self.goes_on = False
        self._under_way: list[int] | None = None

    def begin(self, clock: Clock, plan: Plan, replica: int, step: int) -> None:
        """A step begins, with what the plan keeps of it or with nothing."""
        share = next(each for number, each in plan.shares(step) if number == replica)
        self.goes_on = bool(share.kept)
        if share.kept:
            whole = self._under_way is None and not self.mixed
            clock.check(whole, "replica %d goes on from spoiled gradients", replica)
        else:
            self.samples = []
        self.mixed = False
        self._under_way = indices(share.fresh)

    def under(self, plan: Plan, replica: int, stays: bool) -> Gradient:
        """The gradient under a new plan: this one where the state `stays`, or else a new one.

        `stays`: the worker holds state, and keeps its place.
        """
        before = plan.source_layout
        if stays and before and before.replica(replica) == plan.layout.replica(replica):
            return self
        return Gradient()

    def complete(self) -> None:
        """The backward pass of the last microbatch is over."""
        assert self._under_way is not None
        self.samples += self._under_way
        self._under_way = None


def indices(samples: tuple[Range, ...]) -> list[int]:
    """Every sample of these ranges."""
    return [index for part in samples for index in range(part.start, part.stop)]
