"""Atoms: the tensors of one concrete model, by name, shape and total."""

from dataclasses import replace
from math import prod

import msgspec
import pytest

from ntp.atoms import AtomCounts, AtomSizes, Axis, TensorSpec, atom_elements_by_axis
from ntp.model_shape import ModelShape, atom_counts, tensor_specs

LLAMA = ModelShape(
    layers=2,
    hidden=16,
    heads=6,
    kv_groups=3,
    kv_channels=4,
    ffn=20,
    vocab=50,
    gated=True,
    bias=False,
    tied=False,
)
GPT = replace(LLAMA, gated=False, bias=True, tied=True, norm_bias=True, qk_norm=True)


def parameter_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Megatron's full-size parameter shapes, written down independently of the specs."""
    heads_rows = (shape.heads + 2 * shape.kv_groups) * shape.kv_channels
    fc1_rows = shape.ffn * (2 if shape.gated else 1)
    vectors = ("weight", "bias") if shape.norm_bias else ("weight",)
    names: dict[str, tuple[int, ...]] = {
        "embedding.word_embeddings.weight": (shape.vocab, shape.hidden)
    }
    if not shape.tied:
        names["output_layer.weight"] = (shape.vocab, shape.hidden)
    for kind in vectors:
        names[f"decoder.final_layernorm.{kind}"] = (shape.hidden,)
    for layer in range(shape.layers):
        prefix = f"decoder.layers.{layer}"
        linears = {
            "self_attention.linear_qkv": (heads_rows, shape.hidden),
            "self_attention.linear_proj": (shape.hidden, shape.heads * shape.kv_channels),
            "mlp.linear_fc1": (fc1_rows, shape.hidden),
            "mlp.linear_fc2": (shape.hidden, shape.ffn),
        }
        for name, size in linears.items():
            names[f"{prefix}.{name}.weight"] = size
            if shape.bias:
                names[f"{prefix}.{name}.bias"] = size[:1]
        for kind in vectors:
            names[f"{prefix}.input_layernorm.{kind}"] = (shape.hidden,)
            names[f"{prefix}.pre_mlp_layernorm.{kind}"] = (shape.hidden,)
            if shape.qk_norm:
                names[f"{prefix}.self_attention.q_layernorm.{kind}"] = (shape.kv_channels,)
                names[f"{prefix}.self_attention.k_layernorm.{kind}"] = (shape.kv_channels,)
    return names


@pytest.mark.parametrize("shape", [LLAMA, GPT], ids=["llama", "gpt"])
def test_names_and_parameter_shapes(shape: ModelShape) -> None:
    specs = tensor_specs(shape)
    counts = atom_counts(shape)
    full = {
        spec.name: spec.parameter_shape(counts.of(spec.axis) if spec.axis else 0) for spec in specs
    }
    assert len(full) == len(specs)
    assert full == parameter_shapes(shape)


@pytest.mark.parametrize("shape", [LLAMA, GPT], ids=["llama", "gpt"])
def test_totals_agree_with_parameters(shape: ModelShape) -> None:
    specs = tensor_specs(shape)
    sizes, counts = atom_elements_by_axis(specs), atom_counts(shape)
    total = sizes.replicated + sum(counts.of(axis) * sizes.of(axis) for axis in Axis)
    assert total == sum(prod(size) for size in parameter_shapes(shape).values())


def test_one_atom_of_each_axis() -> None:
    sizes = atom_elements_by_axis(tensor_specs(LLAMA))
    # Two layers; a KV group is two q heads, k and v rows, and two heads' columns of proj.
    assert sizes == AtomSizes(
        kv_group=2 * (4 * 4 * 16 + 16 * 2 * 4),
        mlp_column=2 * (2 * 16 + 16),
        vocab_row=2 * 16,
        replicated=2 * 2 * 16 + 16,
    )
    assert sizes.of(None) == sizes.replicated
    assert atom_counts(LLAMA) == AtomCounts(3, 20, 50)


def test_a_model_has_the_axes_on_which_it_has_atoms() -> None:
    assert AtomCounts(4, 16, 20).axes == (Axis.KV_GROUP, Axis.MLP_COLUMN, Axis.VOCAB_ROW)
    assert AtomCounts(4, 0, 20, 8).axes == (Axis.KV_GROUP, Axis.VOCAB_ROW, Axis.EXPERT)
    assert AtomCounts(4, 16, 20, 8).axes == tuple(Axis)
    assert [AtomCounts(1, 2, 3, 4).of(axis) for axis in Axis] == [1, 2, 3, 4]


def test_an_expert_is_an_atom() -> None:
    # 6 experts of 20 columns: gate and up, and down; the router is replicated.
    specs = (
        TensorSpec("experts.linear_fc1.weight", Axis.EXPERT, (6, 2, 20, 16), 0, leading_dims=3),
        TensorSpec("experts.linear_fc2.weight", Axis.EXPERT, (6, 16, 20), 0, leading_dims=2),
        TensorSpec("router.weight", None, (6, 16), -1),
    )
    sizes = atom_elements_by_axis(specs)
    assert sizes == AtomSizes(0, 0, 0, replicated=96, expert=3 * 20 * 16)
    assert [sizes.of(axis) for axis in Axis] == [0, 0, 0, 960]
    assert specs[0].parameter_shape(2) == (2 * 2 * 20, 16)


def test_local_shapes_keep_the_interleaved_dimensions() -> None:
    specs = {spec.name: spec for spec in tensor_specs(replace(LLAMA, bias=True))}
    layer = "decoder.layers.1"
    gate_up = specs[f"{layer}.mlp.linear_fc1.weight"]
    assert gate_up.local_shape(7) == (2, 7, 16)
    assert gate_up.parameter_shape(7) == (14, 16)
    assert gate_up.elements(7) == 7 * gate_up.atom_elements == 224
    assert specs[f"{layer}.mlp.linear_fc1.bias"].parameter_shape(7) == (14,)
    assert specs[f"{layer}.self_attention.linear_qkv.bias"].local_shape(2) == (2, 16)
    assert specs[f"{layer}.self_attention.linear_proj.weight"].local_shape(2) == (16, 2, 8)
    replicated = specs[f"{layer}.mlp.linear_fc2.bias"]
    assert (replicated.axis, replicated.atom_dim) == (None, -1)
    assert replicated.local_shape(5) == replicated.parameter_shape(5) == (16,)
    assert replicated.elements(5) == replicated.atom_elements == 16


def test_specs_survive_json() -> None:
    specs = tensor_specs(GPT)
    decoded = msgspec.json.decode(msgspec.json.encode(specs), type=tuple[TensorSpec, ...])
    assert decoded == specs


@pytest.mark.parametrize(
    ("layers", "heads", "ffn", "message"),
    [
        (2, 5, 20, "5 heads do not divide into 3 kv_groups"),
        (0, 6, 20, "layers is 0"),
        (2, 6, -1, "ffn is -1"),
    ],
)
def test_impossible_shapes(layers: int, heads: int, ffn: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(LLAMA, layers=layers, heads=heads, ffn=ffn)
