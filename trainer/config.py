"""The configuration of a run: model, data and training settings, and how a file is read.

Theory of operation. `load` reads one YAML file, applies `--set a.b=c` overrides to the parsed tree,
and validates it into a frozen `RunConfig`. Model settings carry the names of Megatron's
`TransformerConfig`, so a Megatron user knows them already. All problems are collected and reported
at once, one line each, with the dotted name of the setting, the numbers and the remedy; no part of
the runtime has to check them again, because a `RunConfig` that exists is consistent.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, Literal, Self

from pydantic import Field, model_validator

from elastic.config import ClusterConfig, ParallelConfig, check_cluster
from elastic.health_config import HealthConfig
from elastic.settings import Settings
from elastic.store_config import StoreConfig
from ntp.model_shape import ModelShape

BYTE_VALUES: Final = 256
"""Tokens are bytes: the smallest vocabulary that can name them all."""


class ModelConfig(Settings):
    """A GPT, described with the names of Megatron's TransformerConfig."""

    num_layers: int = Field(ge=1, description="Transformer layers.")
    hidden_size: int = Field(ge=1, description="Channels of the residual stream.")
    num_attention_heads: int = Field(ge=1, description="Query heads of each attention layer.")
    num_query_groups: int | None = Field(
        default=None, ge=1, description="KV groups (GQA); null: one for each attention head."
    )
    kv_channels: int | None = Field(
        default=None, ge=1, description="Channels of one head; null: hidden_size / heads."
    )
    ffn_hidden_size: int | None = Field(
        default=None, ge=1, description="Columns of the MLP; null: 4 x hidden_size."
    )
    num_moe_experts: int | None = Field(
        default=None,
        ge=1,
        description="Experts of every layer, in the place of its MLP; null: a dense model.",
    )
    moe_ffn_hidden_size: int | None = Field(
        default=None, ge=1, description="Columns of one expert; null: ffn_hidden_size."
    )
    moe_router_topk: int = Field(
        default=2, ge=2, description="Experts of a token, weighted by a softmax over their logits."
    )
    vocab_size: int = Field(
        default=BYTE_VALUES, ge=1, description="Token ids; at least 256, as tokens are bytes."
    )
    gated_linear_unit: bool = Field(default=True, description="Gate the MLP (SwiGLU with silu).")
    activation: Literal["silu", "gelu"] = Field(
        default="silu", description="Activation function of the MLP."
    )
    add_bias_linear: bool = Field(default=False, description="Biases in all linear layers.")
    normalization: Literal["RMSNorm", "LayerNorm"] = Field(
        default="RMSNorm", description="Norm before each block; LayerNorm has a bias."
    )
    layernorm_epsilon: float = Field(
        default=1e-5, gt=0, description="Added to the variance inside every norm."
    )
    qk_layernorm: bool = Field(default=False, description="Normalise queries and keys per head.")
    rotary_base: int = Field(default=10000, ge=1, description="Base period of RoPE, in positions.")
    rotary_percent: float = Field(
        default=1.0, gt=0, le=1, description="Fraction of kv_channels that RoPE rotates."
    )
    untie_embeddings_and_output_weights: bool = Field(
        default=True, description="Give the output projection weights of its own."
    )
    make_vocab_size_divisible_by: int | None = Field(
        default=None,
        ge=1,
        description="Pad the vocabulary to a multiple of this x parallel.tensor, as Megatron does; "
        "null: no padding, which uneven shards do not need.",
    )
    recompute_granularity: Literal["selective", "full"] | None = Field(
        default=None,
        description="Compute again in the backward pass: selective: the attention's core; full: "
        "whole layers; null: keep all activations.",
    )
    transformer_impl: Literal["local", "transformer_engine"] = Field(
        default="local",
        description="Layers: megatron-core's own, or Transformer Engine's (GPU only).",
    )
    init_method_std: float = Field(
        default=0.02, gt=0, description="Standard deviation of initial weights."
    )

    @property
    def query_groups(self) -> int:
        """Number of KV groups, defaults resolved."""
        return self.num_query_groups or self.num_attention_heads

    @property
    def head_channels(self) -> int:
        """Channels of one head, defaults resolved."""
        return self.kv_channels or self.hidden_size // self.num_attention_heads

    @property
    def ffn_size(self) -> int:
        """Columns of the MLP, defaults resolved."""
        return self.ffn_hidden_size or 4 * self.hidden_size

    @property
    def expert_ffn_size(self) -> int:
        """Columns of one expert, defaults resolved."""
        return self.moe_ffn_hidden_size or self.ffn_size


class DataConfig(Settings):
    """The bytes that the job trains on."""

    kind: Literal["builtin_text", "text", "mock"] = Field(
        default="builtin_text",
        description="builtin_text: Python's own sources; text: your files; mock: random bytes.",
    )
    path: str | None = Field(
        default=None, description="File, directory or glob; required for kind text, else unused."
    )


class TrainConfig(Settings):
    """Steps, batch and optimizer."""

    steps: int = Field(ge=1, description="Optimizer steps of the whole run, counted from 0.")
    global_batch_size: int = Field(ge=1, description="Samples of one step, over all replicas.")
    micro_batch_size: int = Field(
        ge=1, description="Samples of one forward pass in a replica; its last one may have fewer."
    )
    split_batch_by: Literal["degree", "speed", "equal"] = Field(
        default="degree",
        description="What the samples of a replica follow: degree: its most loaded slot's share of "
        "the model; speed: its seconds per sample, measured until the newest generation began; "
        "equal: nothing.",
    )
    seq_length: int = Field(ge=1, description="Tokens (bytes) of one sample.")
    learning_rate: float = Field(default=1e-3, gt=0, description="Peak learning rate of Adam.")
    min_learning_rate: float = Field(
        default=1e-4, ge=0, description="Learning rate at the last step."
    )
    warmup_steps: int = Field(default=10, ge=0, description="Steps of linear warm-up to the peak.")
    weight_decay: float = Field(default=0.0, ge=0, description="Decoupled weight decay of AdamW.")
    adam_beta1: float = Field(default=0.9, ge=0, lt=1, description="Decay of Adam's mean.")
    adam_beta2: float = Field(default=0.95, ge=0, lt=1, description="Decay of Adam's variance.")
    adam_epsilon: float = Field(default=1e-8, gt=0, description="Added to Adam's denominator.")
    clip_grad: float = Field(
        default=1.0, ge=0, description="Largest global gradient norm; 0: never clip."
    )
    seed: int = Field(
        default=1234, ge=0, lt=2**63, description="Seed of initial weights and sample order."
    )
    dtype: Literal["float64", "float32", "bfloat16"] = Field(
        default="float32", description="Type of parameters and activations."
    )
    gradient_bucket_bytes: int = Field(
        default=4 * 1024 * 1024,
        ge=1,
        description="Bytes of gradients that a slot reduces at a time while backward goes on.",
    )
    reshard_chunk_bytes: int = Field(
        default=16 * 1024 * 1024,
        ge=1,
        description="Bytes of a message of shards; a change of layout needs memory for a few.",
    )
    weights_digest_every: int = Field(
        default=1, ge=0, description="Steps between digests of the logical weights; 0: never."
    )


class RunConfig(Settings):
    """Everything that one run needs to know; consistent once it exists."""

    job: str = Field(
        default="everstep",
        pattern=r"^[a-z0-9-]+$",
        description="Name of the job: lower-case letters, digits and dashes; prefixes store keys.",
    )
    cluster: ClusterConfig = Field(
        default_factory=ClusterConfig, description="The machines that the job runs on."
    )
    parallel: ParallelConfig = Field(
        default_factory=ParallelConfig, description="The shape of the job at full strength."
    )
    model: ModelConfig = Field(description="The model.")
    data: DataConfig = Field(default_factory=DataConfig, description="The training data.")
    train: TrainConfig = Field(description="Steps, batch and optimizer.")
    health: HealthConfig = Field(
        default_factory=HealthConfig, description="When something counts as failed."
    )
    store: StoreConfig = Field(
        default_factory=StoreConfig, description="Where coordination state is kept."
    )

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = [
            *_cluster_problems(self),
            *_model_problems(self.model),
            *_expert_problems(self.model),
            *_split_problems(self.model, self.parallel),
            *_pipeline_problems(self.model, self.parallel),
            *_train_problems(self),
            *_data_problems(self.data),
        ]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _cluster_problems(config: RunConfig) -> Iterator[str]:
    try:
        check_cluster(config.cluster, config.parallel)
    except ValueError as error:
        yield f"cluster: {error}"


def _model_problems(model: ModelConfig) -> Iterator[str]:
    heads, groups = model.num_attention_heads, model.query_groups
    if heads % groups:
        yield (
            f"model.num_query_groups: {heads} attention heads do not divide into {groups} KV"
            " groups; set it to a divisor of model.num_attention_heads"
        )
    if model.kv_channels is None and model.hidden_size % heads:
        yield (
            f"model.kv_channels: hidden_size {model.hidden_size} does not divide by {heads}"
            " attention heads; set model.kv_channels, or make hidden_size a multiple of the heads"
        )
        return  # The channels of a head are not known: what follows would only confuse.
    rotated = int(model.head_channels * model.rotary_percent)
    if rotated < 2 or rotated % 2:
        yield (
            f"model.kv_channels: RoPE rotates pairs, but {model.head_channels} channels x"
            f" rotary_percent {model.rotary_percent} = {rotated} is not an even number of at least"
            " 2; set model.kv_channels or model.rotary_percent so that it is"
        )
    if model.vocab_size < BYTE_VALUES:
        yield (
            f"model.vocab_size: {model.vocab_size} token ids cannot name the {BYTE_VALUES} values"
            f" of a byte; set it to {BYTE_VALUES} or more"
        )


def _expert_problems(model: ModelConfig) -> Iterator[str]:
    experts = model.num_moe_experts
    if experts is None:
        if model.moe_ffn_hidden_size is not None:
            yield (
                f"model.moe_ffn_hidden_size: {model.moe_ffn_hidden_size} would be ignored, as the"
                " model is dense; set model.num_moe_experts, or remove model.moe_ffn_hidden_size"
            )
        return
    if model.moe_router_topk > experts:
        yield (
            f"model.moe_router_topk: a token cannot take {model.moe_router_topk} of {experts}"
            f" experts; set model.num_moe_experts to {model.moe_router_topk} or more"
            + (f", or model.moe_router_topk to {experts} or less" if experts >= 2 else "")
        )
    if model.add_bias_linear:
        yield (
            f"model.add_bias_linear: the {experts} experts have no biases; set it to false, or"
            " model.num_moe_experts to null"
        )
    if model.transformer_impl == "transformer_engine":
        yield (
            f"model.transformer_impl: Transformer Engine's layers cannot hold the {experts}"
            " experts; set it to local, or model.num_moe_experts to null"
        )


def _split_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    mlp = ("ffn_hidden_size", model.ffn_size, "MLP columns cannot be cut")
    if model.num_moe_experts is not None:
        mlp = ("num_moe_experts", model.num_moe_experts, "experts cannot be cut")
    sizes = (
        ("num_query_groups", model.query_groups, "KV groups cannot be cut"),
        mlp,
        ("vocab_size", model.vocab_size, "vocabulary rows cannot be cut"),
    )
    for name, size, why in sizes:
        if size < parallel.tensor:
            yield (
                f"model.{name}: {size} is less than parallel.tensor ({parallel.tensor}), and {why};"
                f" set parallel.tensor to {size} or less, or model.{name} to at least"
                f" {parallel.tensor}"
            )


def _pipeline_problems(model: ModelConfig, parallel: ParallelConfig) -> Iterator[str]:
    chunks = parallel.pipeline * parallel.virtual_pipeline
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline: {parallel.virtual_pipeline} chunks need more than one"
            " stage; set it to 1, or parallel.pipeline to 2 or more"
        )
    if model.num_layers < chunks:
        yield (
            f"model.num_layers: {model.num_layers} layers cannot fill parallel.pipeline"
            f" ({parallel.pipeline}) x parallel.virtual_pipeline ({parallel.virtual_pipeline}) ="
            f" {chunks} chunks; set it to {chunks} or more, or use fewer stages"
        )


def _train_problems(config: RunConfig) -> Iterator[str]:
    train, replicas = config.train, config.parallel.replicas
    if train.global_batch_size < replicas:
        yield (
            f"train.global_batch_size: {train.global_batch_size} samples cannot give each of"
            f" parallel.replicas ({replicas}) at least one; set it to {replicas} or more, or"
            f" parallel.replicas to {train.global_batch_size} or less"
        )
    parallel = config.parallel
    needed = replicas * parallel.pipeline
    if parallel.virtual_pipeline > 1 and replicas <= train.global_batch_size < needed:
        yield (
            f"train.global_batch_size: {train.global_batch_size} samples cannot give each of"
            f" parallel.replicas ({replicas}) one for each of parallel.pipeline"
            f" ({parallel.pipeline}) stages, which parallel.virtual_pipeline above 1 needs; set it"
            f" to {needed} or more, or parallel.virtual_pipeline to 1"
        )
    if train.min_learning_rate > train.learning_rate:
        yield (
            f"train.min_learning_rate: {train.min_learning_rate} is above train.learning_rate"
            f" ({train.learning_rate}); set it to {train.learning_rate} or less"
        )


def _data_problems(data: DataConfig) -> Iterator[str]:
    if data.kind == "text" and not data.path:
        yield "data.path: required when data.kind is text; set it to a file, directory or glob"
    if data.kind != "text" and data.path is not None:
        yield (
            f"data.path: {data.path!r} would be ignored, as data.kind is {data.kind};"
            " set data.kind to text, or remove data.path"
        )


def model_shape(config: RunConfig) -> ModelShape:
    """The sizes that decide how the model is cut into atoms, with every default resolved."""
    model = config.model
    experts = model.num_moe_experts or 0
    multiple = (model.make_vocab_size_divisible_by or 0) * config.parallel.tensor or 1
    return ModelShape(
        layers=model.num_layers,
        hidden=model.hidden_size,
        heads=model.num_attention_heads,
        kv_groups=model.query_groups,
        kv_channels=model.head_channels,
        ffn=model.ffn_size,
        vocab=-(-model.vocab_size // multiple) * multiple,
        gated=model.gated_linear_unit,
        bias=model.add_bias_linear,
        tied=not model.untie_embeddings_and_output_weights,
        norm_bias=model.normalization == "LayerNorm",
        qk_norm=model.qk_layernorm,
        experts=experts,
        expert_ffn=model.expert_ffn_size if experts else 0,
        top_k=model.moe_router_topk if experts else 0,
    )
