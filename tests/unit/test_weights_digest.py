"""The weights digest: the same at any layout, another one for any other bits."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.geometry import ReplicaLayout, full_layout, with_active
from ntp.model_shape import ModelShape, atom_counts, tensor_specs
from ntp.stages import copied_names, stage_chunks, stage_specs
from trainer.shard_state import ShardState, initialize
from trainer.weights_digest import WeightsDigest

SHAPE = ModelShape(1, 8, 10, 5, 2, 11, 13, gated=True, bias=True, tied=False, norm_bias=True)
SPECS = tensor_specs(SHAPE)
PROPERTY = settings(derandomize=True, deadline=None, max_examples=40)


def replica(active: tuple[int, ...]) -> ReplicaLayout:
    return with_active(full_layout(atom_counts(SHAPE), 4, 1).replicas[0], active)


def state_of(layout: ReplicaLayout, slot: int, dtype: torch.dtype = torch.float32) -> ShardState:
    state = ShardState(SPECS, layout, slot, dtype, torch.device("cpu"))
    initialize(state, 5, 0.1, SHAPE.layers)
    return state


def digest(layout: ReplicaLayout, dtype: torch.dtype) -> tuple[int, int]:
    parts = [WeightsDigest(state_of(layout, slot, dtype), SHAPE).parts() for slot in layout.active]
    assert all(0 <= part < 2**64 for pair in parts for part in pair)
    assert len({replicated for _, replicated in parts}) == 1
    return sum(sharded for sharded, _ in parts) % 2**64, parts[0][1]


@PROPERTY
@given(
    st.sets(st.integers(0, 3), min_size=1),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_parts_add_up_at_any_layout(active: set[int], dtype: torch.dtype) -> None:
    assert digest(replica(tuple(sorted(active))), dtype) == digest(replica((0, 1, 2, 3)), dtype)


@PROPERTY
@given(st.data())
def test_one_flipped_bit_shows(data: st.DataObject) -> None:
    state = state_of(replica((1, 3)), 3)
    before = WeightsDigest(state, SHAPE).parts()
    element = data.draw(st.integers(0, state.shards.total - 1))
    bit = data.draw(st.integers(0, 31))
    bits = state.master.view(torch.int32)
    bits[element] ^= torch.tensor(1 << bit if bit < 31 else -(2**31), dtype=torch.int32)
    after = WeightsDigest(state, SHAPE).parts()
    changed = 0 if element < state.shards.sharded else 1
    assert after[changed] != before[changed]
    assert after[1 - changed] == before[1 - changed]


@PROPERTY
@given(st.data())
def test_two_swapped_elements_show(data: st.DataObject) -> None:
    state = state_of(replica((0, 2)), 0)
    elements = st.integers(0, state.shards.sharded - 1)
    first, second = data.draw(elements), data.draw(elements)
    before = WeightsDigest(state, SHAPE).parts()
    swapped = state.master[[second, first]]
    differ = state.master[first] != state.master[second]
    state.master[[first, second]] = swapped
    assert (WeightsDigest(state, SHAPE).parts() != before) == bool(differ)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_equal_elements_are_not_alike(value: float) -> None:
    state = state_of(replica((0, 2)), 0)
    state.master.fill_(value)
    digests = set()
    for element in range(50):
        state.master[element] = 2.0
        digests.add(WeightsDigest(state, SHAPE).parts())
        state.master[element] = value
    assert len(digests) == 50


def test_zeros_of_both_signs_differ() -> None:
    state = state_of(replica((0, 2)), 0)
    state.master.zero_()
    before = WeightsDigest(state, SHAPE).parts()
    state.master.neg_()
    assert WeightsDigest(state, SHAPE).parts() != before


def test_stages_add_up_to_the_whole_and_a_tied_copy_counts_once() -> None:
    shape = replace(SHAPE, tied=True, layers=3)
    layout = full_layout(atom_counts(shape), 1, 1).replicas[0]
    totals = []
    for stages in (1, 2, 3):
        parts = []
        for stage in range(stages):
            chunks = stage_chunks(shape.layers, stages, stage, 1)
            specs, copies = stage_specs(shape, chunks, False), copied_names(shape, chunks)
            state = ShardState(specs, layout, 0, torch.float32, torch.device("cpu"), copies)
            initialize(state, 5, 0.1, shape.layers)
            parts += WeightsDigest(state, shape).parts()
        totals.append(sum(parts) % 2**64)
    assert len(set(totals)) == 1
