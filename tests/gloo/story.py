"""Runs of the real worker and step loop through a story of losses and returns.

The real planner, worker, step loop and optimizer run; only the agent is missing: `Line` stands in
for the link to it and asks for a pause where the layout is to change.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dense import named
from harness import LINK, Rank
from planted import plant
from torch import Tensor

from elastic.heart import Heart
from elastic.messages import Quiesce, Quiesced, StepDone
from elastic.node_workers import WorkerSpec
from elastic.plan import Plan
from elastic.planner import Situation, plan_generation
from elastic.session import Standing
from elastic.topology import Coordinate, DeviceId, Member
from elastic.worker import Worker
from trainer.config import RunConfig
from trainer.job import job_shape
from trainer.loop import StepLoop


@dataclass(frozen=True, slots=True)
class Chapter:
    """One generation: its plan, and the step at which the next one begins."""

    plan: Plan
    until: int


def story(
    config: RunConfig,
    absent: Mapping[int, tuple[Coordinate, ...]],
    split: tuple[int, ...] | None = None,
) -> list[Chapter]:
    """Plans of a run in which, from each step named in `absent`, these places are empty.

    A place that is filled again gets a new process. `split` overrides the planner's batch split.
    """
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
    starts = sorted({0, *absent})
    for generation, step in enumerate(starts, start=1):
        before = dict(workers)
        workers = {}
        for number, place in enumerate(grid):
            if place not in absent.get(step, ()):
                incarnations[place] += place not in before
                workers[place] = Member(DeviceId(0, number), incarnations[place])
        answers = {
            member: Quiesced(
                generation,
                member,
                Standing(place.slot_ref, step - 1, step - 1, step - 1, -1, None, generation - 1, 0)
                if before.get(place) == member
                else None,
                before.get(place) == member,
                0.0,
            )
            for place, member in workers.items()
        }
        ready = {member.device: member for member in workers.values()}
        homes = {place: DeviceId(0, number) for number, place in enumerate(grid)}
        plan = plan_generation(
            job, Situation(generation, ready, answers if history else {}, history, "", homes)
        )
        assert isinstance(plan, Plan), plan
        assert plan.resume_step == step
        history[generation] = replace(plan, batch_split=split) if split else plan
    return [
        Chapter(plan, until)
        for plan, until in zip(history.values(), [*starts[1:], config.train.steps], strict=True)
    ]


def members_of(chapters: list[Chapter]) -> list[Member]:
    """All processes of a run."""
    return sorted({a.member for chapter in chapters for a in chapter.plan.participants})


class Line:
    """The worker's link to nobody: keeps what is sent, and asks for a pause before step `until`."""

    def __init__(self) -> None:
        self.done: list[StepDone] = []
        self.until = 0
        self._on_message: Callable[[Any], None] = lambda _message: None

    def start(self, on_message: Callable[[Any], None]) -> None:
        self._on_message = on_message

    def send(self, message: Any) -> None:
        if isinstance(message, StepDone):
            self.done.append(message)
            self.about_to_begin(message.step + 1, message.generation)

    def about_to_begin(self, step: int, generation: int) -> None:
        """Ask for a pause if `step` is the last before it: its vote carries the wish."""
        if step == self.until - 1:
            self._on_message(Quiesce(generation + 1, False, (), "the story goes on"))


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
    worker.start()
    for number, chapter in enumerate(chapters):
        if member not in {a.member for a in chapter.plan.participants}:
            worker.leave(training)
            continue
        line.until = chapter.until
        # Generations number the store's prefixes, and the store is that of all tests.
        layout_from = rank.generation + number if number else 0
        plan = replace(
            chapter.plan,
            generation=rank.generation + number + 1,
            source_generation=layout_from,
            rendezvous=rank.address,
        )
        if not worker.adopt(plan, training, at=steps.strike):
            continue
        line.about_to_begin(plan.resume_step, plan.generation)
        steps.run()
        assert worker.session.step == chapter.until
    return Told(line.done, snapshots)
