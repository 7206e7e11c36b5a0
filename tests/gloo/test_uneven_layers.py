"""Uneven shards on megatron-core layers against the same model at degree 1, in float64.

Every rank runs forward, backward and the gradient sync of a lone replica. Weights are cut and
gradients put together here by atom index, independently of the product's offsets.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from dense import fill, generator, layout_of, relative_difference, whole
from harness import Cluster, Mismatch, Rank
from planted import plant
from torch import Tensor

from ntp.atoms import TensorSpec
from ntp.geometry import ReplicaLayout, SlotRef
from ntp.grad_sync import GradientSync, SyncGroups
from ntp.layers import ModelNumerics, bind_parameters, build_model
from ntp.model_shape import ModelShape, tensor_specs
from ntp.sync_plan import plan_sync
from trainer.shard_state import ShardState

SEQUENCE = 16
BATCH = 2
TOLERANCE = 1e-12
CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Variant:
    """A model."""

    shape: ModelShape
    activation: str = "silu"
    rms_norm: bool = True

    @property
    def numerics(self) -> ModelNumerics:
        """Settings beside the shape."""
        return ModelNumerics(
            torch.float64, SEQUENCE, rms_norm=self.rms_norm, activation=self.activation
        )


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
MHA = replace(GQA, heads=6, kv_groups=6, gated=False, bias=True, tied=True, norm_bias=True)
VARIANTS = {
    "gqa_swiglu_rms_untied": Variant(GQA),
    "gqa_swiglu_rms_biases_tied": Variant(replace(GQA, bias=True, tied=True)),
    "mha_gelu_layernorm_biases_tied": Variant(MHA, "gelu", rms_norm=False),
    "mha_gelu_rms_untied": Variant(replace(MHA, bias=False, tied=False, norm_bias=False), "gelu"),
    "gqa_qk_rms": Variant(replace(GQA, qk_norm=True)),
    "mha_qk_layernorm": Variant(replace(MHA, qk_norm=True), "gelu", rms_norm=False),
}
ACTIVE = {"tp4": (0, 1, 2, 3), "tp3": (0, 1, 3), "tp2": (1, 2), "tp1": (3,)}


@dataclass(frozen=True, slots=True)
class Outcome:
    """Loss per token, and each parameter's gradient in its split local shape."""

    losses: Tensor
    gradients: dict[str, Tensor]


def weights(spec: TensorSpec) -> Tensor:
    """Values that leave nothing at zero or one, so that every tensor matters."""
    drawn = torch.randn(spec.shape, generator=generator(spec.name, 0), dtype=torch.float64)
    return drawn * 0.1 + (1.0 if "norm.weight" in spec.name else 0.0)


def layer_rank(rank: Rank, variant: Variant, layout: ReplicaLayout, trap: str | None) -> Outcome:
    plant(trap)
    slot = layout.active[rank.rank]
    alone = layout_of(variant.shape, layout.shards.tp_base, layout.active)
    specs = tensor_specs(variant.shape)
    groups = rank.groups()
    ranks = rank.adopt(groups, alone, SlotRef(0, slot))
    state = ShardState(specs, layout, slot, torch.float64, CPU)
    fill(state.shards, layout, state.master, weights)
    model = build_model(
        variant.shape, variant.numerics, layout.shards, slot, layout.degree, groups.tensor, CPU
    )
    bind_parameters(model, state.shards, state.parameters, state.gradients)

    drawn = torch.randint(
        0, variant.shape.vocab, (BATCH, SEQUENCE + 1), generator=generator("tokens", 0)
    )
    # Atoms at the edges of all homes are in the batch, whatever was drawn.
    drawn[0, : SEQUENCE // 2] = torch.arange(SEQUENCE // 2) * variant.shape.vocab // 7 % 257
    drawn[1, :2] = torch.tensor([0, variant.shape.vocab - 1])
    future = torch.ones(1, 1, SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    positions = torch.arange(SEQUENCE).unsqueeze(0)
    losses = model(drawn[:, :-1], positions, future, labels=drawn[:, 1:].contiguous())
    losses.sum().backward()
    GradientSync(
        plan_sync(alone),
        SlotRef(0, slot),
        ranks,
        state.shards,
        SyncGroups(groups.world, groups.home),
        contributes_replicated=rank.rank == 0,
    ).run(state.gradients)

    gradients = {}
    parameters = dict(model.named_parameters())
    for spec in specs:
        atoms = layout.shards.local_atoms(spec.axis, slot) if spec.axis else 0
        gradient = parameters[spec.name].grad
        assert gradient is not None
        gradients[spec.name] = gradient.reshape(spec.local_shape(atoms)).clone()
    return Outcome(losses.detach(), gradients)


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
    wanted = reference(cluster, variant)
    layout = layout_of(variant.shape, 4, active).replicas[0]
    outcomes = cluster.run(layer_rank, len(active), variant, layout, trap)
    for slot, outcome in zip(active, outcomes, strict=True):
        if (error := relative_difference(outcome.losses, wanted.losses)) > TOLERANCE:
            raise Mismatch(f"slot {slot}: losses are off by {error:.1e}")
    parts = {SlotRef(0, s): o.gradients for s, o in zip(active, outcomes, strict=True)}
    wrong = []
    for spec in tensor_specs(variant.shape):
        if not wanted.gradients[spec.name].abs().max() > 0:
            raise Mismatch(f"{spec.name} has no gradient at degree 1: the check would be blind")
        got = [whole(spec, layout, parts)]
        if spec.axis is None:
            got = [part[spec.name] for part in parts.values()]
        error = max(relative_difference(each, wanted.gradients[spec.name]) for each in got)
        if not error <= TOLERANCE:
            wrong.append(f"{spec.name} by {error:.1e}")
    if wrong:
        raise Mismatch("gradients are off: " + ", ".join(wrong))


@pytest.mark.parametrize("degree", ACTIVE)
@pytest.mark.parametrize("name", VARIANTS)
def test_loss_and_gradients_are_those_of_one_piece(
    cluster: Cluster, name: str, degree: str
) -> None:
    check_layers(cluster, VARIANTS[name], ACTIVE[degree])
