"""Embedding and cross-entropy over a vocabulary whose rows are owned unevenly.

Both know more of a slot than a size: which token ids it owns. After a loss these are not
contiguous, so a table maps a token id to the local row, or to -1 where another slot owns it.

Two all-reduces of the cross-entropy (maximum, then the target logit and the sum of exponentials
together) follow Shoeybi et al., "Megatron-LM" (2019), section 3.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor, nn

from ntp.atoms import Axis
from ntp.geometry import ShardMap


class VocabularyShard(nn.Module):
    """Embedding of the token ids one slot owns; the sum over the group is the whole embedding.

    `rows` maps a token id to the local row of `weight`, or -1 where another slot owns it. With
    `sequence_parallel` each slot gets the sum for its part of the sequence only.
    """

    def __init__(
        self, weight: nn.Parameter, rows: Tensor, group: dist.ProcessGroup, sequence_parallel: bool
    ) -> None:
        super().__init__()
        self.weight = weight
        self._group = group
        self._sequence_parallel = sequence_parallel
        self.register_buffer("_rows", rows, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Embed ``[batch, sequence]`` ids as ``[batch, sequence, hidden]``.

        With sequence parallelism as ``[sequence / degree, batch, hidden]``.
        """
        from megatron.core.tensor_parallel.mappings import (
            reduce_from_tensor_model_parallel_region,
            reduce_scatter_to_sequence_parallel_region,
        )

        rows: Tensor = self._rows[token_ids]  # type: ignore[index]
        elsewhere = rows < 0
        embedded = functional.embedding(rows.clamp(min=0), self.weight)
        embedded = embedded.masked_fill(elsewhere.unsqueeze(-1), 0.0)
        if self._sequence_parallel:
            return reduce_scatter_to_sequence_parallel_region(  # type: ignore[no-any-return]
                embedded.transpose(0, 1).contiguous(), group=self._group
            )
        return reduce_from_tensor_model_parallel_region(  # type: ignore[no-any-return]
            embedded, group=self._group
        )


class VocabularyCrossEntropy(torch.autograd.Function):
    """Per-token cross-entropy over logits whose vocabulary is spread unevenly over a group.

    logits ``[..., local vocabulary]``; target rows ``[...]``: local row of the target, or -1.
    Computed in the logits' dtype, in float32 where that is narrower.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target_rows: Tensor, group: dist.ProcessGroup) -> Tensor:
        """Loss ``[...]`` of each token."""
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        maximum = wide.max(dim=-1).values
        dist.all_reduce(maximum, op=dist.ReduceOp.MAX, group=group)
        shifted = wide - maximum.unsqueeze(-1)
        owned = target_rows >= 0
        picked = shifted.gather(-1, target_rows.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        exponentials = shifted.exp_()
        sums = torch.stack([picked.masked_fill(~owned, 0.0), exponentials.sum(dim=-1)])
        dist.all_reduce(sums, group=group)
        target_logit, partition = sums
        probabilities = exponentials.div_(partition.unsqueeze(-1))
        ctx.save_for_backward(probabilities, target_rows)
        ctx.logits_dtype = logits.dtype
        losses: Tensor = partition.log() - target_logit
        return losses

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None]:
        """Gradient of the local logits: probability, less one at the target, times the incoming."""
        probabilities, target_rows = ctx.saved_tensors
        gradient = probabilities.clone()
        owned = (target_rows >= 0).to(gradient.dtype).unsqueeze(-1)
        gradient.scatter_add_(-1, target_rows.clamp(min=0).unsqueeze(-1), -owned)
        gradient.mul_(grad_outputs[0].unsqueeze(-1))
        return gradient.to(ctx.logits_dtype), None, None


def local_rows(shards: ShardMap, slot: int, vocabulary: int) -> Tensor:
    """Local row of each of `vocabulary` token ids in `slot`, -1 where it does not own it."""
    rows = torch.full((vocabulary,), -1, dtype=torch.long)
    offset = 0
    for atoms in shards.owned(Axis.VOCAB_ROW, slot):
        rows[atoms.start : atoms.stop] = torch.arange(offset, offset + len(atoms))
        offset += len(atoms)
    return rows
