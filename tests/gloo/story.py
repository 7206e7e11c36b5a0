"""Runs of the real worker and step loop through a story of losses and returns.

The real planner, worker, step loop and optimizer run; only the agent is missing: `Line` stands in
for the link to it. It asks for a pause where the layout is to change, or, where workers are lost in
the middle of a step, tells the others to stop.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dense import named
from harness import LINK, Rank
from planted import plant
from torch import Tensor

from elastic.answers import Answers
from elastic.heart import Heart
from elastic.messages import Quiesce, Quiesced, StepDone
from elastic.node_workers import WorkerSpec
from elastic.plan import Plan
from elastic.planner import Situation, plan_generation
from elastic.salvage import Salvage
from elastic.session import Standing
from elastic.topology import Coordinate, DeviceId, Member
from elastic.worker import StepAborted, Worker
from ntp.pipeline import ForwardBackward
from ntp.process_groups import is_connection_error
from trainer.config import RunConfig
from trainer.job import job_shape
from trainer.loop import StepLoop


@dataclass(frozen=True, slots=True)
class Chapter:
    """One generation: its plan, and the step before which the next one begins.

    `lost` are the workers that are lost when they have begun this step; the others then stop behind
    its backward pass.
    """

    plan: Plan
    until: int
    lost: tuple[Member, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """From `step` on these places are empty; `inside`: those that get lost do so in its middle."""

    step: int
    absent: tuple[Coordinate, ...]
    inside: bool = False


def story(
    config: RunConfig,
    absent: Mapping[int, tuple[Coordinate, ...]],
    split: tuple[int, ...] | None = None,
) -> list[Chapter]:
    """Plans of a run in which, from each step named in `absent`, these places are empty.

    A place that is filled again gets a new process. `split` overrides the planner's batch split.
    """
    turns = [Turn(step, places) for step, places in sorted(({0: ()} | dict(absent)).items())]
    return story_of(config, turns, split)


def story_of(
    config: RunConfig, turns: Sequence[Turn], split: tuple[int, ...] | None = None
) -> list[Chapter]:
    """Plans of a run that takes these turns, the first at step 0; see `story`."""
    job = job_shape(config)
    grid = [
        Coordinate(replica, stage, slot)
        for replica in range(job.replicas)
        for stage in range(job.stages)
        for slot in range(job.tensor)
    ]
    history: dict[int, Plan] = {}
    incarnations = dict.fromkeys(grid, 0)
    workers: dict[Coordinate, Member] = {}
    lost: list[tuple[Member, ...]] = []
    for generation, turn in enumerate(turns, start=1):
        step, before = turn.step, dict(workers)
        workers = {}
        for number, place in enumerate(grid):
            if place not in turn.absent:
                incarnations[place] += place not in before
                workers[place] = Member(DeviceId(0, number), incarnations[place])
        gone = {place: member for place, member in before.items() if place not in workers}
        lost.append(tuple(gone.values()) if turn.inside else ())
        wounded = {place.replica for place in gone}
        answers = [
            Quiesced(
                generation,
                member,
                Standing(
                    place.slot_ref,
                    committed=step - 1,
                    begun=step if turn.inside else step - 1,
                    prepared=step - 1,
                    voted=-1,
                    vote=None,
                    layout_generation=generation - 1,
                    pending_generation=0,
                    kept=generation - 1 if turn.inside and place.replica not in wounded else 0,
                )
                if before.get(place) == member
                else None,
                before.get(place) == member,
                0.0,
            )
            for place, member in workers.items()
        ]
        ready = {member.device: member for member in workers.values()}
        homes = {place: DeviceId(0, number) for number, place in enumerate(grid)}
        plan = plan_generation(
            job,
            Situation(generation, ready, Answers(answers if history else ()), history, "", homes),
        )
        assert isinstance(plan, Plan), plan
        assert plan.resume_step == step
        history[generation] = replace(plan, batch_split=split) if split else plan
    ends = [*(turn.step for turn in turns[1:]), config.train.steps]
    return [Chapter(*each) for each in zip(history.values(), ends, [*lost[1:], ()], strict=True)]


def members_of(chapters: list[Chapter]) -> list[Member]:
    """All processes of a run."""
    return sorted({a.member for chapter in chapters for a in chapter.plan.participants})


class Line:
    """The worker's link to nobody: keeps what is sent, and ends each chapter."""

    def __init__(self) -> None:
        self.done: list[StepDone] = []
        self.chapter: Chapter | None = None
        self._on_message: Callable[[Any], None] = lambda _message: None

    def start(self, on_message: Callable[[Any], None]) -> None:
        self._on_message = on_message

    def send(self, message: Any) -> None:
        if isinstance(message, StepDone):
            self.done.append(message)
            self.about_to_begin(message.step + 1, message.generation)

    send_later = send

    def about_to_begin(self, step: int, generation: int) -> None:
        """Ask for a pause if `step` is the last before it: its vote carries the wish."""
        assert self.chapter is not None
        if step == self.chapter.until - 1 and not self.chapter.lost:
            self._on_message(Quiesce(generation + 1, False, (), "the story goes on"))

    def strikes(self, step: int) -> bool:
        """Whether workers are lost in the middle of `step`."""
        assert self.chapter is not None
        return step == self.chapter.until and bool(self.chapter.lost)

    def hears_late(self, member: Member, plan: Plan) -> bool:
        """Whether `member` hears of a loss only behind its backward pass: every other one does,
        unless its own replica is hit."""
        assert self.chapter is not None
        hit = {place.replica for place, other in plan.placement if other in self.chapter.lost}
        mine = next(place.replica for place, other in plan.placement if other == member)
        return mine not in hit and member.device.index % 2 > 0

    def strike(self, member: Member, generation: int) -> None:
        """`member` is lost, or hears of those who are."""
        assert self.chapter is not None
        if member in self.chapter.lost:
            raise StepAborted("this worker is lost")
        self._on_message(Quiesce(generation + 1, True, self.chapter.lost, "lost in a step"))


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A stage's tensors on one slot in one step: summed gradients, and parameters after it."""

    step: int
    place: Coordinate
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Told:
    """What one rank reported and held."""

    steps: list[StepDone]
    snapshots: list[Snapshot]


def story_rank(
    rank: Rank,
    config: RunConfig,
    chapters: list[Chapter],
    trap: str | None,
    watched: Collection[int] = (),
) -> Told:
    """Live through `chapters` as one of their members; keeps tensors of the steps `watched`."""
    plant(trap)
    member = members_of(chapters)[rank.rank]
    cpu = torch.device("cpu")
    line = Line()
    heart = Heart(member, line, interval_seconds=3600.0)  # type: ignore[arg-type]
    worker = Worker(member, line, heart, rank.groups(), cpu)  # type: ignore[arg-type]
    spec = WorkerSpec(member, LINK.host, config.health, (), time.time(), "", Path(os.devnull))
    steps = StepLoop(config, worker, spec, cpu)
    training = steps.training
    snapshots: list[Snapshot] = []
    apply = training.apply

    def apply_and_keep(step: int, vote: tuple[float, ...]) -> None:
        state, place = training.current.state, training.current.place
        gradients = named(state.shards, state.gradients) if step in watched else {}
        apply(step, vote)
        if step in watched:
            snapshots.append(Snapshot(step, place, gradients, named(state.shards, state.master)))

    training.apply = apply_and_keep  # type: ignore[method-assign]
    run = ForwardBackward.run

    store = rank.store()

    def run_and_tell(passes: ForwardBackward, *arguments: Any) -> float:
        plan, step = worker.plan, worker.session.step
        assert plan is not None
        if not line.strikes(step):
            return run(passes, *arguments)
        # Whoever still were in the last vote would be another story.
        store.set(f"{plan.generation} {member}", "computes")
        store.wait([f"{plan.generation} {other}" for _, other in plan.placement])
        if not line.hears_late(member, plan):
            line.strike(member, plan.generation)
            return run(passes, *arguments)
        losses = run(passes, *arguments)
        line.strike(member, plan.generation)
        return losses

    ForwardBackward.run = run_and_tell  # type: ignore[method-assign]
    worker.start()
    for number, chapter in enumerate(chapters):
        if member not in {a.member for a in chapter.plan.participants}:
            worker.leave(training)
            continue
        line.chapter = chapter
        # Generations number the store's prefixes, and the store is that of all tests.
        layout_from = rank.generation + number if number else 0
        plan = replace(
            chapter.plan,
            generation=rank.generation + number + 1,
            source_generation=layout_from,
            rendezvous=rank.address,
            salvage=_renumbered(chapter.plan.salvage, rank.generation),
        )
        if not worker.adopt(plan, training, at=steps.strike):
            continue
        line.about_to_begin(plan.resume_step, plan.generation)
        try:
            steps.run()
        except Exception as error:
            training.abandon()
            if not isinstance(error, StepAborted) and not is_connection_error(error):
                raise
            worker.interrupted(error)
        assert worker.session.step == chapter.until
    return Told(line.done, snapshots)


def _renumbered(salvage: Salvage | None, by: int) -> Salvage | None:
    if salvage is None:
        return None
    kept = tuple(replace(each, generation=each.generation + by) for each in salvage.kept)
    return replace(salvage, kept=kept)
