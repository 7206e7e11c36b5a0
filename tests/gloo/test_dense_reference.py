"""Twenty steps at uneven degrees against the same model in one piece, in float64.

Every case runs the real worker and step loop through a story of losses and returns, and is held
against one process at TP1 on the same global batches: loss and gradient norm of each step, and
every gradient and parameter of every slot after the first step and after the last. Whole tensors
are put together here by atom index.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import pytest
from dense import relative_difference, same_bits, whole
from harness import Cluster, Mismatch
from story import Snapshot, Told, members_of, story, story_rank

from elastic.topology import Coordinate
from ntp.geometry import SlotRef
from ntp.model_shape import EMBEDDING, tensor_specs
from trainer.config import RunConfig, model_shape

STEPS = 20
AFTER_FIRST, AFTER_LAST = 1e-12, 1e-9

GQA = {"num_attention_heads": 8, "num_query_groups": 4, "kv_channels": 4}
FEW_GROUPS = {"num_attention_heads": 8, "num_query_groups": 2, "kv_channels": 4}
MHA = {"num_attention_heads": 8, "kv_channels": 2}
BIASES = {"add_bias_linear": True}
IN_PAIRS = {"micro_batch_size": 2}
TIED = {"untie_embeddings_and_output_weights": False}
EXPERTS = {"num_moe_experts": 6, "moe_ffn_hidden_size": 11}
GELU = {"gated_linear_unit": False, "activation": "gelu", "normalization": "LayerNorm"}


@dataclass(frozen=True, slots=True)
class Case:
    """A job and its story.

    `absent` names, by step, the (replica, stage, slot) that have no worker from that step on.
    """

    tensor: int
    replicas: int
    absent: Mapping[int, tuple[tuple[int, int, int], ...]]
    model: Mapping[str, Any] = field(default_factory=lambda: GQA)
    parallel: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


def lost(replica: int, *slots: int) -> tuple[tuple[int, int, int], ...]:
    """These slots of a replica, in the first stage."""
    return tuple((replica, 0, slot) for slot in slots)


CASES = {
    "4_to_3": Case(4, 2, {1: lost(1, 3)}, {**GQA, **BIASES, **TIED}),
    "4_to_3_middle_slot": Case(4, 2, {1: lost(0, 1)}),
    "4_to_2_two_losses": Case(4, 2, {1: lost(1, 1), 2: lost(1, 1, 2)}, {**GQA, **BIASES}),
    "4_to_1": Case(4, 2, {1: lost(1, 0, 1, 3)}, {**GQA, "qk_layernorm": True}),
    "8_to_7_mha_gelu": Case(
        8,
        2,
        {0: lost(1, *range(1, 8)), 1: lost(0, 4) + lost(1, *range(1, 8))},
        {**MHA, **GELU, **BIASES, **TIED},
    ),
    "8_to_5": Case(
        8, 2, {0: lost(1, *range(2, 8)), 1: lost(0, 1, 2, 6) + lost(1, *range(2, 8))}, {**MHA}
    ),
    "degrees_4_3_2": Case(4, 3, {1: lost(1, 2) + lost(2, 0, 3)}, {**GQA, **BIASES}),
    "same_slot_everywhere": Case(
        4, 2, {1: lost(0, 2), 2: lost(0, 2) + lost(1, 2)}, {**GQA, **TIED}
    ),
    "different_slots": Case(4, 2, {1: lost(0, 0) + lost(1, 3)}),
    "gqa_8_2": Case(2, 2, {1: lost(0, 1)}, {**FEW_GROUPS, **GELU, **BIASES}),
    "fail_heal_fail_heal": Case(4, 2, {1: lost(1, 2), 4: (), 7: lost(1, 0), 9: lost(0, 3), 12: ()}),
    "sequence_parallel": Case(
        4, 2, {1: lost(1, 1)}, {**GQA, **BIASES}, {"sequence_parallel": True}, IN_PAIRS
    ),
    "sequence_parallel_gelu_tied": Case(
        4, 2, {1: lost(0, 0, 3)}, {**GQA, **GELU, **TIED}, {"sequence_parallel": True}, IN_PAIRS
    ),
    "recompute": Case(
        4, 2, {1: lost(1, 3)}, {**GQA, "recompute_granularity": "full"}, {}, IN_PAIRS
    ),
    "unequal_batches": Case(
        4, 2, {1: lost(1, 2, 3)}, {**GQA, **BIASES}, {}, {"micro_batch_size": 3}
    ),
    "pp2": Case(2, 2, {1: ((1, 1, 0),)}, {**GQA, **BIASES}, {"pipeline": 2}),
    "pp2_tied_sequence_parallel_recompute": Case(
        2,
        2,
        {1: ((1, 0, 1),), 5: (), 6: ((0, 1, 1),)},
        {**GQA, **TIED, "num_layers": 3, "recompute_granularity": "full"},
        {"pipeline": 2, "sequence_parallel": True},
        IN_PAIRS,
    ),
    "experts": Case(4, 2, {1: lost(1, 1), 9: ()}, {**GQA, **EXPERTS}, {}, IN_PAIRS),
    "experts_sequence_parallel": Case(
        4, 2, {1: lost(0, 3)}, {**GQA, **EXPERTS, **TIED}, {"sequence_parallel": True}, IN_PAIRS
    ),
    "pp2_interleaved": Case(
        2, 2, {1: ((1, 0, 0),)}, {**GQA, "num_layers": 4}, {"pipeline": 2, "virtual_pipeline": 2}
    ),
}


def configuration(case: Case) -> RunConfig:
    """The case's run. Adam's epsilon is well above what gradients that are zero round to."""
    parallel = {"tensor": case.tensor, "replicas": case.replicas, **case.parallel}
    devices = case.tensor * case.replicas * parallel.get("pipeline", 1)
    return RunConfig.model_validate(
        {
            "cluster": {"devices_per_node": devices},
            "parallel": parallel,
            "model": {
                "num_layers": 2,
                "hidden_size": 16,
                "ffn_hidden_size": 29,
                "vocab_size": 257,
                **case.model,
            },
            "data": {"kind": "text", "path": __file__},
            "train": {
                "steps": STEPS,
                "global_batch_size": 5,
                "micro_batch_size": 1,
                "seq_length": 17,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "weight_decay": 0.1,
                "clip_grad": 0.3,
                "adam_epsilon": 1e-5,
                "dtype": "float64",
                **case.train,
            },
        }
    )


@cache
def reference(cluster: Cluster, model: tuple[tuple[str, Any], ...]) -> Told:
    """The model in one piece; recomputation off."""
    kept = {name: value for name, value in model if name != "recompute_granularity"}
    config = configuration(Case(1, 1, {}, kept))
    told: Told = cluster.run(story_rank, 1, config, story(config, {}), None, (0, 1, STEPS - 1))[0]
    first, last = told.steps[0].loss, told.steps[-1].loss
    assert first - last > 0.05, "nothing is learned: the check would be blind"
    return told


def check_case(cluster: Cluster, case: Case, trap: str | None = None) -> None:
    """Raise Mismatch unless the case is, step by step, the model in one piece."""
    wanted = reference(cluster, tuple(sorted(case.model.items())))
    config = configuration(case)
    absent = {step: tuple(Coordinate(*place) for place in who) for step, who in case.absent.items()}
    chapters = story(config, absent)
    # The first step after the loss, and the last.
    watched = {1: AFTER_FIRST, STEPS - 1: AFTER_LAST}
    size = len(members_of(chapters))
    told: list[Told] = cluster.run(story_rank, size, config, chapters, trap, tuple(watched))
    for done in (done for rank in told for done in rank.steps):
        theirs = wanted.steps[done.step]
        if (done.sample_digest, done.tokens) != (theirs.sample_digest, theirs.tokens):
            raise Mismatch(f"step {done.step} consumed other samples")
        for what in ("loss", "grad_norm"):
            error = abs(getattr(done, what) / getattr(theirs, what) - 1)
            if not error <= (AFTER_FIRST if done.step <= 1 else AFTER_LAST):
                raise Mismatch(f"step {done.step}: {what} is off by {error:.1e}")
    specs = {spec.name: spec for spec in tensor_specs(model_shape(config))}
    for step, tolerance in watched.items():
        chapter = next(chapter for chapter in chapters if step < chapter.until)
        dense = next(snapshot for snapshot in wanted.snapshots if snapshot.step == step)
        shown = [snapshot for rank in told for snapshot in rank.snapshots if snapshot.step == step]
        assert len(shown) == len(chapter.plan.placement)
        _check_tied_copies(shown)
        for what in ("gradients", "parameters"):
            for replica in chapter.plan.layout.replicas:
                for stage in range(chapter.plan.stages):
                    parts = {
                        snapshot.place.slot_ref: getattr(snapshot, what)
                        for snapshot in shown
                        if snapshot.place.replica == replica.replica
                        and snapshot.place.stage == stage
                    }
                    for name in next(iter(parts.values())):
                        got = [whole(specs[name], replica, parts)]
                        if specs[name].axis is None:
                            got = [part[name] for part in parts.values()]
                        target = getattr(dense, what)[name]
                        error = max(relative_difference(each, target) for each in got)
                        if not error <= tolerance:
                            raise Mismatch(
                                f"step {step}: {what} of {name} in replica {replica.replica} "
                                f"are off by {error:.1e}"
                            )


def _check_tied_copies(shown: list[Snapshot]) -> None:
    """A weight that two stages hold is the same bits in both, and so is its gradient."""
    copies: dict[SlotRef, list[Snapshot]] = {}
    for snapshot in shown:
        if EMBEDDING in snapshot.parameters:
            copies.setdefault(snapshot.place.slot_ref, []).append(snapshot)
    for slot, of_slot in copies.items():
        for what in ("gradients", "parameters"):
            held = [{EMBEDDING: getattr(snapshot, what)[EMBEDDING]} for snapshot in of_slot]
            same_bits(f"tied {what} of {slot}", held[0], held[-1])


@pytest.mark.parametrize("name", CASES)
def test_uneven_steps_are_those_of_one_piece(cluster: Cluster, name: str) -> None:
    check_case(cluster, CASES[name])
