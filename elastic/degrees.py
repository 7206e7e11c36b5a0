"""At which degree each replica is to run: a search for two copies and the highest throughput.

Pure. Workers are alike but for where they are, so the first question is how many slots each replica
gets; `elastic.placement` then finds who sits where. The search starts with the slots that are
complete as they are and climbs: in every round it tries, for each two kinds of replicas (`Crew`),
to give so many slots to one, from the free workers or from the other, and takes what helps most.
The number of kinds is small however many replicas there are, so a round is cheap.

Free workers can be given away at no cost to anybody. Slots that are active can be taken only from
wounded replicas: a whole one has groups that live, and is what the others recover from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

from elastic.job_shape import JobShape
from elastic.memory_fit import MemoryFit
from elastic.placement import Roster, Seating, complete_slots, seat, slots_to_keep
from elastic.throughput import TYPICAL, Crew, Score, ThroughputModel, copies
from elastic.topology import Coordinate, DeviceId, Member

MOST_ROUNDS = 256
"""Rounds of one climb: more would not pay for the time that they take."""

Crews = Mapping[int, Crew]
"""Every replica by its number, with degree 0 where it is left out."""


class _Trade(NamedTuple):
    """Of a replica like `giver`, `given` slots go (None: free workers give), and one like
    `receiver` gets `received` (None: nobody)."""

    giver: Crew | None
    given: int
    receiver: Crew | None
    received: int


@dataclass(frozen=True, slots=True)
class Search:
    """What all questions of one decision have in common."""

    shape: JobShape
    model: ThroughputModel
    memory: MemoryFit
    roster: Roster

    def seating(self, crews: Crews) -> Seating | None:
        """How `crews` can be realised; None if they cannot."""
        size = self.shape.tensor * self.shape.stages
        changed = {
            replica: crew.degree
            for replica, crew in crews.items()
            if crew.degree < self.shape.tensor or len(self.roster.rows.get(replica, ())) < size
        }
        return seat(self.shape, self.memory, self.roster, changed)

    def throughput(self, crews: Crews) -> float:
        """Samples a second relative to full strength."""
        return self.model.throughput(Counter(crews.values()))

    def copies(self, crews: Crews) -> int:
        """Copies of the state, counted up to 2."""
        return copies(Counter(crews.values()))

    def free_workers(self, crews: Crews) -> int:
        """How many workers have no part in `crews`."""
        roster = self.roster
        workers = len(roster.idle)
        workers += sum(map(len, roster.rows.values())) + sum(map(len, roster.returned.values()))
        return workers - self.shape.stages * sum(crew.degree for crew in crews.values())


def present_crews(
    search: Search, homes: Mapping[Coordinate, DeviceId], paces: Mapping[int, int]
) -> dict[int, Crew]:
    """The replicas with the slots that are complete if nobody changes place."""
    shape, roster = search.shape, search.roster
    crews: dict[int, Crew] = {}
    for replica in range(shape.replicas):
        row = roster.rows.get(replica, ())
        present: dict[Coordinate, Member] = {}
        degree = shape.tensor
        if wounded := len(row) < shape.tensor * shape.stages:
            present = {**dict(row), **roster.returned.get(replica, {})}
            degree = len(complete_slots(present, shape.stages))
        nodes: tuple[int, ...] = ()
        if not shape.rules.tensor_across_nodes:
            home = homes.get(Coordinate(replica, 0, 0))
            there = {member.device.node for member in present.values()}
            nodes = tuple(sorted(there)) or ((home.node,) if home else ())
        crews[replica] = Crew(
            degree,
            paces.get(replica, TYPICAL),
            len(roster.held.get(replica, ())) if search.memory.limit else 0,
            nodes,
            wounded,
        )
    return crews


def without_returned(search: Search, present: Crews) -> Crews:
    """`present` with only those at work who hold state."""
    rows, stages = search.roster.rows, search.shape.stages
    return {
        replica: crew._replace(degree=len(complete_slots(dict(rows.get(replica, ())), stages)))
        if crew.wounded
        else crew
        for replica, crew in present.items()
    }


def fitting(search: Search, crews: Crews) -> Crews:
    """`crews` without those replicas that memory does not allow."""
    shape, memory, roster = search.shape, search.memory, search.roster
    if not memory.limit:
        return crews

    def fits(replica: int, crew: Crew) -> bool:
        if not crew.wounded or not crew.degree:
            return memory.fits(0, crew.degree)
        slots = slots_to_keep(shape, roster, replica, crew.degree)
        return roster.fits(memory, replica, slots)

    return {
        replica: crew if fits(replica, crew) else crew._replace(degree=0)
        for replica, crew in crews.items()
    }


def most(search: Search, candidates: Iterable[Crews]) -> Crews:
    """The first of those with the highest score."""
    return max(candidates, key=lambda crews: search.model.score(Counter(crews.values())) or (-inf,))


def climb(
    search: Search,
    crews: Crews,
    *,
    trading: bool,
    receives: Callable[[Crew], bool] = lambda crew: True,
) -> Crews:
    """Make the best trade, again and again, until none helps; only some may receive.

    Free workers are given away also where that does not hurt: a smaller part needs less memory, and
    there is one copy more of it.
    """
    for _ in range(MOST_ROUNDS):
        counts = Counter(crews.values())
        now = search.model.score(counts)
        better: list[tuple[Score, _Trade]] = []
        free_slots = search.free_workers(crews) // search.shape.stages
        receivers = [crew for crew in sorted(counts) if receives(crew)]
        for trade in _trades(search, counts, receivers, free_slots, trading=trading):
            score = search.model.score(_after(counts, trade))
            free = trade.giver is None
            if score is not None and (now is None or score > now or (free and score == now)):
                better.append((score, trade))
        # The sort is stable: of equal trades the one that is tried first.
        better.sort(key=lambda each: each[0], reverse=True)
        for _, trade in better:
            changed = _make(search, crews, trade)
            if _is_free(search) or search.seating(changed) is not None:
                crews = changed
                break
        else:
            return crews
    return crews


def sharing(search: Search, crews: Crews) -> Iterator[Crews]:
    """Give up one wounded replica of each kind, and share its workers among those at work."""
    last = {crew: replica for replica, crew in crews.items() if crew.degree and crew.wounded}
    for crew, replica in sorted(last.items()):
        without = {**crews, replica: crew._replace(degree=0)}
        # Else it could win them back one by one, where only all of them together help the others.
        yield climb(search, without, trading=False, receives=lambda crew: crew.degree > 0)


def _is_free(search: Search) -> bool:
    """Whether any worker can take any place."""
    return search.shape.rules.tensor_across_nodes and not search.memory.limit


def _trades(
    search: Search,
    counts: Mapping[Crew, int],
    receivers: Sequence[Crew],
    free: int,
    *,
    trading: bool,
) -> Iterator[_Trade]:
    """All trades of one giver and one receiver that memory allows."""
    fits, tensor, crews = search.memory.fits, search.shape.tensor, sorted(counts)
    givers = [crew for crew in crews if crew.degree and crew.wounded] if trading else []
    for receiver in receivers:
        for received in range(1, tensor - receiver.degree + 1):
            if not fits(receiver.held, receiver.degree + received):
                continue
            if received <= free:
                yield _Trade(None, 0, receiver, received)
            # The free workers may all be on nodes where they cannot help.
            parts = {received - free, 0 if _is_free(search) else received}
            for giver in givers:
                able = {part for part in parts if 0 < part <= giver.degree}
                if not able or (giver == receiver and counts[giver] < 2):
                    continue
                for given in sorted(able | {giver.degree}):
                    if given == giver.degree or fits(giver.held, giver.degree - given):
                        yield _Trade(giver, given, receiver, received)
    for giver in givers:
        yield _Trade(giver, giver.degree, None, 0)


def _after(counts: Mapping[Crew, int], trade: _Trade) -> Counter[Crew]:
    """The crews when `trade` is made."""
    after = Counter(counts)
    for crew, change in ((trade.giver, -trade.given), (trade.receiver, trade.received)):
        if crew is not None:
            after[crew] -= 1
            after[crew._replace(degree=crew.degree + change)] += 1
    return +after


def _make(search: Search, crews: Crews, trade: _Trade) -> Crews:
    """Make `trade`: the first replica of its kind that lacks least receives, the last gives."""
    changed = dict(crews)
    if trade.giver is not None:
        giver = max(replica for replica, crew in crews.items() if crew == trade.giver)
        changed[giver] = trade.giver._replace(degree=trade.giver.degree - trade.given)
    if trade.receiver is not None:
        receivers = [replica for replica, crew in changed.items() if crew == trade.receiver]
        roster = search.roster

        def present(replica: int) -> int:
            return len(roster.rows.get(replica, ())) + len(roster.returned.get(replica, ()))

        receiver = min(receivers, key=lambda replica: (-present(replica), replica))
        degree = trade.receiver.degree + trade.received
        changed[receiver] = trade.receiver._replace(degree=degree)
    return changed
