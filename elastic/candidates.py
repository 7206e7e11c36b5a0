"""At which degree each replica is to run: candidates compared by throughput.

Pure. Workers are alike but for where they are, so the first question is how many slots each replica
gets; `elastic.placement` then finds who sits where. The search starts with the slots that are
complete as they are and climbs: in every round it tries, for each two kinds of replicas (`Crew`),
to give so many slots to one, from the free workers or from the other, and takes what helps most.
The number of kinds is small however many replicas there are, so a round is cheap.

It climbs twice. First only free workers are given away, which costs nobody anything; then active
slots of wounded replicas too, whose workers must move their state, and one may be given up. That is
taken only if it gains `least_gain` of a replica. Both results, and what was impossible, are told as
alternatives of the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from elastic.job import JobShape
from elastic.memory_fit import MemoryFit, memory_fit
from elastic.placement import Roster, Seating, complete_slots, seat
from elastic.plan import Action, Alternative, NoPlan
from elastic.throughput import TYPICAL, Crew, Score, ThroughputModel, throughput_model
from elastic.topology import Coordinate, DeviceId

MOST_ROUNDS = 256
"""Rounds of one climb: more would not pay for the time that they take."""

Crews = Mapping[int, Crew]
"""Every replica by its number, with degree 0 where it is left out."""


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided, and what else there was."""

    seating: Seating
    alternatives: tuple[Alternative, ...]


class _Trade(NamedTuple):
    """Of a replica like `giver`, `given` slots go (None: free workers give), and one like
    `receiver` gets `received` (None: nobody)."""

    giver: Crew | None
    given: int
    receiver: Crew | None
    received: int


@dataclass(frozen=True, slots=True)
class _Search:
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
        return self.model.throughput(Counter(crews.values()))


def choose(
    shape: JobShape,
    roster: Roster,
    homes: Mapping[Coordinate, DeviceId],
    paces: Mapping[int, int],
) -> Choice | NoPlan:
    """The best placement that is found; NoPlan if none is possible.

    `paces` are those of `elastic.throughput.relative_paces`.
    """
    search = _Search(shape, throughput_model(shape, paces), memory_fit(shape), roster)
    present = _present(search, homes, paces)
    fitting = {
        replica: crew if search.memory.fits(crew.held, crew.degree) else crew._replace(degree=0)
        for replica, crew in present.items()
    }
    steady = _climb(search, fitting, trading=False)
    traded = _climb(search, steady, trading=True)
    gain = search.throughput(traded) - search.throughput(steady)
    worthwhile = gain * shape.replicas >= shape.rules.least_gain
    taken = traded if worthwhile else steady
    seating = search.seating(taken)
    if seating is None or not seating.rows:
        return NoPlan(_impossible(search, present))
    alternatives = (
        *_too_big(search, present, taken),
        *_not_taken(search, steady, traded, worthwhile),
        *_without_spares(search, taken),
        *_without_wounded(search, taken),
        *_without_vacancies(search, taken),
    )
    return Choice(seating, alternatives)


def _present(
    search: _Search, homes: Mapping[Coordinate, DeviceId], paces: Mapping[int, int]
) -> dict[int, Crew]:
    """The replicas with the slots that are complete without anybody changing place."""
    shape, roster = search.shape, search.roster
    crews: dict[int, Crew] = {}
    for replica in range(shape.replicas):
        row = roster.rows.get(replica, ())
        degree = shape.tensor
        if len(row) < shape.tensor * shape.stages:
            places = [*dict(row), *roster.returned.get(replica, ())]
            degree = len(complete_slots(places, shape.stages))
        home = homes.get(Coordinate(replica, 0, 0))
        local = home is not None and not shape.rules.tensor_across_nodes
        crews[replica] = Crew(
            degree,
            paces.get(replica, TYPICAL),
            roster.held.get(replica, 0) if search.memory.limit else 0,
            home.node if home is not None and local else -1,
        )
    return crews


def _free_workers(search: _Search, crews: Crews) -> int:
    """How many workers have no part in `crews`."""
    roster = search.roster
    workers = len(roster.idle)
    workers += sum(map(len, roster.rows.values())) + sum(map(len, roster.returned.values()))
    return workers - search.shape.stages * sum(crew.degree for crew in crews.values())


def _climb(search: _Search, crews: Crews, *, trading: bool) -> Crews:
    """Make the best trade, again and again, until none helps.

    Free workers are given away also where that does not hurt: a smaller part needs less memory, and
    there is one copy more of it.
    """
    for _ in range(MOST_ROUNDS):
        counts = Counter(crews.values())
        now = search.model.score(counts)
        better: list[tuple[Score, _Trade]] = []
        free_slots = _free_workers(search, crews) // search.shape.stages
        for trade in _trades(search, counts, free_slots, trading=trading):
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


def _is_free(search: _Search) -> bool:
    """Whether any worker can take any place."""
    return search.shape.rules.tensor_across_nodes and not search.memory.limit


def _trades(
    search: _Search, counts: Mapping[Crew, int], free: int, *, trading: bool
) -> Iterator[_Trade]:
    """All trades of one giver and one receiver that memory allows."""
    fits, tensor, crews = search.memory.fits, search.shape.tensor, sorted(counts)
    # A whole replica gives nothing: its groups live, and it is what others recover from.
    givers = [crew for crew in crews if 0 < crew.degree < tensor] if trading else []
    for receiver in crews:
        for received in range(1, tensor - receiver.degree + 1):
            if not fits(receiver.held, receiver.degree + received):
                continue
            if received <= free:
                yield _Trade(None, 0, receiver, received)
                continue
            for giver in givers:
                least = received - free
                if least > giver.degree or (giver == receiver and counts[giver] < 2):
                    continue
                for given in sorted({least, giver.degree}):
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


def _make(search: _Search, crews: Crews, trade: _Trade) -> Crews:
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


# What else there was, and why it was not taken.


def _impossible(search: _Search, present: Crews) -> str:
    stages = search.shape.stages
    if any(crew.degree for crew in present.values()):
        crew = max(present.values(), key=lambda each: each.degree)
        return f"no replica fits: {search.memory.problem(crew.held, crew.degree)}"
    return f"no slot has a worker in each of the {stages} pipeline stages"


def _too_big(search: _Search, present: Crews, taken: Crews) -> Iterator[Alternative]:
    for replica, crew in present.items():
        if taken[replica].degree < crew.degree and not search.memory.fits(crew.held, crew.degree):
            why = f"replica {replica}: {search.memory.problem(crew.held, crew.degree)}"
            yield Alternative(Action.REDUCE_TP, search.throughput({**taken, replica: crew}), why)
            return


def _not_taken(
    search: _Search, steady: Crews, traded: Crews, worthwhile: bool
) -> Iterator[Alternative]:
    if traded == steady:
        return
    if worthwhile:
        why = "keeps every active slot where it is, for less throughput"
        yield Alternative(Action.REDUCE_TP, search.throughput(steady), why)
    else:
        least = search.shape.rules.least_gain
        why = f"moves slots between replicas for less than {least:.0%} of what a replica does"
        yield Alternative(Action.REDUCE_TP, search.throughput(traded), why)


def _without_spares(search: _Search, taken: Crews) -> Iterator[Alternative]:
    """Only who holds state goes on, in its place."""
    roster, shape = search.roster, search.shape
    left = {
        replica: crew._replace(
            degree=shape.tensor
            if len(row := roster.rows.get(replica, ())) == shape.tensor * shape.stages
            else len(complete_slots(dict(row), shape.stages))
        )
        for replica, crew in taken.items()
    }
    if roster.held and sum(c.degree for c in left.values()) < sum(c.degree for c in taken.values()):
        why = "leaves workers idle that are ready"
        yield Alternative(Action.REDUCE_TP, search.throughput(left), why)


def _without_wounded(search: _Search, taken: Crews) -> Iterator[Alternative]:
    tensor = search.shape.tensor
    wounded = [replica for replica, crew in taken.items() if 0 < crew.degree < tensor]
    rest = {r: crew._replace(degree=0) if r in wounded else crew for r, crew in taken.items()}
    if not wounded or not any(crew.degree for crew in rest.values()):
        return
    throughput = search.throughput(rest)
    less = throughput < search.throughput(taken)
    what = f"replica {wounded[0]}" if len(wounded) == 1 else f"{len(wounded)} wounded replicas"
    why = f"leaves out {what}, " + ("for less throughput" if less else "a copy of the state")
    yield Alternative(Action.DROP_REPLICA, throughput, why)


def _without_vacancies(search: _Search, taken: Crews) -> Iterator[Alternative]:
    """All slots filled, if there were the workers for it."""
    tensor, stages = search.shape.tensor, search.shape.stages
    if all(crew.degree == tensor for crew in taken.values()):
        return
    idle = _free_workers(search, taken)
    if not idle:
        why = "no idle worker is ready"
    elif idle < stages:
        why = f"{idle} idle workers are too few for a slot in each of {stages} stages"
    elif not search.shape.rules.tensor_across_nodes:
        why = f"{idle} idle workers are on other nodes, and cluster.tensor_across_nodes is off"
    else:
        why = f"{idle} idle workers gain nothing, or their memory is too small"
    whole = {replica: crew._replace(degree=tensor) for replica, crew in taken.items()}
    yield Alternative(Action.SWAP_SPARE, search.throughput(whole), why)
