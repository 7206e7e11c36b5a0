"""Bundles against views taken one by one, and both ends of a message against each other."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ntp import bundles
from ntp.atoms import TensorSpec
from ntp.bundles import Bundle, bundles_of
from ntp.geometry import Range, full_layout, with_active
from ntp.local_shards import LocalShards
from ntp.model_shape import ModelShape, atom_counts, tensor_specs

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
SHAPE = ModelShape(3, 6, 8, 8, 2, 20, 24, gated=True, bias=True, tied=False)


@st.composite
def views(draw: st.DrawFn) -> tuple[Tensor, list[Tensor]]:
    """A numbered buffer and disjoint views of it, in order of storage or not, some with gaps."""
    shapes = st.sampled_from([(1, 4, 2), (2, 3, 2), (2, 3, 3), (3, 1, 1)])
    sizes = draw(st.lists(shapes, min_size=1, max_size=8))
    flat = torch.arange(float(sum(rows * columns for rows, columns, _ in sizes)))
    found, start = [], 0
    for rows, columns, taken in sizes:
        found.append(flat[start : start + rows * columns].view(rows, columns)[:, :taken])
        start += rows * columns
    return flat, draw(st.permutations(found)) if draw(st.booleans()) else found


@PROPERTY
@given(views())
def test_a_bundle_is_its_views_one_after_another(case: tuple[Tensor, list[Tensor]]) -> None:
    flat, found = case
    numbers = torch.cat([view.reshape(-1) for view in found])
    bundle = Bundle(found)
    packed = bundle.packed()
    assert torch.equal(packed, numbers) and bundle.elements == len(numbers)
    is_run = torch.equal(numbers, torch.arange(numbers[0], numbers[0] + len(numbers)))
    assert (packed.data_ptr() == found[0].data_ptr()) is is_run

    wanted = flat.clone()
    wanted[numbers.long()] += numbers + 0.5
    bundle.add(numbers + 0.5)
    assert torch.equal(flat, wanted)

    wanted[numbers.long()] = -numbers
    arrived = bundle.packed(bundle.room()).copy_(-numbers)
    bundle.store(arrived)
    assert torch.equal(flat, wanted)

    wanted[numbers.long()] = 0.0
    bundle.clear()
    assert torch.equal(flat, wanted)


def test_a_message_of_another_size_is_a_bug() -> None:
    bundle = Bundle([torch.zeros(3, 4)[:, :2]])
    with pytest.raises(AssertionError):
        bundle.add(torch.zeros(5))


@pytest.fixture(autouse=True)
def short_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "OWN_MESSAGE_BYTES", 100)


def end(active: tuple[int, ...], slot: int) -> tuple[LocalShards, Tensor]:
    """A slot and its buffer, in which each element has its place among the global tensors."""
    layout = with_active(full_layout(atom_counts(SHAPE), 4, 1).replicas[0], active)
    shards = LocalShards(tensor_specs(SHAPE), layout.shards, slot)
    flat = torch.empty(shards.total, dtype=torch.float64)
    first = 0
    for placement in shards.placements:
        spec = placement.spec
        count = torch.Size(spec.shape).numel()
        numbers = torch.arange(first, first + count, dtype=torch.float64).view(spec.shape)
        first += count
        if spec.axis is not None:
            owned = layout.shards.owned(spec.axis, slot)
            index = torch.cat([torch.arange(piece.start, piece.stop) for piece in owned])
            numbers = numbers.index_select(spec.atom_dim, index)
        shards.tensor(flat, placement).copy_(numbers)
    return shards, flat


@PROPERTY
@given(st.data())
def test_both_ends_form_the_same_messages(data: st.DataObject) -> None:
    counts = atom_counts(SHAPE)
    home = {
        axis: full_layout(counts, 4, 1).replicas[0].shards.axis(axis).home[2]
        for axis in counts.axes
    }
    holder = data.draw(st.sampled_from((0, 1, 3)))
    sender, sent = end((0, 1, 3), holder)
    receiver, received = end((0, 1, 2, 3), 2)
    ranges = {}
    for axis, owned in sender.owned():
        assert axis is not None and owned is not None
        if home[axis].contains(owned):
            start = data.draw(st.integers(owned.start, owned.stop - 1))
            ranges[axis] = Range(start, data.draw(st.integers(start + 1, owned.stop)))
    pieces = list(ranges.items())
    outgoing = bundles_of(sender, sent, pieces, sender.placements)
    incoming = bundles_of(receiver, received, pieces, receiver.placements)
    for ours, theirs in zip(outgoing, incoming, strict=True):
        assert torch.equal(ours.packed(), theirs.packed())


def messages(spec: TensorSpec, atoms: int) -> list[tuple[int, bool]]:
    """Elements of the messages that carry so many atoms of a tensor, and whether by view."""
    shards, flat = end((0, 1, 3), 3)
    assert spec.axis is not None
    (placement,) = [p for p in shards.placements if p.spec == spec]
    start = full_layout(atom_counts(SHAPE), 4, 1).replicas[0].shards.axis(spec.axis).home[3].start
    formed = bundles_of(shards, flat, [(spec.axis, Range(start, start + atoms))], [placement])
    whole = shards.tensor(flat, placement).untyped_storage().data_ptr()
    return [(b.elements, b.packed().untyped_storage().data_ptr() == whole) for b in formed]


def test_long_runs_travel_by_themselves_and_are_not_copied() -> None:
    specs = {spec.name.rpartition("linear_")[2]: spec for spec in tensor_specs(SHAPE)[:12]}
    # Runs are long from 100 bytes on, which are 13 elements.
    assert messages(specs["fc1.weight"], 3) == [(18, True), (18, True)], "gates, ups"
    assert messages(specs["fc1.weight"], 2) == [(24, False)], "short runs together"
    assert messages(specs["qkv.weight"], 1) == [(36, True)], "one run"
    assert messages(specs["fc2.weight"], 5) == [(30, False)], "a run in each of six rows"
