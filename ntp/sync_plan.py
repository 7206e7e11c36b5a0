"""Layout -> how replicas at different degrees sum their gradients: who all-reduces, who sends.

Theory of operation. Replicas agree on homes, so the ranks of slot h in the replicas where h is
active hold the same atoms ``A_h`` and can all-reduce them: they are *members* of home h. A replica
that is no member is a *leaf* of h: its slots send their gradients of ``A_h`` to members before the
all-reduce (each piece to one, its *proxy*, which adds it), and get the sums back afterwards. Where
h is vacant, a replica can only be a leaf. Where h is active, it may be either.

Which is better is a matter of bytes. Let a slot be the proxy for a fraction p of what it holds, and
let there be R replicas. It sends 1 - p of what it holds once, and the sums of its fraction to R - 1
others: ``1 + (R - 2) * p`` times what it holds, and receives as much. A ring all-reduce among n
members, with R - n leaves, comes to the same with p = 1/n. As each atom has one proxy, the slots
together send the same number of bytes whatever the plan, and a plan chooses how they are spread.

A slot at degree d holds ``tp_base / d`` homes. As a leaf of all of them it sends that once, mostly
far less than a member of one home sends, and the many members share what this leaves to them. If
it is a member of its own home it sends what it adopted on top of that, and is the busiest slot. But
the more replicas are leaves, the more their few proxies carry. Homes can be judged one by one:
`plan_sync` makes those replicas members that have the home and a degree of at least t, with the t
for which the busiest slot sends least. Full replicas always are members.

If few replicas have a home, its members would carry far too much, and if none has it, there are no
members. Such a home is *reduced directly*: `ntp.sync_exchange` divides ``A_h`` wherever any
replica's ownership changes; each part has one holder per replica, and each of these is the proxy
for an equal run of the part (p = 1/R) and a leaf for the rest of it.

A plan says only who is what, in O(replicas * tp_base). `ntp.sync_exchange` derives from it what one
slot exchanges, and `ntp.sync_check` proves a plan.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

from ntp.geometry import ParallelLayout, SlotRef

DIRECT_GAIN = Fraction(5, 4)
"""A home is reduced directly only where its members would otherwise send this many times as much:
an all-reduce is one tuned collective, the other a message from everyone to everyone."""


@dataclass(frozen=True, slots=True)
class HomeSync:
    """Gradient sync of the atoms of one home slot.

    `members`: slot `home` of the replicas that all-reduce, ascending; none where the holders reduce
    directly. `leaves`: numbers of all other replicas, ascending. Raises ValueError if a replica is
    listed twice, an order is another, or a member is another slot.
    """

    home: int
    members: tuple[SlotRef, ...]
    leaves: tuple[int, ...]

    def __post_init__(self) -> None:
        inside = [member.replica for member in self.members]
        twice = set(inside) & set(self.leaves)
        if twice or inside != sorted(set(inside)) or list(self.leaves) != sorted(set(self.leaves)):
            raise ValueError(f"members and leaves of home {self.home} must be sorted and distinct")
        if any(member.slot != self.home for member in self.members):
            raise ValueError(f"members {self.members} of home {self.home} must be its slots")


@dataclass(frozen=True, slots=True)
class SyncPlan:
    """One HomeSync per home slot, in slot order. Raises ValueError if one is missing."""

    homes: tuple[HomeSync, ...]

    def __post_init__(self) -> None:
        if [sync.home for sync in self.homes] != list(range(len(self.homes))):
            raise ValueError("a sync plan has one entry for each home slot, in slot order")


def plan_sync(layout: ParallelLayout) -> SyncPlan:
    """The gradient sync of `layout`. The same layout always gives the same plan."""
    everyone = tuple(replica.replica for replica in layout.replicas)
    reduced = [replica for replica in layout.replicas if replica.degree < layout.tp_base]
    full = len(everyone) - len(reduced)
    homes: list[HomeSync] = []
    for home in range(layout.tp_base):
        having = Counter({layout.tp_base: full} if full else {})
        having.update(replica.degree for replica in reduced if home in replica.active)
        lacking = Counter(replica.degree for replica in reduced if home not in replica.active)
        least = _least_degree(layout.tp_base, having, lacking)
        if least > layout.tp_base:
            homes.append(HomeSync(home, (), everyone))
            continue
        leaves = tuple(
            replica.replica
            for replica in reduced
            if replica.degree < least or home not in replica.active
        )
        members = tuple(SlotRef(number, home) for number in everyone if number not in leaves)
        homes.append(HomeSync(home, members, leaves))
    return SyncPlan(tuple(homes))


def _least_degree(tp_base: int, having: Counter[int], lacking: Counter[int]) -> int:
    """From which degree on a replica that has the home is a member; beyond tp_base: none is.

    `having` and `lacking` count the replicas that have the home and that do not, by degree. The
    busiest slot decides; all figures are in homes that it sends.
    """
    replicas = having.total() + lacking.total()

    def held(degree: int) -> Fraction:
        return Fraction(tp_base, degree)

    # Every slot sends what it holds, and proxies more; see the module's docstring.
    floor = held(min(having | lacking))
    direct = floor
    for degree in having:
        direct = max(direct, held(degree) + Fraction(replicas - 2, replicas))
    for degree in lacking:
        adopted = min(held(degree) - 1, Fraction(1))  # of this home, at most
        direct = max(direct, held(degree) + adopted * Fraction(replicas - 2, replicas))

    best, least, members = DIRECT_GAIN * direct, tp_base + 1, 0
    for degree in sorted(having, reverse=True):
        members += having[degree]
        busiest = max(floor, held(degree) + Fraction(replicas - 2, members))
        # On equal bytes the more members the better, since an all-reduce needs no packing.
        if busiest <= best:
            best, least = busiest, degree
    return least
