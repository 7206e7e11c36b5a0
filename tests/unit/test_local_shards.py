"""LocalShards against numbered elements: which ones its views show."""

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


def seen(local: LocalShards, ranges: list[AtomRange]) -> list[float]:
    """Numbers of the elements in the views of `ranges`."""
    flat = numbered(local)
    views = [view for atoms in ranges for view in local.views(flat, atoms)]
    return [number for view in views for number in view.reshape(-1).tolist()]


@PROPERTY
@given(shards_and_ranges())
def test_views_show_exactly_the_atoms(case: tuple[LocalShards, list[AtomRange]]) -> None:
    local, ranges = case
    assert seen(local, ranges) == expected(local, ranges)
    assert local.elements(ranges) == len(seen(local, ranges))


@PROPERTY
@given(shards_and_ranges())
def test_views_write_through(case: tuple[LocalShards, list[AtomRange]]) -> None:
    local, ranges = case
    flat, wanted = numbered(local), numbered(local)
    wanted[torch.tensor(expected(local, ranges), dtype=torch.long)] = -1.0
    for atoms in ranges:
        for view in local.views(flat, atoms):
            view.fill_(-1.0)
    assert torch.equal(flat, wanted)


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
@given(shards())
def test_a_slot_that_adopted_nothing_has_its_home_in_one_run(local: LocalShards) -> None:
    if local.home() == local.owned():
        flat = numbered(local)
        homes = dict(local.home())
        tensors = [p for p in local.placements if p.spec.axis is not None]
        views = [local.view(flat, p, homes[p.spec.axis]) for p in tensors]
        run = [number for view in views for number in view.reshape(-1).tolist()]
        assert run == list(range(local.sharded))


@PROPERTY
@given(shards())
def test_everything_owned_and_replicated_is_the_whole_buffer(local: LocalShards) -> None:
    everything = seen(local, [*local.owned(), REPLICATED])
    assert sorted(everything) == numbered(local).tolist()
    assert local.elements(local.owned()) == local.sharded


def test_atoms_of_another_slot_are_refused() -> None:
    shape = ModelShape(1, 4, 2, 2, 2, 5, 7, gated=True, bias=False, tied=True)
    layout = full_layout(atom_counts(shape), 2, 1).replicas[0]
    local = LocalShards(tensor_specs(shape), layout.shards, 0)
    with pytest.raises(ValueError, match="not inside one range"):
        local.views(numbered(local), (Axis.VOCAB_ROW, Range(6, 7)))
