"""Model shape -> atoms: what a tensor-parallel slot may own, and how big it is.

Tensor parallelism cuts every sharded tensor along one of four axes, and on each axis there is a
smallest unit that may change hands, the *atom*:

- ``KV_GROUP``: a KV head with the query heads that read it, and the matching columns of the output
  projection. Cutting inside it would separate query heads from the keys they attend to.
- ``MLP_COLUMN``: column j of the MLP: gate j and up j (or only up j), and column j of down.
- ``VOCAB_ROW``: one token id, in the embedding and in the output layer.
- ``EXPERT``: one expert of the mixture-of-experts layers, whole: its gate, up and down.

A model has the axes on which it has atoms: a dense one has no EXPERT, and one whose every MLP is a
mixture of experts no MLP_COLUMN.

An atom is the same unit in all tensors of its axis in all layers, so one ownership map per axis
describes a whole model. A ``TensorSpec`` ties that to storage: it gives the *global* tensor with
the atom dimension split out as a dimension of its own. A range of atoms is then a plain slice of
that dimension in any tensor, which keeps the interleaved tensors honest: the gate/up weight is
``(2, ffn, hidden)``, where a flat prefix of the stored ``(2 * ffn, hidden)`` parameter would take
gates of one owner and ups of another. Merging neighbouring dimensions gives Megatron's parameter.

Tensors whose axis is ``None`` (norms, biases of row-parallel layers) are whole on every slot.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from math import prod


class Axis(StrEnum):
    """The ways in which tensor parallelism cuts a model. Axes are listed in this order."""

    KV_GROUP = "kv_group"
    MLP_COLUMN = "mlp_column"
    VOCAB_ROW = "vocab_row"
    EXPERT = "expert"


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
    """How many atoms a model has on each axis; 0 on an axis that it does not have."""

    kv_groups: int
    mlp_columns: int
    vocab_rows: int
    experts: int = 0

    @property
    def axes(self) -> tuple[Axis, ...]:
        """The axes on which there are atoms."""
        return tuple(axis for axis in Axis if self.of(axis))

    def of(self, axis: Axis) -> int:
        """Number of atoms on `axis`."""
        match axis:
            case Axis.KV_GROUP:
                return self.kv_groups
            case Axis.MLP_COLUMN:
                return self.mlp_columns
            case Axis.VOCAB_ROW:
                return self.vocab_rows
            case Axis.EXPERT:
                return self.experts


@dataclass(frozen=True, slots=True)
class AtomSizes:
    """Elements that one atom of each axis carries, summed over all tensors of the model.

    ``replicated`` is the total of all tensors that every slot holds whole.
    """

    kv_group: int
    mlp_column: int
    vocab_row: int
    replicated: int
    expert: int = 0

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
            case Axis.EXPERT:
                return self.expert


def total_sizes(sizes: Iterable[AtomSizes]) -> AtomSizes:
    """Sizes of the atoms over several parts of a model, such as its pipeline stages."""
    parts = tuple(sizes)
    return AtomSizes(
        kv_group=sum(part.kv_group for part in parts),
        mlp_column=sum(part.mlp_column for part in parts),
        vocab_row=sum(part.vocab_row for part in parts),
        replicated=sum(part.replicated for part in parts),
        expert=sum(part.expert for part in parts),
    )


def atom_elements_by_axis(specs: tuple[TensorSpec, ...]) -> AtomSizes:
    """Total elements of one atom on each axis over all `specs`, and of the replicated tensors."""

    def total(axis: Axis | None) -> int:
        return sum(spec.atom_elements for spec in specs if spec.axis is axis)

    return AtomSizes(
        kv_group=total(Axis.KV_GROUP),
        mlp_column=total(Axis.MLP_COLUMN),
        vocab_row=total(Axis.VOCAB_ROW),
        expert=total(Axis.EXPERT),
        replicated=total(None),
    )
