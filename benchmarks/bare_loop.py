"""A bare megatron-core training loop: the yardstick of `benchmarks.overhead`.

Model, data, groups, gradient sync and optimizer are those of everstep. What is missing is what the
runtime adds: the commit vote, the session, the agent and controller, reports, digests of samples
and weights, and hooks for faults. Its ranks meet at a torch store, train, and return when each of
their steps was done.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.bare_model import BareModel, layout_of
from benchmarks.ranks import LOOPBACK, STORE_TIMEOUT_SECONDS, give, run_ranks, say
from elastic.rendezvous_client import RendezvousStore
from ntp.grad_sync import GradientSync, SyncGroups
from ntp.groups import groups_of
from ntp.process_groups import Link, ProcessGroups
from ntp.sync_plan import plan_sync
from trainer.config import RunConfig

PROGRESS_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class BareRun:
    """Seconds of each step but the first, and the mean loss of each step."""

    seconds: list[float]
    losses: list[float]


def run_bare_loop(config: RunConfig, logs: Path) -> BareRun:
    """Train for `config.train.steps` steps.

    A step ends when the last rank has done it, as in everstep's steps.jsonl.
    """
    given = run_ranks(train, config.parallel.devices, logs, config.model_dump_json())
    ended_at, loss_sums = zip(*given, strict=True)
    last = [max(times) for times in zip(*ended_at, strict=True)]
    seconds = [after - before for before, after in itertools.pairwise(last)]
    # All slots of a replica have the same loss: one of each is enough.
    by_replica = loss_sums[:: config.parallel.tensor]
    tokens = config.train.global_batch_size * config.train.seq_length
    losses = [sum(of_step) / tokens for of_step in zip(*by_replica, strict=True)]
    return BareRun(seconds, losses)


def train(connection: Connection, rank: int, size: int, address: str, payload: str) -> None:
    """One rank: give when each step was done (seconds since the epoch), and its losses."""
    torch.set_num_threads(1)
    config = RunConfig.model_validate_json(payload)
    layout = layout_of(config)
    slot = layout.slots()[rank]
    health = config.health
    groups = ProcessGroups(
        Link("gloo", LOOPBACK, health.rebuild_timeout_seconds, health.collective_timeout_seconds)
    )
    store = RendezvousStore(address, STORE_TIMEOUT_SECONDS)
    names = [str(member) for member in range(size)]
    groups.adopt(groups_of(rank, layout, plan_sync(layout), 1), names, rank, 1, store, frozenset())
    model = BareModel(config, slot, groups.tensor, lambda name: sync.ready(name))
    sync = GradientSync(
        plan_sync(layout),
        layout,
        slot,
        {ref: other for other, ref in enumerate(layout.slots())},
        model.state.shards,
        SyncGroups(groups.world, groups.home),
        contributes_replicated=slot.slot == layout.replica(slot.replica).active[0],
        bucket_bytes=config.train.gradient_bucket_bytes,
    )
    ended_at: list[float] = []
    loss_sums: list[float] = []
    told_at = time.monotonic()
    for step in range(config.train.steps):
        sync.begin(model.state.gradients, passes=model.passes)
        loss_sums.append(model.compute_gradients(step))
        sync.finish()
        model.apply_gradients(step)
        ended_at.append(time.time())
        if rank == 0 and time.monotonic() - told_at > PROGRESS_SECONDS:
            told_at = time.monotonic()
            say(connection, f"bare loop: {step + 1} steps done")
    give(connection, (ended_at, loss_sums))
    groups.close()
