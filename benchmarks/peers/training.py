"""The training that all peers' jobs share: the same model and step, in torch's default group.

A job that a peer restarts loads the newest checkpoint, which the first replica saves every
`CHECKPOINT_STEPS` steps. Replicas x TP, with one node a replica: when a node is gone, the world may
be smaller, and the replicas that are left share the batch.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.bare_model import BareModel
from benchmarks.common import die_with_parent
from benchmarks.peers.told import Teller
from ntp.geometry import SlotRef
from trainer.config import RunConfig

CHECKPOINT_STEPS = 10
RAISE_SIGNAL = signal.SIGUSR1


class AskedToRaise(RuntimeError):
    """What a rank raises when the benchmark asks it to fail that way."""


@dataclass(frozen=True, slots=True)
class Job:
    """A rank's arguments: ``CONFIG_JSON CHECKPOINTS FIFO SETTINGS TIMEOUT_SECONDS``."""

    config: RunConfig
    checkpoints: Path
    fifo: Path
    settings: str
    timeout: timedelta


class RaiseOnRequest:
    """Makes this process raise in its next step, once `RAISE_SIGNAL` has arrived."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller
        self._asked = False
        signal.signal(RAISE_SIGNAL, self._ask)

    def raise_if_asked(self, attempt: int, step: int) -> None:
        """Raise AskedToRaise after telling so. A place of its own: peers swallow what is raised
        within their calls."""
        if self._asked:
            self._asked = False
            self._teller.tell(attempt, step, raised=True)
            raise AskedToRaise(f"asked to in step {step}")

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True


def begin() -> Job:
    """Called first in every rank: reads its arguments, and ties it to its agent."""
    config_file, checkpoints, fifo, settings, seconds = sys.argv[1:]
    die_with_parent()
    torch.set_num_threads(1)
    config = RunConfig.model_validate_json(Path(config_file).read_text())
    timeout = timedelta(seconds=float(seconds))
    return Job(config, Path(checkpoints), Path(fifo), settings, timeout)


def train(job: Job, after_step: Callable[[], None]) -> None:
    """Train in the default process group to the end, from the newest checkpoint."""
    degree = job.config.parallel.tensor
    replicas = dist.get_world_size() // degree
    slot = SlotRef(dist.get_rank() // degree, dist.get_rank() % degree)
    teller = Teller(job.fifo, slot.replica, slot.slot)
    request = RaiseOnRequest(teller)
    tensor_group, data_group = _groups(degree, replicas, slot, job.timeout)
    parallel = job.config.parallel.model_copy(update={"replicas": replicas})
    config = job.config.model_copy(update={"parallel": parallel})
    model = BareModel(config, slot, tensor_group)
    attempt = _agree_on_attempt()
    resumed = _load(job.checkpoints, model, slot.slot)
    for step in range(resumed, config.train.steps):
        model.compute_gradients(step)
        request.raise_if_asked(attempt, step)
        dist.all_reduce(model.state.gradients, group=data_group)
        model.apply_gradients(step)
        teller.tell(attempt, step)
        after_step()
        if (step + 1) % CHECKPOINT_STEPS == 0:
            _save(job.checkpoints, model, slot, step + 1)


def _groups(
    degree: int, replicas: int, slot: SlotRef, timeout: timedelta
) -> tuple[dist.ProcessGroup, dist.ProcessGroup]:
    """This rank's tensor-parallel and data-parallel group; every rank takes part in making all."""
    tensor = [
        dist.new_group([replica * degree + place for place in range(degree)], timeout=timeout)
        for replica in range(replicas)
    ]
    data = [
        dist.new_group([replica * degree + place for replica in range(replicas)], timeout=timeout)
        for place in range(degree)
    ]
    return tensor[slot.replica], data[slot.slot]


def _agree_on_attempt() -> int:
    """A number that all ranks share and that no earlier attempt had: milliseconds of the epoch."""
    latest = torch.tensor([int(time.time() * 1000)])
    dist.all_reduce(latest, op=dist.ReduceOp.MAX)
    return int(latest.item())


def _save(checkpoints: Path, model: BareModel, slot: SlotRef, step: int) -> None:
    """Save what `step` starts from; complete once every part is there and ``newest`` says so."""
    if slot.replica == 0:
        folder = checkpoints / str(step)
        folder.mkdir(exist_ok=True)
        partial = folder / f"slot{slot.slot}.partial"
        torch.save(model.state.persistent, partial)
        partial.replace(folder / f"slot{slot.slot}.pt")
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
