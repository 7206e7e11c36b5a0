"""One slot's tensors as views into flat buffers.

All parameters of a slot live in one flat tensor, and so do its gradients and each moment of the
optimizer. A buffer begins with the tensor-parallel tensors in the order of their specs and ends
with the replicated ones. Two things follow. The optimizer and the weights' digest are a handful of
operations on long vectors instead of hundreds on short ones; and the home atoms of a slot that
adopted nothing are one contiguous slice, so its gradient all-reduce needs no packing.

``view`` is the only place that knows where atoms lie. It hands out a strided view of any atoms that
the slot owns in a tensor; resharding and gradient sync are written on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from ntp.atoms import Axis, TensorSpec
from ntp.geometry import Range, ShardMap

AtomRange = tuple[Axis | None, Range | None]
"""Atoms of an axis; ``(None, None)`` stands for all replicated tensors."""

REPLICATED: AtomRange = (None, None)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where one tensor lies in a flat buffer: its spec, first element, and local (split) shape."""

    spec: TensorSpec
    offset: int
    shape: tuple[int, ...]


class LocalShards:
    """The map from atoms to places in one slot's flat buffers.

    Attributes: ``total`` elements in a buffer; ``sharded`` elements at its beginning that are
    tensor parallel, the rest being replicated; ``partial`` elements that follow those are
    replicated with gradients that are partial sums.
    """

    def __init__(self, specs: Sequence[TensorSpec], shards: ShardMap, slot: int) -> None:
        self.slot = slot
        self._shards = shards
        self.placements: list[Placement] = []
        offset = 0
        for spec in sorted(specs, key=lambda spec: (spec.axis is None, not spec.partial_gradient)):
            atoms = 0 if spec.axis is None else shards.local_atoms(spec.axis, slot)
            shape = spec.local_shape(atoms)
            self.placements.append(Placement(spec, offset, shape))
            offset += prod(shape)
        self.total = offset
        self.sharded = sum(prod(p.shape) for p in self.placements if p.spec.axis is not None)
        self.partial = sum(prod(p.shape) for p in self.placements if p.spec.partial_gradient)

    def home(self) -> tuple[AtomRange, ...]:
        """The home atoms of this slot, one range an axis."""
        return tuple((axis.axis, axis.home[self.slot]) for axis in self._shards.axes)

    def owned(self) -> tuple[AtomRange, ...]:
        """Every range this slot owns, in local order within each axis."""
        return tuple(
            (axis.axis, atoms) for axis in self._shards.axes for atoms in axis.owned[self.slot]
        )

    def tensor(self, flat: torch.Tensor, placement: Placement) -> torch.Tensor:
        """View of one tensor in `flat`, in its split local shape."""
        size = prod(placement.shape)
        return flat[placement.offset : placement.offset + size].view(placement.shape)

    def view(self, flat: torch.Tensor, placement: Placement, atoms: Range | None) -> torch.Tensor:
        """View of `atoms` in one tensor; of all of a replicated one, for None.

        `atoms` must lie inside one range that this slot owns.
        """
        view = self.tensor(flat, placement)
        axis = placement.spec.axis
        if axis is None or atoms is None:
            return view
        start = self._shards.offset_of(axis, self.slot, atoms)
        return view.narrow(placement.spec.atom_dim, start, len(atoms))

    def views(self, flat: torch.Tensor, atoms: AtomRange) -> list[torch.Tensor]:
        """One view per tensor that `atoms` touches, in spec order; see `view`."""
        axis, atom_range = atoms
        return [
            self.view(flat, placement, atom_range)
            for placement in self.placements
            if placement.spec.axis is axis
        ]

    def runs(self, axis: Axis | None) -> list[int]:
        """For each tensor of `axis`, in spec order: the equal contiguous runs of which `views` of a
        range consist, at least. Every slot has the same, whatever lies between its runs."""
        return [
            prod(placement.shape[: max(0, placement.spec.atom_dim)])
            for placement in self.placements
            if placement.spec.axis is axis
        ]

    def elements(self, ranges: Iterable[AtomRange]) -> int:
        """Elements of the views of `ranges`, together."""
        return sum(
            placement.spec.elements(0 if atoms is None else len(atoms))
            for axis, atoms in ranges
            for placement in self.placements
            if placement.spec.axis is axis
        )
