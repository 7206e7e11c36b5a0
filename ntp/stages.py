"""Layers -> pipeline stages: which consecutive part of the model each stage computes.

A stage holds one or more *chunks* (Megatron's virtual stages, for the interleaved schedule). The
layers are cut into stages x chunks runs, as even as whole layers allow, the longer ones first, and
dealt to the stages in turn: chunk c of stage s is run c * stages + s. The first run has the
embedding, the last one the final norm and the output layer. Where these share their weight, both
hold it, and the copy in the last stage is a tensor of the same name.

Pure. `Chunk.parameter_name` gives the name that a tensor has inside the module of its chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ntp.atoms import TensorSpec
from ntp.model_shape import EMBEDDING, OUTPUT, ModelShape, tensor_specs


class TransformerImplementation(StrEnum):
    """Whose layers compute: megatron-core's own, or Transformer Engine's (GPU only)."""

    LOCAL = "local"
    TRANSFORMER_ENGINE = "transformer_engine"


# Transformer Engine fuses a norm with the linear layer behind it, which then owns its weights.
_FUSED_NORMS = {
    ".input_layernorm.": ".self_attention.linear_qkv.layer_norm_",
    ".pre_mlp_layernorm.": ".mlp.linear_fc1.layer_norm_",
}


@dataclass(frozen=True, slots=True)
class Chunk:
    """Layers `first_layer` .. `first_layer + layers - 1`, and what comes before and after them."""

    first_layer: int
    layers: int
    has_embedding: bool
    has_output: bool

    def holds(self, spec: TensorSpec, tied: bool) -> bool:
        """Whether the chunk computes with the tensor."""
        if spec.name == EMBEDDING:
            return self.has_embedding or (tied and self.has_output)
        layer = _layer_of(spec.name)
        if layer is None:
            return self.has_output
        return self.first_layer <= layer < self.first_layer + self.layers

    def parameter_name(self, spec: TensorSpec, implementation: TransformerImplementation) -> str:
        """Name of the tensor's nn.Parameter in this chunk's GPTModel, whose layers count from 0."""
        if spec.name == EMBEDDING and not self.has_embedding:
            return OUTPUT
        layer = _layer_of(spec.name)
        if layer is None:
            return spec.name
        name = spec.name.replace(f".{layer}.", f".{layer - self.first_layer}.", 1)
        if implementation is TransformerImplementation.TRANSFORMER_ENGINE:
            for apart, fused in _FUSED_NORMS.items():
                name = name.replace(apart, fused)
        return name


def stage_chunks(layers: int, stages: int, stage: int, chunks: int) -> tuple[Chunk, ...]:
    """The chunks of one stage, in the order in which data passes them.

    Raises ValueError if there are fewer layers than chunks of all stages.
    """
    runs = stages * chunks
    if layers < runs:
        raise ValueError(
            f"{layers} layers cannot fill {stages} stages x {chunks} chunks = {runs}; use at most "
            f"{layers}"
        )
    share, longer = divmod(layers, runs)
    starts = [run * share + min(run, longer) for run in range(runs + 1)]
    return tuple(
        Chunk(starts[run], starts[run + 1] - starts[run], run == 0, run == runs - 1)
        for run in range(stage, runs, stages)
    )


def stage_specs(
    shape: ModelShape, chunks: tuple[Chunk, ...], sequence_parallel: bool
) -> tuple[TensorSpec, ...]:
    """The tensors of a stage, in the model's order; a tied weight once, even with both uses."""
    return tuple(
        spec
        for spec in tensor_specs(shape, sequence_parallel)
        if any(chunk.holds(spec, shape.tied) for chunk in chunks)
    )


def copied_names(shape: ModelShape, chunks: tuple[Chunk, ...]) -> frozenset[str]:
    """Tensors of a stage that an earlier stage holds too: a tied weight behind the first stage."""
    first = any(chunk.has_embedding for chunk in chunks)
    last = any(chunk.has_output for chunk in chunks)
    return frozenset({EMBEDDING}) if shape.tied and last and not first else frozenset()


def _layer_of(name: str) -> int | None:
    prefix = "decoder.layers."
    return int(name[len(prefix) :].partition(".")[0]) if name.startswith(prefix) else None
