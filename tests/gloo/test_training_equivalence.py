"""Whole steps of two replicas at TP2 against one replica in one piece, on the same global batches.

The real worker, step loop, planner and optimizer run; only the agent is missing: `Line` stands in
for the link to it and asks for a pause where the layout is to change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from harness import LINK, Cluster, Mismatch, Rank
from planted import plant

from elastic.agent import WorkerSpec
from elastic.messages import Quiesce, Quiesced, StepDone
from elastic.plan import Plan
from elastic.planner import JobShape, Situation, plan_generation
from elastic.session import Standing
from elastic.topology import Coordinate, DeviceId, Member
from elastic.worker import Worker
from ntp.atoms import atom_elements_by_axis
from ntp.model_shape import atom_counts, tensor_specs
from trainer.config import RunConfig, model_shape
from trainer.loop import StepLoop

STEPS = 5
TOLERANCE = 1e-12


def configuration(tensor: int, replicas: int) -> RunConfig:
    """A run in float64 with a large learning rate, weight decay and clipping that bites."""
    return RunConfig.model_validate(
        {
            "cluster": {"devices_per_node": tensor * replicas},
            "parallel": {"tensor": tensor, "replicas": replicas},
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 6,
                "num_query_groups": 3,
                "kv_channels": 4,
                "ffn_hidden_size": 53,
                "vocab_size": 257,
                "add_bias_linear": True,
            },
            "data": {"kind": "text", "path": __file__},
            "train": {
                "steps": STEPS,
                "global_batch_size": 4,
                "micro_batch_size": 1,
                "seq_length": 16,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "weight_decay": 0.1,
                "clip_grad": 0.3,
                "dtype": "float64",
            },
        }
    )


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
    shape = model_shape(config)
    job = JobShape(
        counts=atom_counts(shape),
        sizes=atom_elements_by_axis(tensor_specs(shape)),
        tensor=config.parallel.tensor,
        replicas=config.parallel.replicas,
        global_batch_size=config.train.global_batch_size,
        micro_batch_size=config.train.micro_batch_size,
        steps=config.train.steps,
    )
    grid = [
        Coordinate(replica, 0, slot)
        for replica in range(job.replicas)
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
        plan = plan_generation(
            job, Situation(generation, workers, answers if history else {}, history, "")
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
    return sorted({a.member for chapter in chapters for a in chapter.plan.placement})


class Line:
    """The worker's link to nobody: keeps what is sent, and asks for a pause before step `until`."""

    def __init__(self) -> None:
        self.done: list[StepDone] = []
        self.until = STEPS
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


def training_rank(
    rank: Rank, config: RunConfig, chapters: list[Chapter], trap: str | None
) -> list[StepDone]:
    plant(trap)
    member = members_of(chapters)[rank.rank]
    cpu = torch.device("cpu")
    line = Line()
    worker = Worker(member, line, rank.groups(), cpu)  # type: ignore[arg-type]
    spec = WorkerSpec(member, LINK.host, config.health, (), time.time(), "")
    steps = StepLoop(config, worker, spec, cpu)
    worker.start()
    for number, chapter in enumerate(chapters):
        if member not in {a.member for a in chapter.plan.placement}:
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
        worker.adopt(plan, steps.training)
        line.about_to_begin(plan.resume_step, plan.generation)
        steps.run()
        assert worker.session.step == chapter.until
    return line.done


def run_story(
    cluster: Cluster, config: RunConfig, chapters: list[Chapter], trap: str | None = None
) -> list[StepDone]:
    """The steps' reports, after checking that all ranks say the same and replicas are equal."""
    reports = cluster.run(training_rank, len(members_of(chapters)), config, chapters, trap)
    steps = []
    for step in range(config.train.steps):
        said = [done for rank in reports for done in rank if done.step == step]
        figures = {(d.loss, d.grad_norm, d.tokens, d.sample_digest) for d in said}
        if len(figures) != 1:
            raise Mismatch(f"step {step}: ranks report {figures}")
        digests: dict[int, list[StepDone]] = {}
        for done in said:
            digests.setdefault(done.replica, []).append(done)
        wholes = {
            (sum(d.sharded_digest or 0 for d in mine) % 2**64, *{d.replicated_digest for d in mine})
            for mine in digests.values()
        }
        if len(wholes) != 1:
            raise Mismatch(f"step {step}: replicas differ, digests {wholes}")
        steps.append(said[0])
    return steps


def check_training(
    cluster: Cluster,
    absent: Mapping[int, tuple[Coordinate, ...]],
    split: tuple[int, ...] | None = None,
    trap: str | None = None,
) -> None:
    """Raise Mismatch unless the run's steps are those of one replica in one piece."""
    whole = configuration(1, 1)
    wanted = run_story(cluster, whole, story(whole, {}))
    config = configuration(2, 2)
    got = run_story(cluster, config, story(config, absent, split), trap)
    assert wanted[0].loss - wanted[-1].loss > 0.05, "nothing is learned: the check would be blind"
    for ours, theirs in zip(got, wanted, strict=True):
        if ours.sample_digest != theirs.sample_digest or ours.tokens != theirs.tokens:
            raise Mismatch(f"step {ours.step} consumed other samples")
        for what in ("loss", "grad_norm"):
            value, reference = getattr(ours, what), getattr(theirs, what)
            if not abs(value - reference) <= TOLERANCE * abs(reference):
                raise Mismatch(f"step {ours.step}: {what} {value!r} instead of {reference!r}")


SLOT = Coordinate(1, 0, 0)


@pytest.mark.parametrize("split", [(2, 2), (3, 1)])
def test_two_replicas_are_one(cluster: Cluster, split: tuple[int, ...]) -> None:
    check_training(cluster, {}, split)


def test_a_reduced_replica_changes_nothing(cluster: Cluster) -> None:
    check_training(cluster, {2: (SLOT,), 4: ()})


def test_a_dropped_replica_changes_nothing(cluster: Cluster) -> None:
    check_training(cluster, {1: (SLOT, Coordinate(1, 0, 1)), 3: (SLOT,), 4: ()})
