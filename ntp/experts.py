"""Mixture-of-experts layers whose experts are owned unevenly by the slots of a replica.

Theory of operation. A router gives each token the `top_k` experts with the highest logits; its
output is the sum of theirs, weighted by the softmax over these `top_k` logits (Megatron's default:
`moe_router_pre_softmax` off; it leaves a lone expert's gate at 1, so `top_k` is at least 2).
Experts are atoms: a slot holds some of them whole, in the place of the MLP of megatron-core's
TransformerLayer.

This is expert parallelism without an exchange of tokens. Between attention and MLP, all slots of a
replica have all of its tokens anyway (with sequence parallelism: after the gather that any
tensor-parallel layer begins with). So every slot routes all tokens, all alike, runs the ones that
are routed to its own experts, and the slots' outputs are summed as those of a tensor-parallel MLP
are: the same collectives and bytes, at any degree, whoever owns what. The price is that each token
visits each slot. With many experts on a large group most slots do nothing for most tokens. Sending
a token only to the slots that have its experts (all-to-all) moves `top_k` / (degree - 1) of the
bytes at most, so it is better for degrees above `top_k` + 1; that is not built.

There is no capacity and no auxiliary loss, no token is dropped, and nothing is drawn: what a token
gets depends on this token alone, whatever else is in the batch and whoever owns the experts. Slots
wait for each other in every layer, so an uneven routing costs time; nothing here balances it.

Logits are compared in float32 (float64 in a float64 model), and of equal ones the lower expert goes
first, so that the choice is defined. Outputs and gradients are added expert by expert in storage
order, and an expert has a token at most once: sums have one order, on GPUs too.

A slot whose experts no token takes must still join the collectives of backward. It does: it runs
them on no tokens, which keeps its graph whole and gives it gradients of zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor, nn

from ntp.atoms import Axis
from ntp.geometry import ShardMap
from ntp.model_shape import ModelShape


class ExpertShard(nn.Module):
    """A mixture-of-experts layer as one slot computes it.

    `config` is megatron-core's TransformerConfig; `owned` has the global numbers of the slot's
    experts in storage order; `group` one rank per active slot. Parameters, with local experts e,
    columns f and hidden size h: ``router.weight`` [experts, h], whole on each slot;
    ``experts.weight1`` [e * f, h] (gated: [e * 2 * f, h], an expert's gates before its ups);
    ``experts.weight2`` [e * h, f].
    """

    def __init__(
        self, config: Any, shape: ModelShape, owned: Sequence[int], group: dist.ProcessGroup
    ) -> None:
        super().__init__()
        self._config = config
        self._group = group
        self._top_k = shape.top_k
        first_rows = shape.expert_ffn * (2 if shape.gated else 1)
        self._weight1_shape = (len(owned), first_rows, shape.hidden)
        self._weight2_shape = (len(owned), shape.hidden, shape.expert_ffn)

        def weight(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=config.params_dtype))

        self.router = nn.ParameterDict({"weight": weight(shape.experts, shape.hidden)})
        self.experts = nn.ParameterDict(
            {
                "weight1": weight(len(owned) * first_rows, shape.hidden),
                "weight2": weight(len(owned) * shape.hidden, shape.expert_ffn),
            }
        )
        # Local number of each expert, -1 where another slot owns it.
        local = torch.full((shape.experts,), -1, dtype=torch.long)
        local[list(owned)] = torch.arange(len(owned))
        self.register_buffer("_local", local, persistent=False)

    def forward(self, hidden: Tensor, **_unused: Any) -> tuple[Tensor, None]:
        """Output of the layer, in the form of `hidden`, and None: it has no bias.

        hidden ``[sequence, batch, h]``; with sequence parallelism this slot's part of the sequence.
        """
        entered = self._enter(hidden)
        output = self._own_experts(entered.flatten(0, 1))
        return self._leave(output.view_as(entered)), None

    def _own_experts(self, tokens: Tensor) -> Tensor:
        """What the slot's experts add to the output of `tokens` [n, h]; same shape."""
        gates, experts = route(tokens, self.router["weight"], self._top_k)
        local = self._local[experts].flatten()  # type: ignore[index]
        # (token, rank) pairs as numbers, ordered by expert, then token; those of others first.
        pairs = local.argsort(stable=True)
        elsewhere, *counts = (local + 1).bincount(minlength=self._weight1_shape[0] + 1).tolist()
        pairs = pairs[elsewhere:]
        rows = pairs // self._top_k
        inputs = _TakeRows.apply(tokens, rows, counts)  # type: ignore[no-untyped-call]
        output = torch.zeros_like(tokens)
        for row, gate, each, weight1, weight2 in zip(
            rows.split(counts),
            gates.flatten()[pairs].split(counts),
            inputs.split(counts),
            self.experts["weight1"].view(self._weight1_shape),
            self.experts["weight2"].view(self._weight2_shape),
            strict=True,
        ):
            activated = self._activate(functional.linear(each, weight1))
            weighted = functional.linear(activated, weight2) * gate.unsqueeze(-1)
            output.index_add_(0, row, weighted.to(output.dtype))
        return output

    def _activate(self, columns: Tensor) -> Tensor:
        activation = self._config.activation_func
        if not self._config.gated_linear_unit:
            return activation(columns)  # type: ignore[no-any-return]
        gates, ups = columns.chunk(2, dim=-1)
        return activation(gates) * ups  # type: ignore[no-any-return]

    def _enter(self, hidden: Tensor) -> Tensor:
        """All tokens; backward sums the slots' gradients of them."""
        from megatron.core.tensor_parallel.mappings import (
            copy_to_tensor_model_parallel_region,
            gather_from_sequence_parallel_region,
        )

        if self._config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self._group)  # type: ignore[no-any-return]
        return copy_to_tensor_model_parallel_region(hidden, group=self._group)  # type: ignore[no-any-return]

    def _leave(self, output: Tensor) -> Tensor:
        """The sum over the slots; of this slot's part of the sequence where that is cut."""
        from megatron.core.tensor_parallel.mappings import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        if self._config.sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(output, group=self._group)  # type: ignore[no-any-return]
        return reduce_from_tensor_model_parallel_region(output, group=self._group)  # type: ignore[no-any-return]


def route(tokens: Tensor, weight: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Gates and global numbers of each token's experts, both [n, top_k], the highest gate first.

    tokens [n, h]; weight [experts, h]. A token's gates sum to 1; their dtype is float32 or wider.
    """
    wide = torch.promote_types(tokens.dtype, torch.float32)
    logits = functional.linear(tokens.to(wide), weight.to(wide))
    # Not topk, which leaves open what comes first among equals.
    highest, experts = logits.sort(dim=-1, descending=True, stable=True)
    return highest[:, :top_k].softmax(dim=-1), experts[:, :top_k]


class _TakeRows(torch.autograd.Function):
    """Rows of a matrix; backward adds their gradients run by run, none with a row twice."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor, counts: list[int]) -> Tensor:
        """`rows` of `matrix`, as runs of `counts` rows."""
        ctx.save_for_backward(rows)
        ctx.counts, ctx.size = counts, matrix.shape
        return matrix.index_select(0, rows)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of `matrix`."""
        (rows,), counts = ctx.saved_tensors, ctx.counts
        gradient = grad_outputs[0].new_zeros(ctx.size)
        for row, part in zip(rows.split(counts), grad_outputs[0].split(counts), strict=True):
            gradient.index_add_(0, row, part)
        return gradient, None, None


def owned_experts(shards: ShardMap, slot: int) -> tuple[int, ...]:
    """Global numbers of the experts of `slot` in storage order; () for a dense model."""
    owned = shards.owned(Axis.EXPERT, slot)
    return tuple(expert for atoms in owned for expert in range(atoms.start, atoms.stop))


def expert_layer(shape: ModelShape, owned: Sequence[int], group: dist.ProcessGroup) -> type:
    """What a layer spec has in the place of the MLP: megatron-core calls it with its config."""

    class SlotExperts:
        """Stands for the ExpertShard of this slot."""

        def __new__(cls, config: Any) -> nn.Module:  # type: ignore[misc]
            return ExpertShard(config, shape, owned, group)

    return SlotExperts
