"""The candidates for a plan, compared by throughput, and what is told of those not taken.

Pure. Two results of `elastic.degrees` compete. In the *steady* one, only workers are given a place
that have none. In the other, wounded replicas may also trade active slots, whose workers must move
their state, or be given up. That is taken only if it gains `least_gain` of a replica, or makes two
copies of the state of one. The other result, and what was impossible, are told as alternatives of
the plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from elastic.degrees import (
    Crews,
    Search,
    climb,
    fitting,
    most,
    present_crews,
    sharing,
    without_returned,
)
from elastic.job_shape import JobShape
from elastic.memory_fit import memory_fit
from elastic.placement import Roster, Seating
from elastic.plan import Action, Alternative, NoPlan
from elastic.throughput import throughput_model
from elastic.topology import Coordinate, DeviceId


@dataclass(frozen=True, slots=True)
class Choice:
    """What was decided, and what else there was."""

    seating: Seating
    alternatives: tuple[Alternative, ...]


def choose(
    shape: JobShape,
    roster: Roster,
    homes: Mapping[Coordinate, DeviceId],
    paces: Mapping[int, int],
) -> Choice | NoPlan:
    """The best placement that is found; NoPlan if none is possible.

    `paces` are those of `elastic.throughput.relative_paces`.
    """
    search = Search(shape, throughput_model(shape, paces), memory_fit(shape), roster)
    present = present_crews(search, homes, paces)
    alone = fitting(search, without_returned(search, present))
    fit = fitting(search, present)
    steady = climb(search, fit, trading=False)
    traded = most(search, (climb(search, steady, trading=True), *sharing(search, steady), alone))
    gain = search.throughput(traded) - search.throughput(steady)
    safer = search.copies(traded) > search.copies(steady)
    worthwhile = safer or gain * shape.replicas >= shape.rules.least_gain
    taken = traded if worthwhile else steady
    seating = search.seating(taken)
    if seating is None or not seating.rows:
        return NoPlan(_impossible(search, present))
    alternatives = (
        *_too_big(search, present, fit, taken),
        *_not_taken(search, steady, traded, worthwhile),
        *_without_newcomers(search, alone, taken),
        *_without_wounded(search, taken),
        *_without_vacancies(search, taken),
    )
    return Choice(seating, alternatives)


# What else there was, and why it was not taken.


def _impossible(search: Search, present: Crews) -> str:
    stages = search.shape.stages
    if any(crew.degree for crew in present.values()):
        crew = max(present.values(), key=lambda each: each.degree)
        return f"no replica fits: {search.memory.problem(crew.held, crew.degree)}"
    return f"no slot has a worker in each of the {stages} pipeline stages"


def _too_big(search: Search, present: Crews, fit: Crews, taken: Crews) -> Iterator[Alternative]:
    for replica, crew in present.items():
        if taken[replica].degree < crew.degree and fit[replica] != crew:
            why = f"replica {replica}: {search.memory.problem(crew.held, crew.degree)}"
            yield Alternative(Action.REDUCE_TP, search.throughput({**taken, replica: crew}), why)
            return


def _not_taken(
    search: Search, steady: Crews, traded: Crews, worthwhile: bool
) -> Iterator[Alternative]:
    if traded == steady:
        return
    if worthwhile:
        less = search.copies(steady) == search.copies(traded)
        for_what = "less throughput" if less else "a single copy of the state"
        why = f"keeps every active slot where it is, for {for_what}"
        yield Alternative(Action.REDUCE_TP, search.throughput(steady), why)
    else:
        least = search.shape.rules.least_gain
        why = f"moves slots between replicas for less than {least:.0%} of what a replica does"
        yield Alternative(Action.REDUCE_TP, search.throughput(traded), why)


def _without_newcomers(search: Search, alone: Crews, taken: Crews) -> Iterator[Alternative]:
    fewer = sum(c.degree for c in alone.values()) < sum(c.degree for c in taken.values())
    if fewer and any(crew.degree for crew in alone.values()):
        why = "leaves workers idle that are ready"
        yield Alternative(Action.REDUCE_TP, search.throughput(alone), why)


def _without_wounded(search: Search, taken: Crews) -> Iterator[Alternative]:
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


def _without_vacancies(search: Search, taken: Crews) -> Iterator[Alternative]:
    """All slots filled, if there were the workers for it."""
    tensor, stages = search.shape.tensor, search.shape.stages
    if all(crew.degree == tensor for crew in taken.values()):
        return
    idle = search.free_workers(taken)
    if not idle:
        why = "no idle worker is ready"
    elif idle < stages:
        why = f"{idle} idle workers are too few for a slot in each of {stages} stages"
    elif not search.shape.rules.tensor_across_nodes:
        why = f"{idle} idle workers are on other nodes, and cluster.tensor_across_nodes is off"
    else:
        why = f"{idle} idle workers gain nothing, or their memory is too small"
    whole = {
        replica: crew._replace(degree=tensor) if crew.degree < tensor else crew
        for replica, crew in taken.items()
    }
    yield Alternative(Action.SWAP_SPARE, search.throughput(whole), why)
