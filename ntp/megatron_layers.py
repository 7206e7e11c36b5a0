"""What megatron-core is told about a slot: its TransformerConfig and its layer specs.

megatron-core derives every local size by dividing a global one by the group's size. A rank that is
given a configuration whose sizes are *its own local size times the degree* therefore builds exactly
the shard it should hold, and ranks of one group may be given different ones. The same goes for
pipeline stages: a chunk is a model of its own with only its layers, without a pipeline as far as
its configuration knows. Transformer Engine's layers divide in the same way, so they take the same
configuration.

megatron-core's wrapper of torch's norms refuses sequence parallelism, although a norm works on one
position at a time; `_TorchNorm` builds the same modules without asking.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as functional
from torch import nn

from ntp.atoms import Axis
from ntp.model_shape import ModelShape
from ntp.stages import TransformerImplementation


@dataclass(frozen=True, slots=True)
class ModelNumerics:
    """What a model needs beside its shape. ``dtype`` is that of parameters and activations.

    ``recompute``: None, "selective" (the attention's core) or "full" (whole layers) is computed
    again in the backward pass rather than kept.
    """

    dtype: torch.dtype
    max_sequence_length: int
    rms_norm: bool = True
    norm_epsilon: float = 1e-5
    rotary_base: int = 10000
    rotary_percent: float = 1.0
    activation: str = "silu"
    sequence_parallel: bool = False
    recompute: str | None = None
    implementation: TransformerImplementation = TransformerImplementation.LOCAL


def transformer_config(
    shape: ModelShape,
    numerics: ModelNumerics,
    layers: int,
    local: dict[Axis, int],
    degree: int,
    device: torch.device,
) -> Any:
    """megatron-core's TransformerConfig for a chunk of `layers` layers.

    `local` has the atoms that the slot owns on each axis; `degree` is that of its replica.
    """
    from megatron.core.transformer import TransformerConfig

    activations = {"silu": functional.silu, "gelu": functional.gelu}
    return TransformerConfig(
        num_layers=layers,
        hidden_size=shape.hidden,
        num_attention_heads=local[Axis.KV_GROUP] * shape.heads_per_group * degree,
        num_query_groups=local[Axis.KV_GROUP] * degree,
        kv_channels=shape.kv_channels,
        ffn_hidden_size=local[Axis.MLP_COLUMN] * degree,
        tensor_model_parallel_size=degree,
        sequence_parallel=numerics.sequence_parallel and degree > 1,
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
        # The schedule divides nothing: gradients are sums over tokens.
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=device.type == "cpu",
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        deterministic_mode=False,
        overlap_p2p_comm=False,
        batch_p2p_comm=False,
    )


def block_submodules(
    shape: ModelShape, numerics: ModelNumerics, layers: int, experts: type | None = None
) -> Any:
    """megatron-core's TransformerBlockSubmodules: the spec of each layer and the final norm's.

    `experts` makes the layers' mixture of experts, and takes the place of their MLP; None: none.
    """
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    match numerics.implementation:
        case TransformerImplementation.TRANSFORMER_ENGINE:
            assert experts is None, "the configuration refuses experts in Transformer Engine layers"
            from megatron.core.extensions.transformer_engine import TENorm

            layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(
                qk_layernorm=shape.qk_norm
            )
            return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=TENorm)
        case TransformerImplementation.LOCAL:
            layer = gpt_layer_specs.get_gpt_layer_local_spec(
                qk_layernorm=shape.qk_norm,
                normalization="RMSNorm" if numerics.rms_norm else "LayerNorm",
            )
            modules = layer.submodules
            modules.input_layernorm = modules.pre_mlp_layernorm = _TorchNorm
            if experts is not None:
                modules.mlp = experts
            if shape.qk_norm:
                attention = modules.self_attention.submodules
                attention.q_layernorm = attention.k_layernorm = _TorchNorm
            return TransformerBlockSubmodules(layer_specs=[layer] * layers, layer_norm=_TorchNorm)


class _TorchNorm:
    """Stands for torch's norm of the configured kind; megatron-core wants a class to call."""

    def __new__(  # type: ignore[misc]
        cls, config: Any, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> nn.Module:
        norm = nn.RMSNorm if config.normalization == "RMSNorm" else nn.LayerNorm
        return norm(hidden_size, eps=eps)
