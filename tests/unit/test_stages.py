"""Layers dealt to pipeline stages, and the names that tensors have there."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.model_shape import EMBEDDING, OUTPUT, ModelShape, tensor_specs
from ntp.stages import (
    TransformerImplementation,
    copied_names,
    stage_chunks,
    stage_specs,
)

LOCAL, ENGINE = TransformerImplementation.LOCAL, TransformerImplementation.TRANSFORMER_ENGINE


def shape_of(layers: int, tied: bool) -> ModelShape:
    return ModelShape(
        layers=layers,
        hidden=8,
        heads=4,
        kv_groups=2,
        kv_channels=2,
        ffn=6,
        vocab=11,
        gated=True,
        bias=True,
        tied=tied,
        qk_norm=True,
    )


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(0, 9), st.booleans())
def test_stages_hold_the_model_once(stages: int, chunks: int, more: int, tied: bool) -> None:
    shape = shape_of(stages * chunks + more, tied)
    dealt = [stage_chunks(shape.layers, stages, stage, chunks) for stage in range(stages)]
    in_turn = [dealt[stage][chunk] for chunk in range(chunks) for stage in range(stages)]
    assert [c.first_layer for c in in_turn] == [
        sum(earlier.layers for earlier in in_turn[:index]) for index in range(len(in_turn))
    ]
    sizes = [c.layers for c in in_turn]
    assert sum(sizes) == shape.layers and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert [c.has_embedding for c in in_turn] == [True] + [False] * (len(in_turn) - 1)
    assert [c.has_output for c in in_turn] == [False] * (len(in_turn) - 1) + [True]

    held = [stage_specs(shape, mine, False) for mine in dealt]
    counted = [
        spec.name
        for mine, specs in zip(dealt, held, strict=True)
        for spec in specs
        if spec.name not in copied_names(shape, mine)
    ]
    assert sorted(counted) == sorted(spec.name for spec in tensor_specs(shape))
    copies = sum(len(specs) for specs in held) - len(counted)
    assert copies == (1 if tied and stages > 1 else 0)


def test_names_inside_a_chunk() -> None:
    shape = shape_of(5, tied=True)
    first, last = stage_chunks(5, 2, 0, 1)[0], stage_chunks(5, 2, 1, 1)[0]
    specs = {spec.name: spec for spec in tensor_specs(shape)}
    assert first.parameter_name(specs[EMBEDDING], LOCAL) == EMBEDDING
    assert last.parameter_name(specs[EMBEDDING], LOCAL) == OUTPUT
    norm = specs["decoder.layers.3.input_layernorm.weight"]
    assert last.parameter_name(norm, LOCAL) == "decoder.layers.0.input_layernorm.weight"
    assert (
        last.parameter_name(norm, ENGINE)
        == "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"
    )
    final = specs["decoder.final_layernorm.weight"]
    assert last.parameter_name(final, ENGINE) == final.name


def test_fewer_layers_than_chunks_are_refused() -> None:
    with pytest.raises(ValueError, match="5 layers cannot fill 3 stages x 2 chunks = 6"):
        stage_chunks(5, 3, 0, 2)


def test_sequence_parallelism_makes_replicated_gradients_partial() -> None:
    for spec in tensor_specs(shape_of(1, tied=False), sequence_parallel=True):
        assert spec.partial_gradient == (spec.axis is None)
