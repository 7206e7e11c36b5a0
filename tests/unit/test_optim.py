"""Adam against torch.optim.AdamW, and the same elements at other places against themselves."""

import pytest
import torch
from torch import Tensor

from ntp.atoms import TensorSpec
from ntp.geometry import ReplicaLayout, full_layout, with_active
from ntp.model_shape import ModelShape, atom_counts, tensor_specs
from trainer.optim import Adam, AdamSettings
from trainer.shard_state import ShardState, initialize

SHAPE = ModelShape(2, 24, 10, 5, 4, 43, 67, gated=True, bias=True, tied=False, norm_bias=True)
SPECS = tensor_specs(SHAPE)
SETTINGS = AdamSettings(beta1=0.9, beta2=0.95, epsilon=1e-8, weight_decay=0.1)
RATES = [1e-2, 3e-3, 7e-3]
SCALE = 1 / 3


def replica(base: int, active: tuple[int, ...]) -> ReplicaLayout:
    return with_active(full_layout(atom_counts(SHAPE), base, 1).replicas[0], active)


def state_of(layout: ReplicaLayout, slot: int, dtype: torch.dtype) -> ShardState:
    state = ShardState(SPECS, layout, slot, dtype, torch.device("cpu"))
    initialize(state, 7, 0.3, SHAPE.layers)
    return state


def gradient(spec: TensorSpec, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + SPECS.index(spec))
    return torch.randn(spec.shape, generator=generator, dtype=torch.float64)


def set_gradients(state: ShardState, step: int) -> None:
    for placement in state.shards.placements:
        part = state.local_part(placement.spec, gradient(placement.spec, step))
        state.shards.tensor(state.gradients, placement).copy_(part)


def train(state: ShardState) -> list[dict[str, Tensor]]:
    """Each persistent buffer's tensors after a few updates."""
    adam = Adam(state, SETTINGS)
    for step, rate in enumerate(RATES):
        set_gradients(state, step)
        adam.update(step, rate, SCALE)
    return [
        {p.spec.name: state.shards.tensor(buffer, p) for p in state.shards.placements}
        for buffer in state.persistent
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("base", "active"), [(2, (0, 1)), (5, (0, 2, 4)), (3, (1,))])
def test_an_update_does_not_depend_on_the_place(
    dtype: torch.dtype, base: int, active: tuple[int, ...]
) -> None:
    dense = train(state_of(replica(1, (0,)), 0, dtype))
    for slot in active:
        state = state_of(replica(base, active), slot, dtype)
        for whole, part in zip(dense, train(state), strict=True):
            for spec in SPECS:
                assert torch.equal(part[spec.name], state.local_part(spec, whole[spec.name]))


@pytest.mark.parametrize("threads", [1, 2])
def test_an_update_does_not_depend_on_the_length(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        vectors = [element_by_element(length) for length in (1, 7, 8, 31, 64, 1000, 70_001)]
    finally:
        torch.set_num_threads(before)
    for vector in vectors:
        assert torch.equal(vector, vectors[-1][: len(vector)])


def element_by_element(length: int) -> Tensor:
    """Parameters after updates of a model that is one replicated vector."""
    spec = TensorSpec("vector", None, (length,), -1)
    state = ShardState([spec], replica(1, (0,)), 0, torch.float32, torch.device("cpu"))
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(4, 70_001, generator=generator)[:, :length]
    state.master.copy_(values[0])
    adam = Adam(state, SETTINGS)
    for step in range(3):
        state.gradients.copy_(values[step + 1])
        adam.update(step, 1e-2, SCALE)
    return state.master


def test_it_is_torchs_adamw() -> None:
    state = state_of(replica(1, (0,)), 0, torch.float64)
    matrices, others = [], []
    parameters = {}
    for placement in state.shards.placements:
        parameter = torch.nn.Parameter(state.shards.tensor(state.master, placement).clone())
        parameters[placement.spec.name] = parameter
        decays = placement.spec.axis is not None and placement.spec.name.endswith("weight")
        (matrices if decays else others).append(parameter)
    reference = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.95),
        eps=1e-8,
    )
    for step, rate in enumerate(RATES):
        for group in reference.param_groups:
            group["lr"] = rate
        for spec in SPECS:
            parameters[spec.name].grad = gradient(spec, step) * SCALE
        reference.step()
    for name, value in train(state)[0].items():
        torch.testing.assert_close(value, parameters[name].data, rtol=0, atol=1e-12)


def test_between_sees_moments_without_parameters() -> None:
    state = state_of(replica(1, (0,)), 0, torch.float64)
    set_gradients(state, 0)
    master = state.master.clone()
    seen = []

    def between() -> None:
        seen.append((torch.equal(state.master, master), bool(state.first_moment.abs().sum() > 0)))

    Adam(state, SETTINGS).update(0, 1e-2, SCALE, between)
    assert seen == [(True, True)]
    assert not torch.equal(state.master, master)


def test_bfloat16_keeps_masters_that_remember_small_updates() -> None:
    state = state_of(replica(2, (0, 1)), 0, torch.bfloat16)
    assert state.parameters.dtype is torch.bfloat16
    assert {buffer.dtype for buffer in (*state.persistent, state.gradients)} == {torch.float32}
    weights = state.shards.sharded
    before, shown = state.master.clone(), state.parameters.clone()
    adam = Adam(state, AdamSettings(0.9, 0.95, 1e-8, 0.0))
    for step in range(64):
        state.gradients.fill_(1.0)
        adam.update(step, 1e-4, 1.0)
        assert torch.equal(state.parameters, state.master.bfloat16())
    # Each update is too small for most bfloat16 parameters; 64 of them are not.
    torch.testing.assert_close(
        before - state.master, torch.full_like(before, 64e-4), atol=1e-4, rtol=0
    )
    assert (state.parameters[:weights] != shown[:weights]).float().mean() > 0.9
