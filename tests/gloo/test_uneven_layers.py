"""Uneven shards on megatron-core layers against the same model at degree 1, in float64.

Every rank runs the microbatches of a lone replica through its pipeline stages. Weights are cut and
gradients put together here by atom index, independently of the product's offsets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import torch.distributed as dist
from dense import fill, generator, layout_of, named, relative_difference, whole
from harness import Cluster, Mismatch, Rank
from planted import plant
from torch import Tensor

from ntp.atoms import TensorSpec
from ntp.geometry import ReplicaLayout, SlotRef
from ntp.groups import Coordinate, places
from ntp.layers import ModelNumerics, bind_parameters, build_chunk
from ntp.model_shape import EMBEDDING, ModelShape, tensor_specs
from ntp.pipeline import ForwardBackward, MicroBatch
from ntp.stages import stage_chunks, stage_specs
from trainer.shard_state import ShardState

SEQUENCE = 16
TOLERANCE = 1e-12
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Variant:
    """A model."""

    shape: ModelShape
    activation: str = "silu"
    rms_norm: bool = True
    stages: int = 1
    chunks: int = 1
    sequence_parallel: bool = False
    recompute: str | None = None
    micro_batches: tuple[int, ...] = (2,)

    @property
    def numerics(self) -> ModelNumerics:
        """Settings beside the shape."""
        return ModelNumerics(
            torch.float64,
            SEQUENCE,
            rms_norm=self.rms_norm,
            activation=self.activation,
            sequence_parallel=self.sequence_parallel,
            recompute=self.recompute,
        )

    @property
    def in_one_piece(self) -> Variant:
        """The same model and tokens without anything that cuts or recomputes."""
        return replace(self, stages=1, chunks=1, sequence_parallel=False, recompute=None)


GQA = ModelShape(
    layers=2,
    hidden=32,
    heads=10,
    kv_groups=5,
    kv_channels=4,
    ffn=53,
    vocab=257,
    gated=True,
    bias=False,
    tied=False,
)
DEEP = replace(GQA, layers=5)
TIED = replace(GQA, layers=4, tied=True, bias=True, qk_norm=True)
MHA = replace(GQA, heads=6, kv_groups=6, gated=False, bias=True, tied=True, norm_bias=True)
MOE = replace(GQA, experts=6, expert_ffn=11, top_k=2)
MOE_GELU = replace(MHA, bias=False, experts=9, expert_ffn=7, top_k=3)
IDLE = replace(GQA, layers=1, experts=64, expert_ffn=5, top_k=2)
VARIANTS = {
    "gqa_swiglu_rms_untied": Variant(GQA),
    "gqa_swiglu_rms_biases_tied": Variant(replace(GQA, bias=True, tied=True)),
    "mha_gelu_layernorm_biases_tied": Variant(MHA, "gelu", rms_norm=False),
    "mha_gelu_rms_untied": Variant(replace(MHA, bias=False, tied=False, norm_bias=False), "gelu"),
    "gqa_qk_rms": Variant(replace(GQA, qk_norm=True)),
    "mha_qk_layernorm": Variant(replace(MHA, qk_norm=True), "gelu", rms_norm=False),
    "moe_swiglu": Variant(MOE),
    "moe_gelu_tied": Variant(MOE_GELU, "gelu", rms_norm=False),
    # 16 tokens take at most 32 of the experts.
    "moe_idle_experts": Variant(IDLE, micro_batches=(1,)),
}
STAGED = {
    "sequence_parallel": Variant(replace(GQA, bias=True, qk_norm=True), sequence_parallel=True),
    "sequence_parallel_layernorm": Variant(MHA, "gelu", rms_norm=False, sequence_parallel=True),
    "recompute_full": Variant(GQA, recompute="full", sequence_parallel=True),
    "recompute_selective": Variant(GQA, recompute="selective"),
    "pp2": Variant(DEEP, stages=2, micro_batches=(1, 1, 1)),
    "pp2_tied": Variant(TIED, stages=2, micro_batches=(1, 2)),
    "pp2_one_micro_batch": Variant(GQA, stages=2),
    "pp3_unequal_micro_batches": Variant(DEEP, stages=3, micro_batches=(2, 2, 2, 1)),
    "pp2_interleaved": Variant(DEEP, stages=2, chunks=2, micro_batches=(1, 1, 1, 1)),
    "pp2_interleaved_odd": Variant(TIED, stages=2, chunks=2, micro_batches=(2, 2, 1)),
    "pp2_sequence_parallel_recompute": Variant(
        TIED, stages=2, sequence_parallel=True, recompute="full", micro_batches=(1, 1)
    ),
    "moe_sequence_parallel": Variant(MOE, sequence_parallel=True),
    "moe_gelu_sequence_parallel": Variant(MOE_GELU, "gelu", rms_norm=False, sequence_parallel=True),
    "moe_recompute_full": Variant(MOE, recompute="full"),
    "moe_recompute_selective": Variant(MOE_GELU, "gelu", rms_norm=False, recompute="selective"),
    "moe_pp2": Variant(MOE, stages=2, micro_batches=(1, 2)),
    "moe_pp2_sequence_parallel_recompute": Variant(
        replace(MOE, tied=True),
        stages=2,
        sequence_parallel=True,
        recompute="full",
        micro_batches=(1, 1),
    ),
}
ACTIVE = {"tp4": (0, 1, 2, 3), "tp3": (0, 1, 3), "tp2": (1, 2), "tp1": (3,)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """The sum of the losses, and each parameter's gradient in its split local shape."""

    place: Coordinate
    loss_sum: float
    gradients: dict[str, Tensor]


def weights(spec: TensorSpec) -> Tensor:
    """Values that leave nothing at zero or one, so that every tensor matters."""
    drawn = torch.randn(spec.shape, generator=generator(spec.name, 0), dtype=torch.float64)
    return drawn * 0.1 + (1.0 if "norm.weight" in spec.name else 0.0)


def micro_batches(variant: Variant) -> list[MicroBatch]:
    """Tokens that touch the edges of all homes, whatever was drawn."""
    vocabulary = variant.shape.vocab
    found = []
    for number, samples in enumerate(variant.micro_batches):
        drawn = torch.randint(
            0, vocabulary, (samples, SEQUENCE + 1), generator=generator("tokens", number)
        )
        drawn[0, : SEQUENCE // 2] = torch.arange(SEQUENCE // 2) * vocabulary // 7 % 257
        drawn[-1, -2:] = torch.tensor([0, vocabulary - 1])
        found.append(MicroBatch(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()))
    return found


def layer_rank(rank: Rank, variant: Variant, layout: ReplicaLayout, trap: str | None) -> Outcome:
    plant(trap)
    alone = layout_of(variant.shape, layout.shards.tp_base, layout.active)
    place = places(alone, variant.stages)[rank.rank]
    chunks = stage_chunks(variant.shape.layers, variant.stages, place.stage, variant.chunks)
    specs = stage_specs(variant.shape, chunks, variant.sequence_parallel)
    groups = rank.groups()
    rank.adopt(groups, alone, place.slot_ref, stage=place.stage, stages=variant.stages)
    state = ShardState(specs, layout, place.slot, torch.float64, CPU)
    fill(state.shards, layout, state.master, weights)
    models = [
        build_chunk(
            variant.shape,
            variant.numerics,
            chunk,
            layout.shards,
            place.slot,
            layout.degree,
            groups.tensor,
            CPU,
        )
        for chunk in chunks
    ]
    bind_parameters(models, state.shards, state.parameters, state.gradients)
    passes = ForwardBackward(models, groups.tensor, groups.pipeline, CPU)
    loss_sum = passes.run(lambda: iter(micro_batches(variant)), variant.micro_batches, SEQUENCE)
    gradients = named(state.shards, state.gradients)
    if variant.shape.tied and EMBEDDING in gradients:
        passes.sum_tied(gradients[EMBEDDING])
    # As the vote does in a step: nobody lets go of what others still receive.
    dist.all_reduce(torch.zeros(1), group=groups.world)
    for spec in specs:
        if spec.partial_gradient:
            dist.all_reduce(gradients[spec.name], group=groups.tensor)
    return Outcome(place, loss_sum, gradients)


@cache
def reference(cluster: Cluster, variant: Variant) -> Outcome:
    """The model in one piece."""
    layout = layout_of(variant.shape, 1, (0,)).replicas[0]
    outcome: Outcome = cluster.run(layer_rank, 1, variant, layout, None)[0]
    return outcome


def check_layers(
    cluster: Cluster, variant: Variant, active: tuple[int, ...], trap: str | None = None
) -> None:
    """Raise Mismatch unless losses and every gradient agree with the model in one piece."""
    wanted = reference(cluster, variant.in_one_piece)
    layout = layout_of(variant.shape, 4, active).replicas[0]
    size = len(active) * variant.stages
    outcomes: list[Outcome] = cluster.run(layer_rank, size, variant, layout, trap)
    for outcome in outcomes:
        if outcome.place.stage == variant.stages - 1:
            error = abs(outcome.loss_sum / wanted.loss_sum - 1)
            if error > TOLERANCE:
                raise Mismatch(f"{outcome.place}: the loss is off by {error:.1e}")
    wrong, seen = [], set()
    for stage in range(variant.stages):
        mine = {o.place.slot_ref: o.gradients for o in outcomes if o.place.stage == stage}
        for spec in tensor_specs(variant.shape):
            if spec.name not in mine[SlotRef(0, active[0])]:
                continue
            seen.add(spec.name)
            reference_gradient = wanted.gradients[spec.name]
            if not reference_gradient.abs().max() > 0:
                raise Mismatch(f"{spec.name} has no gradient at degree 1: the check would be blind")
            got = [whole(spec, layout, mine)]
            if spec.axis is None:
                got = [part[spec.name] for part in mine.values()]
            error = max(relative_difference(each, reference_gradient) for each in got)
            if not error <= TOLERANCE:
                wrong.append(f"{spec.name} by {error:.1e}")
    if missing := wanted.gradients.keys() - seen:
        wrong.append(f"no stage has {sorted(missing)}")
    if wrong:
        raise Mismatch("gradients are off: " + ", ".join(wrong))


@pytest.mark.parametrize("degree", ACTIVE)
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_are_those_of_one_piece(
    cluster: Cluster, name: str, degree: str
) -> None:
    check_layers(cluster, VARIANTS[name], ACTIVE[degree])


@pytest.mark.parametrize("name", STAGED)
def test_stages_sequence_and_recomputation_change_nothing(cluster: Cluster, name: str) -> None:
    check_layers(cluster, STAGED[name], (0, 2, 3) if STAGED[name].stages < 3 else (0, 2))


@pytest.mark.parametrize("name", ["pp2_tied", "pp2_interleaved_odd", "moe_sequence_parallel"])
def test_one_slot_alone(cluster: Cluster, name: str) -> None:
    check_layers(cluster, STAGED[name], (1,))
