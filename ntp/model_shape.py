"""A GPT's sizes, and the tensors and atoms that follow from them.

`tensor_specs` lists the parameters of Megatron-core's GPTModel as global tensors with their atom
dimension split out (see `ntp.atoms`). Positions are rotary: no learned position table is listed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ntp.atoms import AtomCounts, Axis, TensorSpec


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a GPT model. Raises ValueError for sizes that no model can have.

    ``bias``: the linear layers (qkv, proj, fc1, fc2) have one. ``gated``: fc1 holds gate and up.
    ``tied``: the output layer reuses the embedding. ``norm_bias``: norms are LayerNorms, with bias.
    """

    layers: int
    hidden: int
    heads: int
    kv_groups: int
    kv_channels: int
    ffn: int
    vocab: int
    gated: bool
    bias: bool
    tied: bool
    norm_bias: bool = False
    qk_norm: bool = False

    def __post_init__(self) -> None:
        sizes = {
            "layers": self.layers,
            "hidden": self.hidden,
            "heads": self.heads,
            "kv_groups": self.kv_groups,
            "kv_channels": self.kv_channels,
            "ffn": self.ffn,
            "vocab": self.vocab,
        }
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"model {name} is {size}; give a positive number")
        if self.heads % self.kv_groups:
            raise ValueError(
                f"{self.heads} heads do not divide into {self.kv_groups} kv_groups; "
                "choose kv_groups that divides heads (equal to heads for plain attention)"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_groups


def atom_counts(shape: ModelShape) -> AtomCounts:
    """Number of atoms of a model on each axis."""
    return AtomCounts(shape.kv_groups, shape.ffn, shape.vocab)


def tensor_specs(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """All parameters of Megatron-core's GPTModel (local layer spec), in the model's order."""
    vocabulary = (shape.vocab, shape.hidden)
    specs = [TensorSpec("embedding.word_embeddings.weight", Axis.VOCAB_ROW, vocabulary, 0)]
    for layer in range(shape.layers):
        specs += _layer_specs(shape, f"decoder.layers.{layer}")
    specs += _norm_specs(shape, "decoder.final_layernorm", shape.hidden)
    if not shape.tied:
        specs.append(TensorSpec("output_layer.weight", Axis.VOCAB_ROW, vocabulary, 0))
    return tuple(specs)


def _layer_specs(shape: ModelShape, prefix: str) -> list[TensorSpec]:
    hidden, groups, ffn = shape.hidden, shape.kv_groups, shape.ffn
    attention, mlp = f"{prefix}.self_attention", f"{prefix}.mlp"
    # Megatron lays fused QKV out per group: that group's query heads, then its k, then its v.
    group_rows = (shape.heads_per_group + 2) * shape.kv_channels
    group_columns = shape.heads_per_group * shape.kv_channels
    gates = (2,) if shape.gated else ()
    column_dim = len(gates)

    specs = _norm_specs(shape, f"{prefix}.input_layernorm", hidden)
    specs.append(
        TensorSpec(
            f"{attention}.linear_proj.weight",
            Axis.KV_GROUP,
            (hidden, groups, group_columns),
            1,
        )
    )
    if shape.bias:
        specs.append(TensorSpec(f"{attention}.linear_proj.bias", None, (hidden,), -1))
    name = f"{attention}.linear_qkv"
    specs.append(
        TensorSpec(
            f"{name}.weight",
            Axis.KV_GROUP,
            (groups, group_rows, hidden),
            0,
            leading_dims=2,
        )
    )
    if shape.bias:
        specs.append(
            TensorSpec(f"{name}.bias", Axis.KV_GROUP, (groups, group_rows), 0, leading_dims=2)
        )
    if shape.qk_norm:
        for norm in ("q_layernorm", "k_layernorm"):
            per_head = _norm_specs(shape, f"{attention}.{norm}", shape.kv_channels)
            specs += [replace(spec, partial_gradient=True) for spec in per_head]
    specs += _norm_specs(shape, f"{prefix}.pre_mlp_layernorm", hidden)
    dims = column_dim + 1
    columns = (*gates, ffn)
    name = f"{mlp}.linear_fc1"
    specs.append(
        TensorSpec(f"{name}.weight", Axis.MLP_COLUMN, (*columns, hidden), column_dim, dims)
    )
    if shape.bias:
        specs.append(TensorSpec(f"{name}.bias", Axis.MLP_COLUMN, columns, column_dim, dims))
    specs.append(TensorSpec(f"{mlp}.linear_fc2.weight", Axis.MLP_COLUMN, (hidden, ffn), 1))
    if shape.bias:
        specs.append(TensorSpec(f"{mlp}.linear_fc2.bias", None, (hidden,), -1))
    return specs


def _norm_specs(shape: ModelShape, name: str, size: int) -> list[TensorSpec]:
    kinds = ("weight", "bias") if shape.norm_bias else ("weight",)
    return [TensorSpec(f"{name}.{kind}", None, (size,), -1) for kind in kinds]
