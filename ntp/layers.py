"""GPT models with uneven tensor-parallel shards, on unchanged megatron-core layers.

`build_chunk` builds what one slot computes of one pipeline stage (or of one of its virtual stages).
How megatron-core is brought to build uneven shards is told in `ntp.megatron_layers`. Parts that
must know not only how much the slot owns, but what, are replaced: the embedding and the
cross-entropy by those of `ntp.vocabulary`, mixtures of experts by those of `ntp.experts`.

Parameters are views into the flat buffers of `LocalShards`; gradients accumulate into a second flat
buffer, in float32 where the parameters are bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ntp.atoms import Axis
from ntp.experts import expert_layer, owned_experts
from ntp.geometry import ShardMap
from ntp.local_shards import LocalShards
from ntp.megatron_cpu import prepare
from ntp.megatron_layers import ModelNumerics, block_submodules, transformer_config
from ntp.model_shape import ModelShape
from ntp.stages import Chunk, TransformerImplementation
from ntp.vocabulary import VocabularyCrossEntropy, VocabularyShard, local_rows

__all__ = ["ModelNumerics", "bind_parameters", "build_chunk"]


def build_chunk(
    shape: ModelShape,
    numerics: ModelNumerics,
    chunk: Chunk,
    shards: ShardMap,
    slot: int,
    degree: int,
    tensor_group: dist.ProcessGroup,
    device: torch.device,
) -> nn.Module:
    """Build the GPT shard of `slot` for `chunk`; its parameters hold no values until bound.

    `tensor_group` has one rank per active slot of the stage, in slot order. The model maps token
    ids (or, behind the first stage, its input tensor) and labels, both ``[batch, sequence]``, to
    per-token losses ``[batch, sequence]``, or to hidden states ``[sequence, batch, hidden]`` where
    the chunk has no output layer. With sequence parallelism the sequence must divide by `degree`.
    """
    prepare()
    local = {axis: shards.local_atoms(axis, slot) for axis in Axis}
    owned = owned_experts(shards, slot)
    experts = expert_layer(shape, owned, tensor_group) if owned else None
    model = _gpt_model_class()(
        config=transformer_config(shape, numerics, chunk.layers, local, degree, device),
        transformer_layer_spec=block_submodules(shape, numerics, chunk.layers, experts),
        vocab_size=local[Axis.VOCAB_ROW] * degree,
        max_sequence_length=numerics.max_sequence_length,
        pre_process=chunk.has_embedding,
        post_process=chunk.has_output,
        parallel_output=True,
        share_embeddings_and_output_weights=shape.tied,
        position_embedding_type="rope",
        rotary_percent=numerics.rotary_percent,
        rotary_base=numerics.rotary_base,
        pg_collection=_group_collection(tensor_group),
    )
    rows = local_rows(shards, slot, shape.vocab).to(device)
    model.tensor_group, model.local_rows, model.chunk = tensor_group, rows, chunk
    if chunk.has_embedding:
        weight = model.embedding.word_embeddings.weight
        model.embedding.word_embeddings = VocabularyShard(
            weight, rows, tensor_group, model.config.sequence_parallel
        )
    _recompute(model, numerics.recompute)
    return model.to(device)  # type: ignore[no-any-return]


def bind_parameters(
    chunks: Sequence[nn.Module],
    shards: LocalShards,
    parameters: Tensor,
    gradients: Tensor,
    implementation: TransformerImplementation = TransformerImplementation.LOCAL,
    accumulated: Callable[[str], None] | None = None,
) -> None:
    """Make the parameters of a stage's chunks views of `parameters`, with `gradients` to match.

    Both are flat, of ``shards.total`` elements. `parameters` has the model's dtype; `gradients` may
    be wider (float32 under bfloat16). The caller zeroes `gradients` at the start of a step.
    `accumulated` is called with a tensor's name each time a backward pass has added its gradient.
    """
    bound: set[int] = set()
    for model in chunks:
        named = dict(model.named_parameters())
        for placement in shards.placements:
            spec = placement.spec
            name = model.chunk.parameter_name(spec, implementation)  # type: ignore[union-attr, operator]
            parameter = named.pop(name, None)
            if parameter is None:
                continue
            atoms = placement.shape[spec.atom_dim] if spec.axis else 0
            local = spec.parameter_shape(atoms)
            assert tuple(parameter.shape) == local, (spec.name, parameter.shape, local)
            parameter.data = shards.tensor(parameters, placement).view(local)
            gradient = shards.tensor(gradients, placement).view(local)
            if gradients.dtype == parameters.dtype:
                parameter.grad = gradient
                if accumulated is not None:
                    parameter.register_post_accumulate_grad_hook(_Tell(accumulated, spec.name))
            else:
                parameter.register_post_accumulate_grad_hook(
                    _AccumulateInto(gradient, accumulated, spec.name)
                )
            bound.add(placement.offset)
        assert not named, f"parameters without a tensor spec: {sorted(named)}"
    missing = [p.spec.name for p in shards.placements if p.offset not in bound]
    assert not missing, f"tensors without a parameter: {missing}"


class _Tell:
    """Hook that says that a parameter's gradient was added to."""

    def __init__(self, accumulated: Callable[[str], None], name: str) -> None:
        self._accumulated = accumulated
        self._name = name

    def __call__(self, parameter: Tensor) -> None:
        self._accumulated(self._name)


class _AccumulateInto:
    """Hook that adds a fresh low-precision gradient to its wider accumulator and drops it."""

    def __init__(
        self, gradient: Tensor, accumulated: Callable[[str], None] | None, name: str
    ) -> None:
        self._gradient = gradient
        self._accumulated = accumulated
        self._name = name

    def __call__(self, parameter: Tensor) -> None:
        assert parameter.grad is not None
        self._gradient += parameter.grad
        parameter.grad = None
        if self._accumulated is not None:
            self._accumulated(self._name)


def _recompute(model: nn.Module, what: str | None) -> None:
    """Make layers, or the core of their attention, forget activations and compute them again.

    torch's checkpointing, as megatron-core's own saves the state of a GPU's random numbers, which
    these models do not draw. All slots recompute at the same places, so their collectives match.
    """
    if what is None:
        return
    layers: Any = model.decoder.layers  # type: ignore[union-attr]
    for layer in layers:
        module = layer if what == "full" else layer.self_attention.core_attention
        module.forward = partial(
            checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False
        )


def _gpt_model_class() -> Any:
    """GPTModel with our cross-entropy; made on call so that importing this file stays cheap."""
    from megatron.core.models.gpt import GPTModel

    class UnevenGPTModel(GPTModel):  # type: ignore[misc]
        """GPTModel whose loss finds the target among the rows that this slot owns."""

        tensor_group: dist.ProcessGroup
        local_rows: Tensor
        chunk: Chunk

        def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
            """labels ``[batch, sequence]``, logits ``[sequence, batch, local vocabulary]``."""
            rows = self.local_rows[labels].transpose(0, 1)
            losses: Tensor = VocabularyCrossEntropy.apply(logits, rows, self.tensor_group)
            return losses.transpose(0, 1).contiguous()

    return UnevenGPTModel


def _group_collection(tensor_group: dist.ProcessGroup) -> Any:
    from megatron.core.process_groups_config import ProcessGroupCollection

    # What megatron-core asks of the axes that are not split.
    alone = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]
    return ProcessGroupCollection(
        tp=tensor_group, pp=alone, cp=alone, tp_cp=tensor_group, embd=None, pos_embd=None, ep=alone
    )
