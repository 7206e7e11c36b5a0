"""The same job as plain torchrun users write it: the yardstick of `benchmarks.recovery`.

Started by torchrun, once a rank and again after every failure. Replicas x TP over torch's default
gloo world, with tensor- and data-parallel groups made by new_group. Every so many steps the first
replica saves parameters and Adam's moments, and a start loads the newest complete save.

Each rank writes one JSON line a happening to a FIFO that the benchmark reads: ``start`` (rank, pid,
restart, the step it resumes at, when it was ready to) and ``step`` (rank, restart, step, when it
was done).
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.bare_model import BareModel
from benchmarks.common import die_with_parent
from ntp.geometry import SlotRef
from trainer.config import RunConfig

TIMEOUT = timedelta(seconds=60)


def main() -> None:
    """Train to the end: ``torchrun_job CONFIG_JSON CHECKPOINTS CHECKPOINT_STEPS FIFO``."""
    config_file, checkpoints, every, fifo = sys.argv[1:]
    die_with_parent()
    config = RunConfig.model_validate_json(Path(config_file).read_text())
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=TIMEOUT)
    rank, degree = dist.get_rank(), config.parallel.tensor
    slot = SlotRef(rank // degree, rank % degree)
    tensor_group, data_group = _groups(config, slot)
    model = BareModel(config, slot, tensor_group)
    tell = _teller(Path(fifo), rank)
    resumed = _load(Path(checkpoints), model, slot.slot)
    tell(happening="start", pid=os.getpid(), step=resumed, at=time.time())
    for step in range(resumed, config.train.steps):
        model.compute_gradients(step)
        dist.all_reduce(model.state.gradients, group=data_group)
        model.apply_gradients(step)
        tell(happening="step", step=step, at=time.time())
        if (step + 1) % int(every) == 0:
            _save(Path(checkpoints), model, slot, step + 1)
    dist.destroy_process_group()


def _groups(config: RunConfig, slot: SlotRef) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's tensor-parallel and data-parallel group; every rank takes part in making all."""
    degree, replicas = config.parallel.tensor, config.parallel.replicas
    tensor = [
        dist.new_group([replica * degree + place for place in range(degree)], timeout=TIMEOUT)
        for replica in range(replicas)
    ]
    data = [
        dist.new_group([replica * degree + place for replica in range(replicas)], timeout=TIMEOUT)
        for place in range(degree)
    ]
    return tensor[slot.replica], data[slot.slot]


def _teller(fifo: Path, rank: int) -> Callable[..., None]:
    descriptor = os.open(fifo, os.O_WRONLY)
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def tell(**fields: Any) -> None:
        line = json.dumps({"rank": rank, "restart": restart, **fields}) + "\n"
        # Short enough for a FIFO to take it whole, whoever else writes.
        os.write(descriptor, line.encode())

    return tell


def _save(checkpoints: Path, model: BareModel, slot: SlotRef, step: int) -> None:
    """Save what `step` starts from; complete once every part is there and ``newest`` says so."""
    if slot.replica == 0:
        folder = checkpoints / str(step)
        folder.mkdir(exist_ok=True)
        torch.save(model.state.persistent, folder / f"slot{slot.slot}.pt")
    dist.barrier()
    if slot == SlotRef(0, 0):
        partial = checkpoints / "newest.partial"
        partial.write_text(str(step))
        partial.replace(checkpoints / "newest")


def _load(checkpoints: Path, model: BareModel, slot: int) -> int:
    """Load the newest complete checkpoint, if there is one; returns the step to resume at."""
    newest = checkpoints / "newest"
    if not newest.exists():
        return 0
    step = int(newest.read_text())
    saved = torch.load(checkpoints / str(step) / f"slot{slot}.pt")
    for tensor, values in zip(model.state.persistent, saved, strict=True):
        tensor.copy_(values)
    model.state.publish()
    return step


if __name__ == "__main__":
    main()
