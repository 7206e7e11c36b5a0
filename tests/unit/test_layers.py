"""The vocabulary's layers in one piece against torch, and accumulation under bfloat16.

Uneven shards of whole models are compared over real processes in tests/gloo.
"""

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import nn

from ntp.atoms import Axis, TensorSpec
from ntp.geometry import full_layout, with_active
from ntp.layers import bind_parameters
from ntp.megatron_cpu import prepare
from ntp.megatron_layers import ModelNumerics, transformer_config
from ntp.model_shape import ModelShape, atom_counts, tensor_specs
from ntp.stages import Chunk, TransformerImplementation
from ntp.vocabulary import VocabularyCrossEntropy, local_rows
from trainer.shard_state import ShardState

WHOLE = Chunk(0, 1, has_embedding=True, has_output=True)
SHAPE = ModelShape(1, 8, 4, 4, 2, 11, 37, gated=True, bias=False, tied=False)


class Alone(dist.ProcessGroup):
    """A group of one whose all-reduce has nothing to do."""

    class Done:
        def wait(self) -> None:
            pass

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1

    def allreduce(self, _tensors: object, _options: object = None) -> Done:
        return self.Done()


def test_every_token_id_has_one_row() -> None:
    layout = with_active(full_layout(atom_counts(SHAPE), 4, 1).replicas[0], (0, 1, 3))
    found = torch.zeros(SHAPE.vocab, dtype=torch.long)
    for slot in layout.active:
        rows = local_rows(layout.shards, slot, SHAPE.vocab)
        mine = [
            token
            for piece in layout.shards.owned(Axis.VOCAB_ROW, slot)
            for token in range(piece.start, piece.stop)
        ]
        assert rows[mine].tolist() == list(range(len(mine)))
        found += rows >= 0
    assert found.tolist() == [1] * SHAPE.vocab


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)]
)
def test_cross_entropy_is_torchs(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, 3, 37, generator=generator, dtype=torch.float64) * 4 + 60
    targets = torch.randint(0, 37, (5, 3), generator=generator)
    weights = torch.rand(5, 3, generator=generator, dtype=torch.float64)
    ours = logits.to(dtype).requires_grad_()
    theirs = ours.detach().double().requires_grad_()
    losses = VocabularyCrossEntropy.apply(ours, targets, Alone(0, 1))
    assert losses.dtype is (torch.float32 if dtype is torch.bfloat16 else dtype)
    reference = functional.cross_entropy(theirs.flatten(0, 1), targets.flatten(), reduction="none")
    (losses.double() * weights).sum().backward()
    (reference * weights.flatten()).sum().backward()
    small = min(tolerance, 1e-5)
    torch.testing.assert_close(losses.double().flatten(), reference, rtol=small, atol=small)
    assert ours.grad is not None and theirs.grad is not None
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=tolerance, atol=tolerance)


def bound(
    dtype: torch.dtype, accumulated: Callable[[str], None] | None = None
) -> tuple[nn.Linear, ShardState]:
    """A layer of one weight, bound to a state."""
    spec = TensorSpec("weight", Axis.MLP_COLUMN, (SHAPE.hidden, SHAPE.ffn), 1)
    layout = full_layout(atom_counts(SHAPE), 1, 1).replicas[0]
    state = ShardState([spec], layout, 0, dtype, torch.device("cpu"))
    layer = nn.Linear(SHAPE.ffn, SHAPE.hidden, bias=False, dtype=dtype)
    layer.chunk = WHOLE
    bind_parameters(
        [layer],
        state.shards,
        state.parameters,
        state.gradients,
        TransformerImplementation.LOCAL,
        accumulated,
    )
    return layer, state


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_parameters_are_views_of_the_flat_buffer(dtype: torch.dtype) -> None:
    layer, state = bound(dtype)
    state.master.copy_(torch.arange(state.shards.total))
    state.publish()
    assert torch.equal(layer.weight.flatten(), state.parameters)
    assert layer.weight.data_ptr() == state.parameters.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_accumulate_in_float32(dtype: torch.dtype) -> None:
    layer, state = bound(dtype)
    # 1 + 64 * 2**-9 is lost if bfloat16 accumulates: 2**-9 is less than half of its last place.
    for value in (1.0, *[2.0**-9] * 64):
        layer(torch.full((1, SHAPE.ffn), value, dtype=dtype)).sum().backward()
    assert state.gradients.dtype is torch.float32
    assert state.gradients.tolist() == [1.0 + 64 * 2.0**-9] * state.shards.total


def test_a_parameter_without_a_place_is_refused() -> None:
    _, state = bound(torch.float32)
    layer = nn.Linear(SHAPE.ffn, SHAPE.hidden)
    layer.chunk = WHOLE
    with pytest.raises(AssertionError, match=r"without a tensor spec: \['bias'\]"):
        bind_parameters([layer], state.shards, state.parameters, state.gradients)


def test_a_tensor_without_a_parameter_is_refused() -> None:
    _, state = bound(torch.float32)
    with pytest.raises(AssertionError, match=r"without a parameter: \['weight'\]"):
        bind_parameters([], state.shards, state.parameters, state.gradients)


def test_every_accumulation_is_told() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        told: list[str] = []
        layer, _ = bound(dtype, told.append)
        for _ in range(2):
            layer(torch.ones(1, SHAPE.ffn, dtype=dtype)).sum().backward()
        assert told == ["weight", "weight"]


def test_transformer_engine_keeps_megatrons_names() -> None:
    """megatron-core maps its own names to Transformer Engine's in checkpoints: so do we."""
    prepare()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    renamed = get_gpt_layer_local_spec().submodules.sharded_state_dict_keys_map
    for spec in tensor_specs(SHAPE):
        expected = spec.name
        for apart, fused in renamed.items():
            expected = expected.replace(apart, fused)
        assert WHOLE.parameter_name(spec, TransformerImplementation.TRANSFORMER_ENGINE) == expected


@pytest.mark.parametrize("active", [(0, 1, 3), (2,), (0, 1, 2, 3)])
def test_megatron_divides_the_sizes_back_to_the_slots_own(active: tuple[int, ...]) -> None:
    """Any layer that divides by the degree, Transformer Engine's too, builds the slot's shard."""
    prepare()
    layout = with_active(full_layout(atom_counts(SHAPE), 4, 1).replicas[0], active)
    numerics = ModelNumerics(torch.float32, 16, sequence_parallel=True)
    for slot in active:
        local = {axis: layout.shards.local_atoms(axis, slot) for axis in Axis}
        config = transformer_config(SHAPE, numerics, 1, local, len(active), torch.device("cpu"))
        degree = config.tensor_model_parallel_size
        for size, atoms in (
            (config.ffn_hidden_size, local[Axis.MLP_COLUMN]),
            (config.num_query_groups, local[Axis.KV_GROUP]),
            (config.num_attention_heads, local[Axis.KV_GROUP] * SHAPE.heads_per_group),
        ):
            assert (size // degree, size % degree) == (atoms, 0)
        assert config.sequence_parallel == (degree > 1)
