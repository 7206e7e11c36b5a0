"""Reshard plans run over real groups: every slot must end with the bits it is to hold.

A run is a list of stages. A slot that is missing in a stage, or named `fresh` in it, has lost all
its state; who comes back starts from nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from dense import SHAPE, cut, fill, layout_of, named, normal, same_bits
from harness import Cluster, Mismatch, Rank
from planted import plant
from torch import Tensor

from ntp.atoms import atom_elements_by_axis
from ntp.geometry import ParallelLayout, SlotRef, full_layout, heal, vacate
from ntp.model_shape import atom_counts, tensor_specs
from ntp.reshard import DEFAULT_LIMITS, ranges_kept, reshard
from ntp.reshard_plan import ReshardPlan, plan_reshard
from ntp.state_chunks import Limits
from trainer.shard_state import ShardState
from trainer.weights_digest import WeightsDigest

SPECS = tensor_specs(SHAPE)
SIZES = atom_elements_by_axis(SPECS)
FULL = full_layout(atom_counts(SHAPE), 4, 2)
BUFFERS = 3
TINY = Limits(chunk_bytes=1000, in_flight=3, direct_bytes=200)


@dataclass(frozen=True, slots=True)
class Stage:
    """A layout, and the slots in it whose process is new."""

    layout: ParallelLayout
    fresh: tuple[SlotRef, ...] = ()

    def plan_from(self, before: Stage) -> ReshardPlan:
        """The moves that lead here."""
        alive = set(before.layout.slots()) & set(self.layout.slots()) - set(self.fresh)
        return plan_reshard(before.layout, self.layout, frozenset(alive), SIZES)


@dataclass(frozen=True, slots=True)
class Held:
    """What a slot holds after a stage, and the bytes it received in it."""

    buffers: list[dict[str, Tensor]]
    sharded_digest: int
    replicated_digest: int
    received: int


def stages_of(*events: SlotRef) -> list[Stage]:
    """Full strength, then one stage per event: the slot fails if it is active, else it heals."""
    layouts = [FULL]
    for slot in events:
        change = vacate if slot in layouts[-1].slots() else heal
        layouts.append(change(layouts[-1], slot))
    return [Stage(layout) for layout in layouts]


def reshard_rank(
    rank: Rank, stages: list[Stage], trap: str | None, limits: Limits
) -> list[Held | None]:
    plant(trap)
    slot = stages[0].layout.slots()[rank.rank]
    groups = rank.groups()
    store = rank.store()
    state: ShardState | None = None
    results: list[Held | None] = []
    for number, stage in enumerate(stages):
        if slot not in stage.layout.slots():
            groups.close()
            state = None
            results.append(None)
            continue
        if slot in stage.fresh:
            state = None
        ranks = rank.adopt(groups, stage.layout, slot, number + 1, store)
        layout = stage.layout.replica(slot.replica)
        received = 0
        if number == 0:
            state = ShardState(SPECS, layout, slot.slot, torch.float32, torch.device("cpu"))
            for seed, buffer in enumerate(state.persistent):
                fill(state.shards, layout, buffer, lambda spec, seed=seed: normal(spec, seed))
        else:
            before = stages[number - 1]
            held = (state.shards, state.persistent) if state else None
            kept = ranges_kept(before.layout, stage.layout, slot) if state else ()
            if state is None or state.layout != layout:
                state = ShardState(SPECS, layout, slot.slot, torch.float32, torch.device("cpu"))
            else:
                kept = ()
            received = reshard(
                stage.plan_from(before),
                slot,
                ranks,
                groups.world,
                held,
                (state.shards, state.persistent),
                kept,
                limits,
            )
        assert state is not None
        buffers = [named(state.shards, buffer) for buffer in state.persistent]
        results.append(Held(buffers, *WeightsDigest(state, SHAPE).parts(), received))
    return results


def check_stages(
    cluster: Cluster,
    stages: list[Stage],
    trap: str | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> None:
    """Raise Mismatch unless each stage leaves each slot the bits of the dense tensors."""
    slots = stages[0].layout.slots()
    ran = cluster.run(reshard_rank, len(slots), stages, trap, limits)
    results = dict(zip(slots, ran, strict=True))
    digests = set()
    for number, stage in enumerate(stages):
        held = {slot: results[slot][number] for slot in stage.layout.slots()}
        for slot, state in held.items():
            layout = stage.layout.replica(slot.replica)
            for seed, buffer in enumerate(state.buffers):
                wanted = {
                    spec.name: cut(spec, layout, slot.slot, normal(spec, seed).float())
                    for spec in SPECS
                }
                same_bits(f"stage {number}, {slot}, buffer {seed}", buffer, wanted)
        for replica in stage.layout.replicas:
            mine = [state for slot, state in held.items() if slot.replica == replica.replica]
            digests.add(
                (
                    sum(state.sharded_digest for state in mine) % 2**64,
                    *{state.replicated_digest for state in mine},
                )
            )
        received = sum(state.received for state in held.values())
        planned = stage.plan_from(stages[number - 1]).elements(SIZES) if number else 0
        if received != planned * BUFFERS * 4:
            raise Mismatch(f"stage {number} received {received} bytes for {planned} elements")
    if len(digests) != 1:
        raise Mismatch(f"replicas had the digests {digests}")


LOST, OTHER = SlotRef(1, 2), SlotRef(1, 0)
HEALTHY = SlotRef(0, 2)


def test_vacate_and_heal(cluster: Cluster) -> None:
    check_stages(cluster, stages_of(LOST, LOST))


@pytest.mark.parametrize("limits", [DEFAULT_LIMITS, TINY], ids=["one message", "many messages"])
def test_fail_heal_fail_heal_without_a_step(cluster: Cluster, limits: Limits) -> None:
    stages = stages_of(LOST, LOST, LOST, LOST)
    assert stages[0].layout == stages[2].layout == stages[4].layout
    check_stages(cluster, stages, limits=limits)


def test_the_same_slot_fails_in_both_replicas(cluster: Cluster) -> None:
    # Nobody is at home for slot 2 in the middle, yet each adopted piece has a holder.
    check_stages(cluster, stages_of(LOST, HEALTHY, LOST, HEALTHY))


def test_down_to_degree_1_and_back(cluster: Cluster) -> None:
    downward = (LOST, OTHER, SlotRef(1, 3))
    check_stages(cluster, stages_of(*downward, *reversed(downward)))


def test_a_replaced_process_gets_everything(cluster: Cluster) -> None:
    reduced = stages_of(LOST)[1]
    stages = [Stage(FULL), Stage(FULL, (OTHER,)), reduced, Stage(reduced.layout, (OTHER,))]
    check_stages(cluster, stages, limits=TINY)


def test_a_whole_replica_returns(cluster: Cluster) -> None:
    alone = Stage(ParallelLayout(4, FULL.replicas[:1]))
    check_stages(cluster, [Stage(FULL), alone, Stage(FULL), stages_of(LOST)[1]])


@pytest.mark.parametrize("active", [(0, 1), (3,)])
def test_several_slots_at_once(cluster: Cluster, active: tuple[int, ...]) -> None:
    changed = layout_of(SHAPE, 4, (0, 1, 2, 3), active)
    check_stages(cluster, [Stage(FULL), Stage(changed), Stage(FULL)])
