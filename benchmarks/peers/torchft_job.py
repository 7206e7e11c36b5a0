"""A rank under torchft: each replica is a replica group of its own, started by its own torchrun.

A failed rank takes its replica out of the quorum; the others go on without its part of the batch.
Only collectives get the job's timeout: the manager's own must be longer, or a rank gives up while
it waits for another of its replica whose collective has yet to time out.
Its settings are ``default`` or the seconds between a manager's heartbeats.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torchft import Manager, ProcessGroupGloo

from benchmarks.bare_model import BareModel
from benchmarks.peers.told import Teller
from benchmarks.peers.training import RaiseOnRequest, begin
from ntp.geometry import SlotRef


def main() -> None:
    """Train to the end."""
    job = begin()
    dist.init_process_group("gloo", timeout=job.timeout)
    slot = SlotRef(int(os.environ["REPLICA_GROUP_ID"]), dist.get_rank())
    assert dist.group.WORLD is not None
    model = BareModel(job.config, slot, dist.group.WORLD)
    teller = Teller(job.fifo, slot.replica, slot.slot)
    request = RaiseOnRequest(teller)

    def load(saved: dict[str, torch.Tensor]) -> None:
        for tensor, name in zip(model.state.persistent, saved, strict=True):
            tensor.copy_(saved[name])
        model.state.publish()

    def state() -> dict[str, torch.Tensor]:
        return {str(number): tensor for number, tensor in enumerate(model.state.persistent)}

    heartbeat: dict[str, Any] = {}
    if job.settings != "default":
        heartbeat["heartbeat_interval"] = timedelta(seconds=float(job.settings))
    manager = Manager(
        pg=ProcessGroupGloo(timeout=job.timeout),
        load_state_dict=load,
        state_dict=state,
        min_replica_size=1,
        replica_id=f"replica{slot.replica}",
        hostname="127.0.0.1",
        # All replicas are initialised alike.
        init_sync=False,
        **heartbeat,
    )
    while (step := manager.current_step()) < job.config.train.steps:
        manager.start_quorum()
        model.compute_gradients(step)
        request.raise_if_asked(manager._quorum_id, step)
        manager.allreduce(model.state.gradients, reduce_op=dist.ReduceOp.SUM).wait()
        if manager.should_commit():
            model.apply_gradients(step)
            # A quorum is what an attempt is; nothing public names it.
            teller.tell(manager._quorum_id, step)


if __name__ == "__main__":
    main()
