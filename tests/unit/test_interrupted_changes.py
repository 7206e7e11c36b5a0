"""A change of generation that is interrupted, wherever and however often, costs nothing.

Theory of operation. Worker processes are modelled by what they hold (`held_shards`). Nobody
receives shards before all have settled, as the ranks compare digests in between; nobody passes the
barrier before all have received; and no gradient is reduced before all that have a place passed. So
when a plan is interrupted, its participants are at most one state apart, but for those who leave:
these may be held up at the barrier while others commit steps.

A story is a list of rounds. A round loses workers, plans from the answers of those left, and puts
each participant into one of the two states that it allows. The story goes on with one loss, but
every loss is tried that takes all holders of a piece in one layout and leaves another layout whole:
state that is held in two layouts at once is what changes that are interrupted leave behind.
Whatever comes of it, each plan is worked out for everybody to the end and held against what it
promises. There is none only if no layout is whole at the newest step that anybody knows.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from itertools import chain, combinations, product, takewhile

from clusters import devices_on
from held_shards import Process, everything, received
from hypothesis import given, note, settings
from hypothesis import strategies as st
from scenes import job_shape

from elastic.answers import Answers
from elastic.job_shape import home_devices
from elastic.plan import NoPlan, Plan
from elastic.plan_change import changed, difference
from elastic.planner import Situation, plan_generation
from elastic.topology import DeviceId, Member
from ntp.atoms import Axis

GRIDS = ((2, 1, 2), (2, 1, 3), (3, 1, 2), (2, 2, 2), (1, 2, 3))
"""Tensor-parallel degree, pipeline stages and replicas."""

NODE = 2
"""Devices of a node, which are given up together."""


class Reach(IntEnum):
    """What the participants of a plan are about to do when it is interrupted."""

    RUN = 3
    PASS = 2
    RECEIVE = 1
    SETTLE = 0


@dataclass(frozen=True)
class Round:
    """What happens to one plan; devices are named by their numbers.

    Before it is made, fresh workers come `back`, `leaving` devices are to be given up, and those on
    `lost` ones die, unless another `way` to lose some is taken. Then who is `ahead` does what all
    are about to do. If all are to run, they commit `steps` and go through `events` of the next, the
    `eager` and the `keen` through more; `told` if the controller hears that all have passed.
    """

    back: frozenset[int]
    leaving: frozenset[int]
    lost: frozenset[int]
    way: int
    reach: Reach
    ahead: frozenset[int]
    steps: int
    events: int
    eager: frozenset[int]
    keen: frozenset[int]
    told: bool


@dataclass(frozen=True)
class Story:
    """A job, and what happens to it."""

    grid: tuple[int, int, int]
    spares: int
    rounds: tuple[Round, ...]


@cache
def rounds_on(devices: int) -> st.SearchStrategy[Round]:
    numbers = range(devices)
    # A set drawn as one number, or out of a list of them, takes a fraction of the time.
    some = st.integers(0, 2**devices - 1).map(
        lambda bits: frozenset(number for number in numbers if bits >> number & 1)
    )
    nodes = [numbers[first : first + NODE] for first in numbers[::NODE]]
    pairs = [frozenset(chain(*each)) for size in range(3) for each in combinations(nodes, size)]
    return st.builds(
        Round,
        back=some,
        leaving=st.sampled_from(pairs),
        lost=st.sampled_from([frozenset[int]()] * 2 + [frozenset({each}) for each in numbers]),
        way=st.integers(0, 7),
        # Most are interrupted before they run.
        reach=st.sampled_from((*Reach, Reach.PASS, Reach.RECEIVE, Reach.SETTLE)),
        ahead=some,
        steps=st.integers(0, 1),
        events=st.integers(0, 2),
        eager=some,
        keen=some,
        told=st.booleans(),
    )


@st.composite
def stories(draw: st.DrawFn) -> Story:
    tensor, stages, replicas = grid = draw(st.sampled_from(GRIDS))
    spares = draw(st.integers(0, 2))
    rounds = rounds_on(tensor * stages * replicas + spares)
    # Most of a job is not its start.
    first = replace(draw(rounds), lost=frozenset(), leaving=frozenset())
    if draw(st.integers(0, 3)):
        first = replace(first, reach=Reach.RUN)
    return Story(grid, spares, (first, *draw(st.lists(rounds, min_size=4, max_size=8))))


@dataclass(frozen=True)
class Change:
    """A plan, who is alive, and the states through which it takes its participants.

    `elsewhere`: it does not go on from the newest layout that some have adopted.
    """

    plan: Plan
    alive: Collection[Member]
    states: tuple[Mapping[Member, Process], ...]
    elsewhere: bool


class World:
    """The processes and the plans. `involved` are those who are asked before the next plan."""

    def __init__(self, story: Story) -> None:
        tensor, stages, replicas = story.grid
        self.shape = job_shape(tensor=tensor, stages=stages, replicas=replicas)
        self.everything = everything(self.shape.counts, stages)
        devices = devices_on(self.shape, NODE, story.spares)
        self.homes = home_devices(self.shape, devices)
        self.numbers = {device: number for number, device in enumerate(devices)}
        self.seen = {device: Member(device, 1) for device in devices}
        self.alive = {member: Process(member) for member in self.seen.values()}
        self.history: dict[int, Plan] = {}
        self.involved: frozenset[Member] = frozenset()
        self.leaving: frozenset[DeviceId] = frozenset()

    def live_through(self, round_: Round) -> bool:
        """Returns whether the job goes on."""
        for device, number in self.numbers.items():
            if number in round_.back and self.seen[device] not in self.alive:
                self.seen[device] = Member(device, self.seen[device].incarnation + 1)
                self.alive[self.seen[device]] = Process(self.seen[device])
        self.leaving = frozenset(d for d, n in self.numbers.items() if n in round_.leaving)
        lost = {member for member in self.alive if self.numbers[member.device] in round_.lost}
        changes = [self.change(lost), *map(self.change, self.ways_to_lose())]
        possible = [change for change in changes if change]
        # What is rare, and rarer still twice in a row, comes first.
        possible = [each for each in possible if each.elsewhere and round_.way] or possible
        if possible:
            change = possible[round_.way % len(possible)]
            note(f"{change.plan.generation}: {change.plan.reason}")
            self.carry_out(change, round_)
        return bool(possible)

    def ways_to_lose(self) -> Iterator[set[Member]]:
        """All who hold a piece in one layout, where another one is whole without them."""
        asked = [self.alive[member] for member in self.involved & self.alive.keys()]
        layouts = sorted({layout for process in asked for layout in process.held})
        slots = product(range(self.shape.stages), range(self.shape.counts.kv_groups))
        known: list[set[Member]] = []
        for layout, (stage, atom) in product(layouts if len(layouts) > 1 else (), slots):
            piece = stage, Axis.KV_GROUP, atom
            lost = {p.member for p in asked if layout in p.held and piece in p.held[layout].pieces}
            left = [process for process in asked if process.member not in lost]
            if lost not in known and any(self.is_whole(each, left) for each in layouts):
                known.append(lost)
                yield lost

    def is_whole(self, layout: int, asked: Collection[Process]) -> bool:
        """Whether all is held in the layout of that generation."""
        held = (process.held[layout].pieces for process in asked if layout in process.held)
        return set(chain.from_iterable(held)) == self.everything

    def is_newest(self, layout: int, asked: Collection[Process]) -> bool:
        """Whether nobody knows a newer step than those who hold that layout."""
        return max((process.furthest, layout in process.held) for process in asked)[1]

    def change(self, lost: Collection[Member]) -> Change | None:
        """The plan without these, held against all that it promises; None if there rightly is
        none."""
        alive = {member: each for member, each in self.alive.items() if member not in lost}
        asked = [process for member, process in alive.items() if member in self.involved]
        generation = max(self.history, default=0) + 1
        situation = Situation(
            generation,
            {member.device: member for member in alive},
            Answers(process.answer(generation) for process in asked),
            self.history,
            "node0:7",
            self.homes,
            leaving=self.leaving,
            silent=self.involved - alive.keys(),
            idle=alive.keys() - self.involved,
        )
        plan, previous = plan_generation(self.shape, situation), situation.previous
        if isinstance(plan, NoPlan):
            whole = [layout for layout in self.history if self.is_whole(layout, asked)]
            newest = [layout for layout in whole if self.is_newest(layout, asked)]
            assert not newest, f"all is held in the layouts of {newest}, but {plan.reason}"
            return None
        assert plan.members <= alive.keys()
        for process in asked:
            known = f"{process.member} knows of step {process.furthest}, but {plan.reason}"
            assert process.furthest < plan.resume_step, known
        if "to be avoided take part" not in plan.reason:
            assert self.leaving.isdisjoint(member.device for _, member in plan.placement)
        if previous and (published := difference(previous, plan)):
            assert changed(previous, published) == plan
        before = {member: alive[member] for _, member in plan.participants}
        settled = {member: process.settled(plan) for member, process in before.items()}
        has_shards = received(plan, settled)
        passed = {member: process.passed() for member, process in has_shards.items()}
        adopted = max((each.current.generation for each in asked if each.current), default=0)
        elsewhere = plan.source_generation not in (0, adopted)
        return Change(plan, alive.keys(), (before, settled, has_shards, passed), elsewhere)

    def carry_out(self, change: Change, round_: Round) -> None:
        """Each participant comes as far as the round says, and the next plan can be asked for."""
        plan, states = change.plan, change.states
        # What is rare comes to no end, so that yet rarer things come of it.
        reach = Reach(round_.reach % 2) if change.elsewhere else round_.reach
        placed, passed = {member for _, member in plan.placement}, states[-1]
        # Those who take no part forget everything before they are asked again.
        self.alive = {member: Process(member) for member in change.alive}
        for member in passed:
            runs = reach is Reach.RUN and member in placed
            ahead = runs or self.numbers[member.device] in round_.ahead
            self.alive[member] = states[min(reach, Reach.PASS) + ahead][member]
        # Until the controller hears that the change is over, it asks those who leave, too.
        over = round_.told and all(self.alive[member] is passed[member] for member in passed)
        self.involved = frozenset(placed if over else passed)
        self.history[plan.generation] = plan
        there = {member for member in placed if self.alive[member] is passed[member]}
        eager, keen = (
            {member for member in there if self.numbers[member.device] in each}
            for each in (round_.eager, round_.keen)
        )
        done, events = (4 * round_.steps, round_.events) if there == placed else (0, 0)
        for row in plan.rows().values():
            mates = {member for _, member in row}
            for member in mates & there:
                # Who holds a vote may be a commit and a beginning ahead; others hold one or none.
                more = min((member in eager) + 2 * (member in keen), 3 if events == 2 else 1)
                after = self.alive[member].on(done + events + more)
                if not events and member in keen and mates <= eager | keen:
                    after = replace(after, session=after.session.keep(plan.generation))
                self.alive[member] = after


@settings(derandomize=True, deadline=None, max_examples=300)
@given(stories())
def test_what_interrupted_changes_leave_behind_is_enough_to_go_on(story: Story) -> None:
    """`World.change` holds each plan, or that there is none, against what is held."""
    world = World(story)
    lived = list(takewhile(world.live_through, story.rounds))
    assert lived, "a job that lost nobody begins"
    assert list(world.history) == list(range(1, len(lived) + 1)), "a plan for each generation"
