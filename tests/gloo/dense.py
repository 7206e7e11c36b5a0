"""Dense references: whole tensors, and an independent way to cut and to assemble them.

Product code finds atoms with offsets into flat buffers; here every atom is an index.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import cache

import torch
from harness import Mismatch
from torch import Tensor

from ntp.atoms import TensorSpec
from ntp.geometry import ParallelLayout, ReplicaLayout, SlotRef, full_layout, with_active
from ntp.local_shards import LocalShards
from ntp.model_shape import ModelShape, atom_counts

SHAPE = ModelShape(
    layers=2,
    hidden=16,
    heads=10,
    kv_groups=5,
    kv_channels=2,
    ffn=23,
    vocab=37,
    gated=True,
    bias=True,
    tied=False,
    norm_bias=True,
)
"""Every kind of tensor, no size divisible by 4 or 3 where atoms are counted."""


def layout_of(shape: ModelShape, tp_base: int, *active: tuple[int, ...]) -> ParallelLayout:
    """One replica per argument, with these active slots."""
    full = full_layout(atom_counts(shape), tp_base, len(active))
    return ParallelLayout(
        tp_base,
        tuple(
            with_active(replica, slots)
            for replica, slots in zip(full.replicas, active, strict=True)
        ),
    )


def generator(name: str, seed: int) -> torch.Generator:
    """Random numbers that depend on a tensor's name and a seed."""
    return torch.Generator().manual_seed(seed * 7919 + zlib.crc32(name.encode()))


@cache
def integers(spec: TensorSpec, seed: int) -> Tensor:
    """Whole numbers in float64, so that sums are exact in any order."""
    drawn = torch.randint(-99, 100, spec.shape, generator=generator(spec.name, seed))
    return drawn.double()


@cache
def normal(spec: TensorSpec, seed: int) -> Tensor:
    """Normal numbers."""
    return torch.randn(spec.shape, generator=generator(spec.name, seed), dtype=torch.float64)


def atom_ids(spec: TensorSpec, layout: ReplicaLayout, slot: int) -> Tensor:
    """Global numbers of the atoms that a slot holds, in local order."""
    assert spec.axis is not None
    pieces = layout.shards.owned(spec.axis, slot)
    return torch.tensor([atom for piece in pieces for atom in range(piece.start, piece.stop)])


def cut(spec: TensorSpec, layout: ReplicaLayout, slot: int, whole: Tensor) -> Tensor:
    """What a slot holds of a whole tensor."""
    if spec.axis is None:
        return whole
    return whole.index_select(spec.atom_dim, atom_ids(spec, layout, slot))


def whole(
    spec: TensorSpec, layout: ReplicaLayout, parts: Mapping[SlotRef, Mapping[str, Tensor]]
) -> Tensor:
    """The whole tensor, put together from what the slots of a replica hold."""
    slots = {slot: parts[SlotRef(layout.replica, slot)][spec.name] for slot in layout.active}
    first = slots[layout.active[0]]
    if spec.axis is None:
        return first
    result = first.new_full(spec.shape, float("nan"))
    for slot, part in slots.items():
        result.index_copy_(spec.atom_dim, atom_ids(spec, layout, slot), part)
    return result


def fill(
    shards: LocalShards,
    layout: ReplicaLayout,
    flat: Tensor,
    value: Callable[[TensorSpec], Tensor],
) -> Tensor:
    """Fill a slot's flat buffer with its part of whole tensors; returns it."""
    for placement in shards.placements:
        part = cut(placement.spec, layout, shards.slot, value(placement.spec))
        shards.tensor(flat, placement).copy_(part)
    return flat


def named(shards: LocalShards, flat: Tensor) -> dict[str, Tensor]:
    """Copies of the tensors in a flat buffer."""
    return {p.spec.name: shards.tensor(flat, p).clone() for p in shards.placements}


def same_bits(what: str, got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Raise Mismatch unless all tensors are equal bit for bit."""
    if got.keys() != wanted.keys():
        raise Mismatch(f"{what}: tensors {sorted(got.keys() ^ wanted.keys())} on one side only")
    for name, value in got.items():
        kind = torch.int64 if value.dtype is torch.float64 else torch.int32
        if not torch.equal(value.view(kind), wanted[name].view(kind)):
            wrong = int((value != wanted[name]).sum())
            raise Mismatch(f"{what}: {wrong} of {value.numel()} elements of {name} differ")


def relative_difference(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, in units of the largest wanted element."""
    scale = wanted.abs().max().item()
    return (got - wanted).abs().max().item() / (scale or 1.0)
