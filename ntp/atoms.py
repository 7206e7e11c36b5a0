"""Model shape -> atoms: what a tensor-parallel slot may own, and how big it is.

Tensor parallelism cuts every sharded tensor along one of three axes, and on each axis there is a
smallest unit that may change hands, the *atom*:

- ``KV_GROUP``: a KV head with the query heads that read it, and the matching columns of the output
  projection. Cutting inside it would separate query heads from the keys they attend to.
- ``MLP_COLUMN``: column j of the MLP: gate j and up j (or only up j), and column j of down.
- ``VOCAB_ROW``: one token id, in the embedding and in the output layer.

An atom is the same unit in all tensors of its axis in all layers, so one ownership map per axis
describes a whole model. A ``TensorSpec`` ties that to storage: it gives the *global* tensor with
the atom dimension split out as a dimension of its own. A range of atoms is then a plain slice of
that dimension in any tensor, which keeps the interleaved tensors honest: the gate/up weight is
``(2, ffn, hidden)``, where a flat prefix of the stored ``(2 * ffn, hidden)`` parameter would take
gates of one owner and ups of another. Merging neighbouring dimensions gives Megatron's parameter.

Tensors whose axis is ``None`` (norms, biases of row-parallel layers) are whole on every slot.
Positions are assumed to be rotary: no learned position table is listed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from math import prod


class Axis(StrEnum):
    """The three ways in which tensor parallelism cuts a model."""

    KV_GROUP = "kv_group"
    MLP_COLUMN = "mlp_column"
    VOCAB_ROW = "vocab_row"


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


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One named tensor: its global shape with the atom dimension split out.

    ``shape[atom_dim]`` is the number of atoms; a replicated tensor has axis None and atom_dim -1.
    ``leading_dims`` counts the dimensions that merge into the parameter's first dimension; those
    after them, if any, merge into its second. ``partial_gradient``: the tensor is replicated, but a
    slot's gradient covers only what its own atoms contribute (the norms of queries and keys see the
    slot's heads), so the gradients of all slots must be summed.
    """

    name: str
    axis: Axis | None
    shape: tuple[int, ...]
    atom_dim: int
    leading_dims: int = 1
    partial_gradient: bool = False

    def __post_init__(self) -> None:
        split = 0 <= self.atom_dim < len(self.shape)
        assert split if self.axis is not None else self.atom_dim == -1, self
        assert 1 <= self.leading_dims <= len(self.shape), self
        assert self.axis is None or not self.partial_gradient, self

    def local_shape(self, atoms: int) -> tuple[int, ...]:
        """Shape with `atoms` atoms on the atom dimension; the full shape where replicated."""
        if self.axis is None:
            return self.shape
        return (*self.shape[: self.atom_dim], atoms, *self.shape[self.atom_dim + 1 :])

    def parameter_shape(self, atoms: int) -> tuple[int, ...]:
        """Shape of Megatron's nn.Parameter on a slot with `atoms` atoms: 2-D weight or 1-D."""
        local = self.local_shape(atoms)
        rows, columns = local[: self.leading_dims], local[self.leading_dims :]
        return (prod(rows), prod(columns)) if columns else (prod(rows),)

    @property
    def atom_elements(self) -> int:
        """Elements of one atom in this tensor; of the whole tensor where replicated."""
        return prod(self.local_shape(1))

    def elements(self, atoms: int) -> int:
        """Elements that a slot with `atoms` atoms stores of this tensor."""
        return prod(self.local_shape(atoms))


@dataclass(frozen=True, slots=True)
class AtomCounts:
    """How many atoms a model has on each axis."""

    kv_groups: int
    mlp_columns: int
    vocab_rows: int

    def of(self, axis: Axis) -> int:
        """Number of atoms on `axis`."""
        match axis:
            case Axis.KV_GROUP:
                return self.kv_groups
            case Axis.MLP_COLUMN:
                return self.mlp_columns
            case Axis.VOCAB_ROW:
                return self.vocab_rows


@dataclass(frozen=True, slots=True)
class AtomSizes:
    """Elements that one atom of each axis carries, summed over all tensors of the model.

    ``replicated`` is the total of all tensors that every slot holds whole.
    """

    kv_group: int
    mlp_column: int
    vocab_row: int
    replicated: int

    def of(self, axis: Axis | None) -> int:
        """Elements of one atom of `axis`; of all replicated tensors for None."""
        match axis:
            case None:
                return self.replicated
            case Axis.KV_GROUP:
                return self.kv_group
            case Axis.MLP_COLUMN:
                return self.mlp_column
            case Axis.VOCAB_ROW:
                return self.vocab_row


def atom_counts(shape: ModelShape) -> AtomCounts:
    """Number of atoms of a model on each axis."""
    return AtomCounts(shape.kv_groups, shape.ffn, shape.vocab)


def atom_elements_by_axis(specs: tuple[TensorSpec, ...]) -> AtomSizes:
    """Total elements of one atom on each axis over all `specs`, and of the replicated tensors."""

    def total(axis: Axis | None) -> int:
        return sum(spec.atom_elements for spec in specs if spec.axis is axis)

    return AtomSizes(
        total(Axis.KV_GROUP), total(Axis.MLP_COLUMN), total(Axis.VOCAB_ROW), total(None)
    )


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
