"""Moving shards: bytes over the least possible, seconds over plain messages, and extra memory.

    python -m benchmarks.reshard [--quick]

Theory of operation. Four ranks over gloo are two replicas at TP2. In the first switch a slot of the
second replica is lost: its neighbour fetches what it lacks from the first replica, the one holder
of it. In the second switch the slot returns in a fresh process, and gets its home from two holders
and the replicated tensors from one. The state is a GPT's parameters and two moments in float32; its
size is that of one replica. Whether a switch left the right elements is checked.

- Bytes over least: what the ranks received, over what they lacked, counted atom by atom.
- Seconds: from a barrier until the last rank is done, including the copy of what a slot keeps; the
  median of some rounds. Plain messages are the same bytes between the same ranks, one contiguous
  message a pair, all at once, and the same copies from flat to flat, in turns with the switches.
- Extra memory: how far the resident set of a rank rises above what it was with old and new state in
  place (the high-water mark of /proc, reset before), at most. It is bounded by chunk_bytes times
  in_flight, whatever the state.

The ranks share this machine's cores, which also are the network.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from benchmarks.common import BenchmarkError, run_main, scratch_folder
from benchmarks.ranks import LOOPBACK, STORE_TIMEOUT_SECONDS, give, run_ranks, say
from elastic.rendezvous_client import RendezvousStore
from ntp.atoms import Axis, TensorSpec, atom_elements_by_axis
from ntp.exchange import Message, exchange
from ntp.geometry import ParallelLayout, SlotRef, full_layout, vacate
from ntp.groups import GroupAxis, GroupSpec
from ntp.local_shards import LocalShards
from ntp.model_shape import ModelShape, atom_counts, tensor_specs
from ntp.process_groups import Link, ProcessGroups
from ntp.reshard import FlatState, ranges_kept, reshard
from ntp.reshard_plan import plan_reshard
from ntp.state_chunks import Limits

TP_BASE, REPLICAS = 2, 2
LOST = SlotRef(1, 1)
BUFFERS, ELEMENT_BYTES = 3, 4
LIMITS = Limits()
PLAIN_TAG = 9
EXACT = (1 << 23) - 1
"""Whole numbers of this many bits, and a bit more, are exact in float32."""

MB = 1e6


def _gpt(layers: int, hidden: int, heads: int, ffn: int, vocab: int) -> ModelShape:
    return ModelShape(
        layers, hidden, heads, heads, hidden // heads, ffn, vocab, gated=True, bias=True, tied=False
    )


SHAPES = {
    "10 MB": _gpt(4, 128, 8, 320, 320),
    "100 MB": _gpt(8, 256, 8, 900, 2200),
    "1 GB": _gpt(12, 768, 12, 2048, 2000),
}
ROUNDS = {"10 MB": 9, "100 MB": 5, "1 GB": 3}


@dataclass(frozen=True, slots=True)
class Switch:
    """A change of layout. Nobody has the state of LOST, neither before nor after."""

    name: str
    source: ParallelLayout
    target: ParallelLayout

    @property
    def holders(self) -> frozenset[SlotRef]:
        """The slots that have their state."""
        return frozenset(self.source.slots()) - {LOST}


@dataclass(frozen=True, slots=True)
class Measured:
    """A switch on one rank; `seconds` are until all ranks were done."""

    received: int
    seconds: float
    plain_seconds: float
    extra_bytes: int


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Switches of layout: bytes, seconds, memory.")
    parser.add_argument("--quick", action="store_true", help="one round, without the largest state")
    options = parser.parse_args()
    rounds = dict.fromkeys(list(SHAPES)[:-1], 1) if options.quick else ROUNDS
    with scratch_folder() as scratch:
        results = run_ranks(measure, TP_BASE * REPLICAS, scratch, rounds)
    _print(rounds, results)


def switches(shape: ModelShape) -> tuple[Switch, Switch]:
    """A slot is lost, and returns."""
    full = full_layout(atom_counts(shape), TP_BASE, REPLICAS)
    reduced = vacate(full, LOST)
    return Switch("is lost", full, reduced), Switch("returns", reduced, full)


def least_bytes(shape: ModelShape, switch: Switch) -> int:
    """What the slots of the target lack, counted atom by atom."""
    sizes = atom_elements_by_axis(tensor_specs(shape))
    elements = 0
    for slot in switch.target.slots():
        had = _atoms(switch.source, slot) if slot in switch.holders else set()
        elements += sum(sizes.of(axis) for axis, _ in _atoms(switch.target, slot) - had)
        elements += 0 if slot in switch.holders else sizes.replicated
    return elements * BUFFERS * ELEMENT_BYTES


def _atoms(layout: ParallelLayout, slot: SlotRef) -> set[tuple[Axis, int]]:
    return {
        (axis.axis, atom)
        for axis in layout.replica(slot.replica).shards.axes
        for piece in axis.owned[slot.slot]
        for atom in range(piece.start, piece.stop)
    }


def measure(
    connection: Connection, rank: int, size: int, address: str, rounds: dict[str, int]
) -> None:
    """One rank: give what it measured, by state and switch."""
    torch.set_num_threads(1)
    groups = ProcessGroups(Link("gloo", LOOPBACK, 60.0, 60.0))
    store = RendezvousStore(address, STORE_TIMEOUT_SECONDS)
    world = GroupSpec(GroupAxis.WORLD, (), tuple(range(size)))
    groups.adopt([world], [str(r) for r in range(size)], rank, 1, store, frozenset())
    results: dict[tuple[str, str], Measured] = {}
    for state, repetitions in rounds.items():
        for switch in switches(SHAPES[state]):
            if rank == 0:
                say(connection, f"{state} of state, a slot {switch.name}")
            measured = _measure(groups.world, rank, SHAPES[state], switch, repetitions)
            results[state, switch.name] = measured
    give(connection, results)


def _measure(
    group: dist.ProcessGroup, rank: int, shape: ModelShape, switch: Switch, rounds: int
) -> Measured:
    slots = full_layout(atom_counts(shape), TP_BASE, REPLICAS).slots()
    ranks = {slot: number for number, slot in enumerate(slots)}
    slot, specs = slots[rank], tensor_specs(shape)
    sizes = atom_elements_by_axis(specs)
    plan = plan_reshard(switch.source, switch.target, switch.holders, sizes)
    source = _state(specs, switch.source, slot) if slot in switch.holders else None
    target = None
    kept: Sequence[Any] = ()
    if slot in switch.target.slots():
        if source and switch.source.replica(slot.replica) == switch.target.replica(slot.replica):
            target = source
        else:
            target = _state(specs, switch.target, slot)
            for buffer in target[1]:
                buffer.fill_(float("nan"))
            kept = ranges_kept(switch.source, switch.target, slot) if source else ()
    received = 0

    def switch_over() -> None:
        nonlocal received
        if target is not None:
            received = reshard(plan, slot, ranks, group, source, target, kept, LIMITS)

    extra = _rise_of_memory(lambda: _seconds(group, switch_over))
    if target is not None:
        _check(specs, switch.target, slot, target)

    sent = Counter[int]()
    expected = Counter[int]()
    for move in plan.moves:
        nbytes = sizes.of(move.axis) * (len(move.atoms) if move.atoms else 1)
        nbytes *= BUFFERS * ELEMENT_BYTES
        sent[ranks[move.target]] += nbytes * (move.source == slot)
        expected[ranks[move.source]] += nbytes * (move.target == slot)
    sends, receives = _messages(sent), _messages(expected)
    copied = source[0].elements(kept) * BUFFERS * ELEMENT_BYTES if source else 0
    old, new = torch.zeros(2, copied, dtype=torch.uint8)

    def plain() -> None:
        exchange(group, sends, receives, PLAIN_TAG)
        new.copy_(old)

    pairs = [(_seconds(group, switch_over), _seconds(group, plain)) for _ in range(rounds)]
    seconds, plain_seconds = (median(times) for times in zip(*pairs, strict=True))
    return Measured(received, seconds, plain_seconds, extra)


def _messages(nbytes: Counter[int]) -> list[Message]:
    return [
        Message(peer, torch.zeros(size, dtype=torch.uint8).fill_(1))
        for peer, size in sorted(nbytes.items())
        if size
    ]


def _state(specs: Sequence[TensorSpec], layout: ParallelLayout, slot: SlotRef) -> FlatState:
    """What a slot holds: elements that tell tensors, atoms and buffers apart."""
    shards = LocalShards(specs, layout.replica(slot.replica).shards, slot.slot)
    buffers = [torch.empty(shards.total) for _ in range(BUFFERS)]
    for placement in shards.placements:
        part = _part(placement.spec, layout, slot)
        for number, buffer in enumerate(buffers):
            torch.add(part, number, out=shards.tensor(buffer, placement))
    return shards, buffers


def _check(
    specs: Sequence[TensorSpec], layout: ParallelLayout, slot: SlotRef, state: FlatState
) -> None:
    shards, buffers = state
    for placement in shards.placements:
        part = _part(placement.spec, layout, slot)
        for number, buffer in enumerate(buffers):
            if not torch.equal(shards.tensor(buffer, placement), part + number):
                raise BenchmarkError(f"{slot} got a wrong {placement.spec.name}")


def _part(spec: TensorSpec, layout: ParallelLayout, slot: SlotRef) -> torch.Tensor:
    """What a slot holds of a tensor, cut from the whole atom by atom."""
    numbers = torch.arange(prod(spec.shape), dtype=torch.int32).bitwise_and_(EXACT)
    whole = numbers.add_(len(spec.name)).float().view(spec.shape)
    if spec.axis is None:
        return whole
    owned = layout.replica(slot.replica).shards.owned(spec.axis, slot.slot)
    atoms = [atom for piece in owned for atom in range(piece.start, piece.stop)]
    return whole.index_select(spec.atom_dim, torch.tensor(atoms))


def _seconds(group: dist.ProcessGroup, work: Callable[[], None]) -> float:
    """Seconds until all ranks have done their work."""
    _barrier(group)
    began = time.perf_counter()
    work()
    _barrier(group)
    return time.perf_counter() - began


def _barrier(group: dist.ProcessGroup) -> None:
    dist.all_reduce(torch.zeros(1), group=group)


def _rise_of_memory(work: Callable[[], object]) -> int:
    """Bytes by which the resident set rose at most while `work` ran."""
    # Else what the allocator has kept of earlier tensors would pass for nothing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark becomes the present value
    before = _memory("VmRSS")
    work()
    return _memory("VmHWM") - before


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def _print(rounds: dict[str, int], results: Sequence[dict[tuple[str, str], Measured]]) -> None:
    table = Table(title="A slot of two replicas at TP2, four ranks over gloo")
    for column in ("state", "the slot", "moved", "over least", "seconds", "MB/s", "over plain"):
        table.add_column(column, justify="right")
    table.add_column("extra memory", justify="right")
    for state in rounds:
        for switch in switches(SHAPES[state]):
            ranks = [result[state, switch.name] for result in results]
            moved = sum(measured.received for measured in ranks)
            seconds = max(measured.seconds for measured in ranks)
            plain = max(measured.plain_seconds for measured in ranks)
            extra = max(measured.extra_bytes for measured in ranks)
            table.add_row(
                state,
                switch.name,
                f"{moved / MB:.1f} MB",
                f"{moved / least_bytes(SHAPES[state], switch):.2f}",
                f"{seconds:.3f}",
                f"{moved / MB / seconds:.0f}",
                f"{seconds / plain:.2f}",
                f"{extra / MB:.1f} MB",
            )
    console = Console()
    console.print(table)
    console.print(
        f"Targets: 1.00 over least; extra memory at most {LIMITS.staging_bytes / MB:.1f} MB"
        f" ({LIMITS.in_flight} messages of {LIMITS.chunk_bytes / MB:.1f} MB) whatever the state."
    )


if __name__ == "__main__":
    run_main(main)
