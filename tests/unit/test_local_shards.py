"""LocalShards against numbered elements: what is packed, written and added, and where."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.atoms import Axis
from ntp.geometry import Range, full_layout, with_active
from ntp.local_shards import REPLICATED, AtomRange, LocalShards
from ntp.model_shape import ModelShape, atom_counts, tensor_specs

PROPERTY = settings(derandomize=True, deadline=None, max_examples=50)


@st.composite
def shards(draw: st.DrawFn) -> LocalShards:
    """A slot of some layout of some small model."""
    base = draw(st.integers(1, 4))
    groups = draw(st.integers(base, 6))
    shape = ModelShape(
        layers=1,
        hidden=draw(st.integers(1, 4)),
        heads=groups * draw(st.integers(1, 3)),
        kv_groups=groups,
        kv_channels=2,
        ffn=draw(st.integers(base, 9)),
        vocab=draw(st.integers(base, 9)),
        gated=draw(st.booleans()),
        bias=draw(st.booleans()),
        tied=draw(st.booleans()),
        norm_bias=draw(st.booleans()),
    )
    active = tuple(sorted(draw(st.sets(st.integers(0, base - 1), min_size=1))))
    replica = with_active(full_layout(atom_counts(shape), base, 1).replicas[0], active)
    return LocalShards(tensor_specs(shape), replica.shards, draw(st.sampled_from(active)))


@st.composite
def shards_and_ranges(draw: st.DrawFn) -> tuple[LocalShards, list[AtomRange]]:
    """A slot and disjoint ranges that it owns, in any order."""
    local = draw(shards())
    chosen: list[AtomRange] = [REPLICATED] if draw(st.booleans()) else []
    for axis, owned in local.owned():
        assert owned is not None
        start = draw(st.integers(owned.start, owned.stop - 1))
        stop = draw(st.integers(start + 1, owned.stop))
        chosen.append((axis, Range(start, stop)))
    return local, draw(st.permutations(chosen))[: draw(st.integers(0, len(chosen)))]


def numbered(local: LocalShards) -> torch.Tensor:
    return torch.arange(local.total, dtype=torch.float64)


def expected(local: LocalShards, ranges: list[AtomRange]) -> list[float]:
    """Numbers of the elements of `ranges`, found with an index for each atom."""
    found: list[float] = []
    for axis, atoms in ranges:
        for placement in local.placements:
            spec = placement.spec
            if spec.axis is not axis:
                continue
            values = numbered(local)[placement.offset :][: spec.elements(_held(local, axis))]
            tensor = values.view(spec.local_shape(_held(local, axis)))
            if axis is not None and atoms is not None:
                ids = [
                    atom
                    for kind, piece in local.owned()
                    if kind is axis and piece is not None
                    for atom in range(piece.start, piece.stop)
                ]
                index = torch.tensor([ids.index(atom) for atom in range(atoms.start, atoms.stop)])
                tensor = tensor.index_select(spec.atom_dim, index)
            found += tensor.reshape(-1).tolist()
    return found


def _held(local: LocalShards, axis: Axis | None) -> int:
    return sum(len(piece) for kind, piece in local.owned() if kind is axis and piece is not None)


@PROPERTY
@given(shards_and_ranges())
def test_pack_takes_exactly_the_atoms(case: tuple[LocalShards, list[AtomRange]]) -> None:
    local, ranges = case
    packed = local.pack(numbered(local), ranges)
    assert packed.tolist() == expected(local, ranges)
    assert local.elements(ranges) == packed.numel()


@PROPERTY
@given(shards_and_ranges())
def test_runs_are_contiguous(case: tuple[LocalShards, list[AtomRange]]) -> None:
    local, ranges = case
    for atoms in ranges:
        views = local.views(numbered(local), atoms)
        for view, count in zip(views, local.runs(atoms[0]), strict=True):
            runs = view.reshape(count, -1)
            assert torch.equal(runs, runs[:, :1] + torch.arange(runs.shape[1]))


@PROPERTY
@given(shards_and_ranges())
def test_unpack_writes_what_pack_took_and_nothing_else(
    case: tuple[LocalShards, list[AtomRange]],
) -> None:
    local, ranges = case
    flat = numbered(local)
    packed = local.pack(flat, ranges)
    target = torch.full_like(flat, -1)
    local.unpack(target, ranges, packed)
    taken = torch.zeros_like(flat, dtype=torch.bool)
    taken[packed.long()] = True
    assert torch.equal(target, torch.where(taken, flat, -1.0))


@PROPERTY
@given(shards_and_ranges())
def test_add_adds_once(case: tuple[LocalShards, list[AtomRange]]) -> None:
    local, ranges = case
    flat = numbered(local)
    packed = local.pack(flat, ranges)
    target = torch.ones_like(flat)
    local.add(target, ranges, packed)
    wanted = torch.ones_like(flat)
    wanted[packed.long()] += packed
    assert torch.equal(target, wanted)


@PROPERTY
@given(shards())
def test_home_is_packed_by_tensor_whatever_else_is_owned(local: LocalShards) -> None:
    flat = numbered(local)
    packed = local.pack_home(flat)
    home = dict(local.home())
    by_tensor = [
        value
        for placement in local.placements
        if (axis := placement.spec.axis) is not None
        for value in expected(local, [(axis, home[axis])])
        if placement.offset
        <= value
        < placement.offset + placement.spec.elements(_held(local, axis))
    ]
    assert packed.tolist() == by_tensor
    local.unpack_home(flat, packed.clone() + 1)
    changed = flat - numbered(local)
    assert set(changed.nonzero().flatten().tolist()) == (
        set() if local.home_only else {int(value) for value in by_tensor}
    )


@PROPERTY
@given(shards())
def test_everything_owned_and_replicated_is_the_whole_buffer(local: LocalShards) -> None:
    packed = local.pack(numbered(local), [*local.owned(), REPLICATED])
    assert sorted(packed.tolist()) == numbered(local).tolist()
    assert local.elements(local.owned()) == local.sharded


def test_a_message_of_the_wrong_size_is_refused() -> None:
    shape = ModelShape(1, 4, 2, 2, 2, 5, 7, gated=True, bias=False, tied=True)
    layout = full_layout(atom_counts(shape), 2, 1).replicas[0]
    local = LocalShards(tensor_specs(shape), layout.shards, 0)
    flat = numbered(local)
    for write in (local.unpack, local.add):
        with pytest.raises(AssertionError):
            write(flat, [REPLICATED], local.pack(flat, [REPLICATED]).new_zeros(99))
    with pytest.raises(ValueError, match="not inside one range"):
        local.pack(flat, [(Axis.VOCAB_ROW, Range(6, 7))])
