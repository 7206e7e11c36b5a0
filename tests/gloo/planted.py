"""Bugs of published implementations (design, section 7), to be planted in a rank's process.

`plant` patches product code in the calling process, which ends with its test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import ntp.layers
import trainer.training
from elastic.plan import Plan
from ntp.atoms import Axis
from ntp.geometry import ShardMap, SlotRef
from ntp.grad_sync import GradientSync
from ntp.local_shards import AtomRange, LocalShards, Placement
from trainer.shard_state import ShardState, initialize
from trainer.training import Training


def _change_views(change: Callable[[LocalShards, Placement, Tensor, Tensor], Tensor]) -> None:
    """Pass every view of a range of atoms through `change(shards, placement, flat, view)`."""

    def views(self: LocalShards, flat: Tensor, atoms: AtomRange) -> list[Tensor]:
        found = original(self, flat, atoms)
        placements = [p for p in self.placements if p.spec.axis is atoms[0]]
        return [change(self, p, flat, view) for p, view in zip(placements, found, strict=True)]

    def home_views(self: LocalShards, flat: Tensor) -> list[Tensor]:
        found = original_home(self, flat)
        placements = [p for p in self.placements if p.spec.axis is not None]
        return [change(self, p, flat, view) for p, view in zip(placements, found, strict=True)]

    original, original_home = LocalShards.views, LocalShards._home_views
    LocalShards.views = views  # type: ignore[method-assign]
    LocalShards._home_views = home_views  # type: ignore[method-assign]


def _flat(names: tuple[str, ...]) -> None:
    """Take a range of atoms of these tensors as one run of the stored tensor."""

    def change(shards: LocalShards, placement: Placement, flat: Tensor, view: Tensor) -> Tensor:
        spec = placement.spec
        if not spec.name.endswith(names) or spec.atom_dim == 0:
            return view
        # The stride of the atom dimension tells which local atom the view begins with.
        inner = view.stride(spec.atom_dim)
        first = (view.storage_offset() - placement.offset) // inner * spec.atom_elements
        start = placement.offset + first
        return flat[start : start + view.numel()].view(view.shape)

    _change_views(change)


def row_parallel_flat_prefix() -> None:
    """The columns of down and of the output projection are taken as a run of stored elements."""
    _flat(("linear_proj.weight", "linear_fc2.weight"))


def gate_up_flat_prefix() -> None:
    """Gate and up are taken as a run of stored rows: only gates, for a small range."""
    _flat(("linear_fc1.weight", "linear_fc1.bias"))


def group_cut() -> None:
    """The query heads of a KV group change hands, its key and value rows do not."""

    def change(shards: LocalShards, placement: Placement, flat: Tensor, view: Tensor) -> Tensor:
        spec = placement.spec
        if not spec.name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
            return view
        channels = next(p.spec for p in shards.placements if "linear_proj.weight" in p.spec.name)
        return view.narrow(1, 0, channels.shape[2])

    _change_views(change)
    # What is not moved stays what a fresh buffer holds, so the sizes have to agree with it.

    def elements(self: LocalShards, ranges: Iterable[AtomRange]) -> int:
        probe = torch.empty(self.total)
        return sum(view.numel() for atoms in ranges for view in self.views(probe, atoms))

    LocalShards.elements = elements  # type: ignore[method-assign]


def vocabulary_shifted() -> None:
    """Rows of adopted ranges are looked up one row further on."""

    def local_rows(shards: ShardMap, slot: int, vocabulary: int) -> Tensor:
        rows = original(shards, slot, vocabulary)
        for atoms in shards.owned(Axis.VOCAB_ROW, slot)[1:]:
            part = rows[atoms.start : atoms.stop]
            part.copy_(part.roll(1))
        return rows

    original = ntp.layers._local_rows
    ntp.layers._local_rows = local_rows


def seeded_per_rank() -> None:
    """Every rank initialises with a seed of its own."""

    def seeded(state: ShardState, seed: int, deviation: float) -> None:
        initialize(state, seed + 10 * state.layout.replica + state.slot, deviation)

    trainer.training.initialize = seeded


def replicated_skipped() -> None:
    """Replicated gradients are reduced among the first slots and never reach the others."""

    def reduce_replicated(self: GradientSync, gradients: Tensor) -> None:
        own = gradients[self._shards.sharded :].clone()
        original(self, gradients)
        if not self._contributes_replicated:
            gradients[self._shards.sharded :] = own

    original = GradientSync._reduce_replicated
    GradientSync._reduce_replicated = reduce_replicated  # type: ignore[method-assign]


def averaged_per_replica() -> None:
    """Each replica averages over its own samples, and the averages are averaged."""

    def new_sync(self: Training, plan: Plan, ranks: Any, slot: SlotRef, state: ShardState) -> Any:
        sync = original(self, plan, ranks, slot, state)
        numbers = [replica.replica for replica in plan.layout.replicas]
        mine = plan.batch_split[numbers.index(slot.replica)]
        weight = sum(plan.batch_split) / len(numbers) / mine
        run = sync.run

        def weighted(gradients: Tensor, *arguments: Any, **named: Any) -> None:
            run(gradients.mul_(weight), *arguments, **named)

        sync.run = weighted  # type: ignore[method-assign]
        return sync

    original = Training._new_sync
    Training._new_sync = new_sync  # type: ignore[method-assign]


def piece_added_twice() -> None:
    """A proxy adds each piece of a leaf twice."""

    def add(self: LocalShards, flat: Tensor, ranges: Iterable[AtomRange], packed: Tensor) -> None:
        ranges = list(ranges)
        original(self, flat, ranges, packed)
        original(self, flat, ranges, packed)

    original = LocalShards.add
    LocalShards.add = add  # type: ignore[method-assign]


TRAPS: dict[str, Callable[[], None]] = {
    trap.__name__: trap
    for trap in (
        row_parallel_flat_prefix,
        gate_up_flat_prefix,
        group_cut,
        vocabulary_shifted,
        seeded_per_rank,
        replicated_skipped,
        averaged_per_replica,
        piece_added_twice,
    )
}


def plant(trap: str | None) -> None:
    """Put a bug into this process; nothing for None."""
    if trap is not None:
        TRAPS[trap]()
