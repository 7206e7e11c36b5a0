"""One rank of a job that does nothing but backward and gradient sync, in several ways.

Backward multiplies matrices of the sizes of the model's, reports each gradient as it is complete,
and sums activations among the slots of a replica where the model does. A step ends with a small
all-reduce over all ranks, as a real one does with its vote.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from benchmarks.ranks import LOOPBACK, STORE_TIMEOUT_SECONDS, give
from elastic.rendezvous_client import RendezvousStore
from ntp.geometry import SlotRef, full_layout, vacate
from ntp.grad_sync import GradientSync, SyncGroups
from ntp.groups import groups_of
from ntp.local_shards import LocalShards
from ntp.model_shape import atom_counts, tensor_specs
from ntp.process_groups import Link, ProcessGroups
from ntp.sync_plan import plan_sync
from trainer.config import RunConfig, model_shape

KIB = 1024
ONE_BUCKET = 1 << 40
BUCKETS = {
    "one bucket": ONE_BUCKET,
    "1 MiB buckets": 1024 * KIB,
    "512 KiB buckets": 512 * KIB,
    "256 KiB buckets": 256 * KIB,
}
WITHOUT = "no sync"
BLOCKING = "after backward, blocking"
AFTER = "after backward"

JobShape = tuple[RunConfig, int, int, tuple[int, ...]]
"""Configuration of the model, replicas, TP degree, and the last replica's vacant slots."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a step: by the clock, and of processor time."""

    clock: float
    processor: float


def ways_of(lost: Sequence[int]) -> tuple[str, ...]:
    """Names of the ways to sync that are compared where these slots are vacant."""
    # Two all-reduces, which know nothing of degrees.
    blocking = () if lost else (BLOCKING,)
    return (WITHOUT, *blocking, AFTER, *(f"within, {name}" for name in BUCKETS))


def measure(
    connection: Connection,
    rank: int,
    size: int,
    address: str,
    shape: JobShape,
    rounds: int,
    steps: int,
) -> None:
    """Give what each way costs this rank, by round."""
    torch.set_num_threads(1)
    job = _Job(rank, address, shape)
    costs: dict[str, list[Cost]] = {way: [] for way in ways_of(shape[3])}
    for turn in range(rounds + 1):
        for way in costs:
            step = job.step_of(way)
            clock, processor = time.perf_counter(), time.process_time()
            for _ in range(steps):
                step()
                job.vote()
            clock, processor = time.perf_counter() - clock, time.process_time() - processor
            if turn:  # The first is a warm-up.
                costs[way].append(Cost(clock / steps, processor / steps))
    give(connection, costs)


class _Job:
    """What one rank holds, and its steps by the name of the way to sync."""

    def __init__(self, rank: int, address: str, shape: JobShape) -> None:
        config, replicas, tensor, lost = shape
        self._model = model_shape(config)
        layout = full_layout(atom_counts(self._model), tensor, replicas)
        for slot in lost:
            layout = vacate(layout, SlotRef(replicas - 1, slot))

        self._slot = layout.slots()[rank]
        self._plan = plan_sync(layout)
        self.groups = ProcessGroups(Link("gloo", LOOPBACK, 60.0, 60.0))
        self.groups.adopt(
            groups_of(rank, layout, self._plan, 1),
            [str(ref) for ref in layout.slots()],
            rank,
            1,
            RendezvousStore(address, STORE_TIMEOUT_SECONDS),
            frozenset(),
        )
        self._specs = tensor_specs(self._model)
        replica = layout.replica(self._slot.replica)
        self._shards = LocalShards(self._specs, replica.shards, self._slot.slot)
        self._gradients = torch.zeros(self._shards.total, dtype=torch.float64)
        self._matrices = self._as_matrices()
        self._tokens = config.train.micro_batch_size * config.train.seq_length
        self._activations = torch.zeros(self._tokens, self._model.hidden, dtype=torch.float64)
        self._syncs = {
            name: GradientSync(
                self._plan,
                layout,
                self._slot,
                {ref: position for position, ref in enumerate(layout.slots())},
                self._shards,
                SyncGroups(self.groups.stage, self.groups.home),
                contributes_replicated=self._slot.slot == replica.active[0],
                bucket_bytes=bucket_bytes,
            )
            for name, bucket_bytes in BUCKETS.items()
        }

    def step_of(self, way: str) -> Callable[[], None]:
        """A step that syncs in this way."""
        if way == WITHOUT:
            return lambda: self._backward(_ignore)
        if way == BLOCKING:
            return self._blocking
        if way == AFTER:
            return lambda: self._synced(self._syncs["one bucket"], within=False)
        return lambda: self._synced(self._syncs[way.removeprefix("within, ")], within=True)

    def vote(self) -> None:
        """Wait for all ranks."""
        dist.all_reduce(torch.zeros(6, dtype=torch.float64), group=self.groups.world)

    def _blocking(self) -> None:
        self._backward(_ignore)
        sharded = self._shards.sharded
        dist.all_reduce(self._gradients[sharded:], group=self.groups.stage)
        assert self.groups.home is not None
        dist.all_reduce(self._gradients[:sharded], group=self.groups.home)

    def _synced(self, sync: GradientSync, *, within: bool) -> None:
        sync.begin(self._gradients, 1)
        self._backward(sync.ready if within else _ignore)
        sync.finish()

    def _backward(self, ready: Callable[[str], None]) -> None:
        for spec in reversed(self._specs):
            matrix = self._matrices.get(spec.name)
            if matrix is not None:
                rows, columns = matrix.shape
                # Zeros: the gradients stay what they are, however often they are summed.
                outgoing = torch.zeros(self._tokens, rows, dtype=torch.float64)
                incoming = torch.zeros(self._tokens, columns, dtype=torch.float64)
                matrix.addmm_(outgoing.T, incoming)
                torch.mm(outgoing, matrix, out=incoming)
            ready(spec.name)
            if spec.name.endswith(("linear_qkv.weight", "linear_fc1.weight")):
                dist.all_reduce(self._activations, group=self.groups.tensor)

    def _as_matrices(self) -> dict[str, torch.Tensor]:
        """Gradients of weights, in their parameters' shapes."""
        matrices = {}
        for placement in self._shards.placements:
            spec = placement.spec
            if spec.axis is not None:
                shape = spec.parameter_shape(placement.shape[spec.atom_dim])
                gradient = self._shards.tensor(self._gradients, placement)
                matrices[spec.name] = gradient.view(shape)
        return matrices


def _ignore(name: str) -> None:
    """For a tensor of which nobody wants to hear."""
