"""A GPT's sizes, and the tensors and atoms that follow from them.

`tensor_specs` lists the parameters of Megatron-core's GPTModel as global tensors with their atom
dimension split out (see `ntp.atoms`). Positions are rotary: no learned position table is listed.
Where layers are mixtures of experts, their tensors are those of `ntp.experts`, with the names of
Megatron's router and grouped experts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from ntp.atoms import AtomCounts, Axis, TensorSpec

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Sizes of a GPT model. Raises ValueError for sizes that no model can have.

    ``bias``: the linear layers (qkv, proj, fc1, fc2) have one. ``gated``: fc1 holds gate and up.
    ``tied``: the output layer reuses the embedding. ``norm_bias``: norms are LayerNorms, with bias.
    ``experts``: 0 for a dense model; otherwise every layer is a mixture of so many experts of
    ``expert_ffn`` columns each, instead of one MLP of ``ffn`` columns, and a token takes ``top_k``.
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
    experts: int = 0
    expert_ffn: int = 0
    top_k: int = 0

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
        if self.experts:
            self._check_experts()

    def _check_experts(self) -> None:
        if self.experts < 1 or self.expert_ffn < 1:
            raise ValueError(
                f"model has {self.experts} experts of {self.expert_ffn} columns; give positive "
                "numbers, or 0 experts for a dense model"
            )
        if not 2 <= self.top_k <= self.experts:
            # The gate of a single expert is 1, whatever the router says: it would never learn.
            raise ValueError(
                f"top_k is {self.top_k} of {self.experts} experts; choose at least 2, and at most "
                "the number of experts"
            )
        if self.bias:
            raise ValueError(
                f"linear biases are not supported with {self.experts} experts; set bias to False"
            )

    @property
    def heads_per_group(self) -> int:
        """Query heads that share one KV head."""
        return self.heads // self.kv_groups


def atom_counts(shape: ModelShape) -> AtomCounts:
    """Number of atoms of a model on each axis."""
    mlp_columns = 0 if shape.experts else shape.ffn
    return AtomCounts(shape.kv_groups, mlp_columns, shape.vocab, shape.experts)


def tensor_specs(shape: ModelShape, sequence_parallel: bool = False) -> tuple[TensorSpec, ...]:
    """All parameters of Megatron-core's GPTModel (local layer spec), in the model's order.

    With `sequence_parallel` a slot sees only its part of the sequence between the linear layers, so
    its gradients of all replicated tensors are partial.
    """
    vocabulary = (shape.vocab, shape.hidden)
    specs = [TensorSpec(EMBEDDING, Axis.VOCAB_ROW, vocabulary, 0)]
    for layer in range(shape.layers):
        specs += _layer_specs(shape, f"decoder.layers.{layer}")
    specs += _norm_specs(shape, "decoder.final_layernorm", shape.hidden)
    if not shape.tied:
        specs.append(TensorSpec(OUTPUT, Axis.VOCAB_ROW, vocabulary, 0))
    if sequence_parallel:
        specs = [
            replace(spec, partial_gradient=True) if spec.axis is None else spec for spec in specs
        ]
    return tuple(specs)


def _layer_specs(shape: ModelShape, prefix: str) -> list[TensorSpec]:
    hidden, groups = shape.hidden, shape.kv_groups
    attention = f"{prefix}.self_attention"
    # Megatron lays fused QKV out per group: that group's query heads, then its k, then its v.
    group_rows = (shape.heads_per_group + 2) * shape.kv_channels
    group_columns = shape.heads_per_group * shape.kv_channels

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
    mlp_specs = _expert_specs if shape.experts else _mlp_specs
    return specs + mlp_specs(shape, f"{prefix}.mlp")


def _mlp_specs(shape: ModelShape, mlp: str) -> list[TensorSpec]:
    hidden, ffn = shape.hidden, shape.ffn
    gates = (2,) if shape.gated else ()
    column_dim = len(gates)
    dims = column_dim + 1
    columns = (*gates, ffn)
    name = f"{mlp}.linear_fc1"
    specs = [TensorSpec(f"{name}.weight", Axis.MLP_COLUMN, (*columns, hidden), column_dim, dims)]
    if shape.bias:
        specs.append(TensorSpec(f"{name}.bias", Axis.MLP_COLUMN, columns, column_dim, dims))
    specs.append(TensorSpec(f"{mlp}.linear_fc2.weight", Axis.MLP_COLUMN, (hidden, ffn), 1))
    if shape.bias:
        specs.append(TensorSpec(f"{mlp}.linear_fc2.bias", None, (hidden,), -1))
    return specs


def _expert_specs(shape: ModelShape, mlp: str) -> list[TensorSpec]:
    experts, ffn, hidden = shape.experts, shape.expert_ffn, shape.hidden
    first = (experts, 2, ffn, hidden) if shape.gated else (experts, ffn, hidden)
    return [
        # A slot's gradient of the router covers what its own experts were given.
        TensorSpec(f"{mlp}.router.weight", None, (experts, hidden), -1, partial_gradient=True),
        TensorSpec(f"{mlp}.experts.weight1", Axis.EXPERT, first, 0, leading_dims=len(first) - 1),
        TensorSpec(
            f"{mlp}.experts.weight2", Axis.EXPERT, (experts, hidden, ffn), 0, leading_dims=2
        ),
    ]


def _norm_specs(shape: ModelShape, name: str, size: int) -> list[TensorSpec]:
    kinds = ("weight", "bias") if shape.norm_bias else ("weight",)
    return [TensorSpec(f"{name}.{kind}", None, (size,), -1) for kind in kinds]
