"""GPT models with uneven tensor-parallel shards, on unchanged megatron-core layers.

megatron-core derives every local size by dividing a global one by the group's size. A rank that is
given a configuration whose sizes are *its own local size times the degree* therefore builds exactly
the shard it should hold, and ranks of one group may be given different ones. Two places know more
than a size and are replaced: the embedding looks token ids up in the rows this slot owns (after a
loss these are not contiguous), and the cross-entropy does the same for the target logit.

Parameters are views into the flat buffers of `LocalShards`; gradients accumulate into a second flat
buffer, in float32 where the parameters are bfloat16.

Two all-reduces of the cross-entropy (maximum, then the target logit and the sum of exponentials
together) follow Shoeybi et al., "Megatron-LM" (2019), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor, nn

from ntp.atoms import Axis
from ntp.geometry import ShardMap
from ntp.local_shards import LocalShards
from ntp.megatron_cpu import prepare
from ntp.model_shape import ModelShape


@dataclass(frozen=True, slots=True)
class ModelNumerics:
    """What a model needs beside its shape. ``dtype`` is that of parameters and activations."""

    dtype: torch.dtype
    max_sequence_length: int
    rms_norm: bool = True
    norm_epsilon: float = 1e-5
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    activation: str = "silu"


def build_model(
    shape: ModelShape,
    numerics: ModelNumerics,
    shards: ShardMap,
    slot: int,
    degree: int,
    tensor_group: dist.ProcessGroup,
    device: torch.device,
) -> nn.Module:
    """Build the GPT shard of `slot`; its parameters hold no values until they are bound.

    `tensor_group` has one rank per active slot, in slot order. The model maps token ids
    ``[batch, sequence]`` and labels to per-token losses ``[batch, sequence]``.
    """
    prepare()
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    local = {axis: shards.local_atoms(axis, slot) for axis in Axis}
    rows = _local_rows(shards, slot, shape.vocab).to(device)
    model = _gpt_model_class()(
        config=_transformer_config(shape, numerics, local, degree, device),
        transformer_layer_spec=get_gpt_layer_local_spec(
            qk_layernorm=shape.qk_norm,
            normalization="RMSNorm" if numerics.rms_norm else "LayerNorm",
        ),
        vocab_size=local[Axis.VOCAB_ROW] * degree,
        max_sequence_length=numerics.max_sequence_length,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_percent=numerics.rotary_percent,
        rotary_base=numerics.rotary_base,
        pg_collection=_group_collection(tensor_group),
    )
    model.tensor_group, model.local_rows = tensor_group, rows
    weight = model.embedding.word_embeddings.weight
    model.embedding.word_embeddings = VocabularyShard(weight, rows, tensor_group)
    return model.to(device)  # type: ignore[no-any-return]


def bind_parameters(
    model: nn.Module, shards: LocalShards, parameters: Tensor, gradients: Tensor
) -> None:
    """Make the model's parameters views of `parameters` and accumulate into `gradients`.

    Both are flat, of ``shards.total`` elements. `parameters` has the model's dtype; `gradients` may
    be wider (float32 under bfloat16). The caller zeroes `gradients` at the start of a step.
    """
    named = dict(model.named_parameters())
    for placement in shards.placements:
        parameter = named.pop(placement.spec.name)
        local = placement.spec.parameter_shape(
            placement.shape[placement.spec.atom_dim] if placement.spec.axis else 0
        )
        assert tuple(parameter.shape) == local, (placement.spec.name, parameter.shape, local)
        parameter.data = shards.tensor(parameters, placement).view(local)
        gradient = shards.tensor(gradients, placement).view(local)
        if gradients.dtype == parameters.dtype:
            parameter.grad = gradient
        else:
            parameter.register_post_accumulate_grad_hook(_AccumulateInto(gradient))
    assert not named, f"parameters without a tensor spec: {sorted(named)}"


class _AccumulateInto:
    """Hook that adds a fresh low-precision gradient to its wider accumulator and drops it."""

    def __init__(self, gradient: Tensor) -> None:
        self._gradient = gradient

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._gradient += parameter.grad
        parameter.grad = None


class VocabularyShard(nn.Module):
    """Embedding of the token ids one slot owns; the sum over the group is the whole embedding.

    `rows` maps a token id to the local row of `weight`, or -1 where another slot owns it.
    """

    def __init__(self, weight: nn.Parameter, rows: Tensor, group: dist.ProcessGroup) -> None:
        super().__init__()
        self.weight = weight
        self._group = group
        self.register_buffer("_rows", rows, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Embed ``[batch, sequence]`` ids as ``[batch, sequence, hidden]``."""
        from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region

        rows: Tensor = self._rows[token_ids]  # type: ignore[index]
        elsewhere = rows < 0
        embedded = functional.embedding(rows.clamp(min=0), self.weight)
        embedded = embedded.masked_fill(elsewhere.unsqueeze(-1), 0.0)
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


def _local_rows(shards: ShardMap, slot: int, vocabulary: int) -> Tensor:
    rows = torch.full((vocabulary,), -1, dtype=torch.long)
    offset = 0
    for atoms in shards.owned(Axis.VOCAB_ROW, slot):
        rows[atoms.start : atoms.stop] = torch.arange(offset, offset + len(atoms))
        offset += len(atoms)
    return rows


def _gpt_model_class() -> Any:
    """GPTModel with our cross-entropy; made on call so that importing this file stays cheap."""
    from megatron.core.models.gpt import GPTModel

    class UnevenGPTModel(GPTModel):  # type: ignore[misc]
        """GPTModel whose loss finds the target among the rows that this slot owns."""

        tensor_group: dist.ProcessGroup
        local_rows: Tensor

        def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
            """labels ``[batch, sequence]``, logits ``[sequence, batch, local vocabulary]``."""
            rows = self.local_rows[labels].transpose(0, 1)
            losses: Tensor = VocabularyCrossEntropy.apply(logits, rows, self.tensor_group)
            return losses.transpose(0, 1).contiguous()

    return UnevenGPTModel


def _transformer_config(
    shape: ModelShape,
    numerics: ModelNumerics,
    local: dict[Axis, int],
    degree: int,
    device: torch.device,
) -> Any:
    from megatron.core.transformer import TransformerConfig

    activations = {"silu": functional.silu, "gelu": functional.gelu}
    return TransformerConfig(
        num_layers=shape.layers,
        hidden_size=shape.hidden,
        num_attention_heads=local[Axis.KV_GROUP] * shape.heads_per_group * degree,
        num_query_groups=local[Axis.KV_GROUP] * degree,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=local[Axis.MLP_COLUMN] * degree,
        tensor_model_parallel_size=degree,
        params_dtype=numerics.dtype,
        pipeline_dtype=numerics.dtype,
        bf16=numerics.dtype is torch.bfloat16,
        gated_linear_unit=shape.gated,
        activation_func=activations[numerics.activation],
        add_bias_linear=shape.bias,
        normalization="RMSNorm" if numerics.rms_norm else "LayerNorm",
        layernorm_epsilon=numerics.norm_epsilon,
        qk_layernorm=shape.qk_norm,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deterministic_mode=False,
    )


def _group_collection(tensor_group: dist.ProcessGroup) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    # What megatron-core asks of the axes that are not split.
    alone = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]
    return ProcessGroupCollection(
        tp=tensor_group, pp=alone, cp=alone, tp_cp=tensor_group, embd=None, pos_embd=None, ep=alone
    )
