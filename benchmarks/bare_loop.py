"""A bare megatron-core training loop: the yardstick of `benchmarks.overhead`.

Model, data, groups, gradient sync and optimizer are those of everstep. What is missing is what the
runtime adds: the commit vote, the session, the agent and controller, reports, digests of samples
and weights, and hooks for faults. `benchmarks.bare_job` starts its ranks.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from benchmarks.bare_model import BareModel, layout_of
from benchmarks.ranks import LOOPBACK, STORE_TIMEOUT_SECONDS, give
from elastic.rendezvous_client import RendezvousStore
from ntp.grad_sync import GradientSync, SyncGroups
from ntp.groups import groups_of
from ntp.process_groups import Link, ProcessGroups
from ntp.sync_plan import plan_sync
from trainer.config import RunConfig


def train(
    connection: Connection, rank: int, size: int, address: str, payload: str, steps: Path
) -> None:
    """One rank: give when each step was done (seconds since the epoch), and its losses.

    The first rank adds a line to the file `steps` with each step.
    """
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
    for step in range(config.train.steps):
        sync.begin(model.state.gradients, passes=model.passes)
        loss_sums.append(model.compute_gradients(step))
        sync.finish()
        model.apply_gradients(step)
        ended_at.append(time.time())
        if rank == 0:
            with steps.open("a") as lines:
                lines.write(f"{step}\n")
    give(connection, (ended_at, loss_sums))
