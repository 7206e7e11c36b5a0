"""The plans that were published, each made whole from the one before it.

Pure. Readers take them in order of generation. One that comes late begins with a whole plan: a new
worker with the one that its agent hands it, an agent or a controller with the one that the leader
wrote last (`WholePlan`), which the changes after it complete.

The leader keeps the last `KEPT_PLANS` plans in the store, of which the oldest is whole. They are
far more than anybody can need: once all workers run a generation they hold its layout, and no
report is so late that it belongs to the sixteenth before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping

from elastic.messages import Adopt, WholePlan
from elastic.plan import Plan
from elastic.plan_change import PlanChange, changed, difference

KEPT_PLANS = 16
"""Plans that are left when old ones are deleted, which happens once there are twice as many."""


def publication(plans: Mapping[int, Plan], plan: Plan) -> Adopt | PlanChange:
    """How `plan` is told to those who know `plans`, the ones before it by generation."""
    change = difference(plans[max(plans)], plan) if plans else None
    return Adopt(plan) if change is None else change


def rebuilt(whole: WholePlan | None, published: Iterable[Adopt | PlanChange]) -> dict[int, Plan]:
    """All plans that can be made whole, by generation.

    Those before `whole` may lack their base, which is being deleted. Raises ValueError if a later
    one does, or is not what its author had.
    """
    plans = {} if whole is None else {whole.plan.generation: whole.plan}
    oldest = min(plans, default=0)
    for each in sorted(published, key=generation_of):
        if generation_of(each) in plans:
            continue
        if isinstance(each, Adopt):
            plans[each.plan.generation] = each.plan
        elif each.base in plans:
            plans[each.generation] = changed(plans[each.base], each)
        elif each.generation > oldest:
            raise ValueError(f"plan {each.generation} changes plan {each.base}, which nobody wrote")
    return dict(sorted(plans.items()))


def generation_of(published: Adopt | PlanChange) -> int:
    """Of the plan that is told."""
    return published.plan.generation if isinstance(published, Adopt) else published.generation


class PlanChain:
    """One reader's plans. They are made whole when the newest is asked for, and not before."""

    def __init__(self) -> None:
        self._whole: Plan | None = None
        self._changes: deque[PlanChange] = deque()
        self._generation = 0

    def take(self, published: Adopt | PlanChange) -> bool:
        """The next one; returns whether it is new."""
        generation = generation_of(published)
        if generation <= self._generation:
            return False
        self._generation = generation
        if isinstance(published, Adopt):
            self._whole = published.plan
            self._changes.clear()
        else:
            self._changes.append(published)
        return True

    def newest(self) -> Plan | None:
        """The newest plan, whole; None before the first.

        Raises ValueError if a base is missing, or a plan is not what its author had.
        """
        while self._changes:
            change = self._changes.popleft()
            if self._whole is None:
                raise ValueError(f"plan {change.generation} changes plan {change.base}: unknown")
            self._whole = changed(self._whole, change)
        return self._whole


def chain_of(messages: Iterable[object]) -> PlanChain:
    """The plans among `messages`, which come in any order."""
    found = list(messages)
    chain = PlanChain()
    for each in found:
        if isinstance(each, WholePlan):
            chain.take(Adopt(each.plan))
    published = (each for each in found if isinstance(each, Adopt | PlanChange))
    for each in sorted(published, key=generation_of):
        chain.take(each)
    return chain
