"""The forecast: figures by hand, against the plan itself, and against what workers really keep."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scenes import job_shape, node_devices

from elastic.forecast import Forecast, failed_places, forecast, imbalance
from elastic.job_shape import JobShape
from elastic.plan import Action, NoPlan
from elastic.topology import Coordinate, DeviceId
from ntp.atoms import AtomCounts, AtomSizes
from ntp.geometry import SlotRef
from ntp.model_shape import tensor_specs
from trainer.config import model_shape
from trainer.config_file import load
from trainer.job import cluster_devices, element_bytes
from trainer.job import job_shape as shape_of
from trainer.optim import Adam, AdamSettings
from trainer.shard_state import ShardState

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


def ahead(shape: JobShape, *names: str) -> Forecast:
    devices = node_devices(shape)
    found = forecast(shape, devices, failed_places(names, shape, devices))
    assert isinstance(found, Forecast), found
    return found


def four_slots(replicas: int = 2) -> JobShape:
    """Homes: 2 KV groups, 3 columns, 4 rows a slot, which weigh 200 + 30 + 4."""
    return replace(
        job_shape(tensor=4, replicas=replicas),
        counts=AtomCounts(8, 12, 16),
        sizes=(AtomSizes(100, 10, 1, 7),),
        global_batch_size=12,
    )


def test_a_lost_slot_in_figures() -> None:
    found = ahead(four_slots(), "1.2")
    assert found.after.action is Action.REDUCE_TP and found.after.degrees() == ((4,), (3,))
    # Not which step follows: the forecast has none.
    assert found.after.reason == (
        "replica 1 slot 2 is vacant, replica 1 goes to TP3; 5 to 7 samples a replica, by degree"
    )
    assert found.least == found.moved == 234
    assert found.sent() == {SlotRef(0, 2): 234}
    assert sum(found.received().values()) == 234
    assert set(found.received()) == {SlotRef(1, 0), SlotRef(1, 1), SlotRef(1, 3)}
    # Its fullest slot has 3 KV groups, 4 columns and 6 rows, and the replicated tensors.
    fullest = 300 + 40 + 6
    assert (found.memory.before, found.memory.after) == (234 + 7, fullest + 7)
    assert found.memory.switching == 234 + 7 + fullest + 7
    # 7 and 5 samples: 7 x 234 = 1638 and 5 x 346 = 1730, against 6 x 234 at full strength.
    assert found.after.batch_split == (7, 5)
    assert found.throughput.planned == 6 * 234 / (5 * 346)
    assert found.throughput.equal_split == 6 * 234 / (6 * 346)
    assert found.throughput.without_wounded == 0.5


def test_nothing_lost_is_full_strength() -> None:
    found = ahead(four_slots())
    assert (found.moved, found.least, found.transfers) == (0, 0, ())
    assert found.throughput.planned == found.throughput.equal_split == 1.0
    assert [alike.replicas for alike in found.alike] == [(0, 1)]


def test_a_replica_that_is_dropped_moves_nothing_and_shows_as_empty() -> None:
    found = ahead(four_slots(), "0.0", "0.1", "0.2", "0.3")
    assert found.after.action is Action.DROP_REPLICA
    assert (found.moved, found.least) == (0, 0)
    assert [(a.replicas, a.active, a.samples) for a in found.alike] == [
        ((0,), (), ()),
        ((1,), (0, 1, 2, 3), (12,)),
    ]
    assert found.throughput.planned == found.throughput.without_wounded == 0.5


def test_a_job_that_would_halt_says_why() -> None:
    shape = four_slots()
    devices = node_devices(shape)
    found = forecast(shape, devices, failed_places(("0.3", "1.3"), shape, devices))
    assert isinstance(found, NoPlan) and found.reason == (
        "nobody alive holds KV groups 6-7, MLP columns 9-11 and vocabulary rows 12-15, and there "
        "are no checkpoints"
    )
    found = forecast(shape, devices, tuple(Coordinate(r, 0, s) for r in range(2) for s in range(4)))
    assert isinstance(found, NoPlan) and found.reason == "no worker is left"


def test_with_stages_a_device_takes_its_slot_out_of_all_of_them() -> None:
    shape = job_shape(tensor=2, replicas=2, stages=2)
    # One node a replica, stage by stage: node0/3 is stage 1 slot 1 of replica 0.
    by_device, by_slot = ahead(shape, "node0/3"), ahead(shape, "0.1")
    assert [str(place) for place in by_device.failed] == ["replica 0 stage 1 slot 1"]
    assert len(by_slot.failed) == 2
    assert by_device.after.layout == by_slot.after.layout
    assert by_device.moved == by_device.least == 2 * ahead(job_shape(), "0.1").moved


losses = st.sets(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=9)


@given(losses=losses, kv=st.integers(4, 9), rows=st.integers(4, 40), batch=st.integers(4, 40))
def test_figures_agree_with_the_plan(
    losses: set[tuple[int, int]], kv: int, rows: int, batch: int
) -> None:
    shape = replace(four_slots(4), counts=AtomCounts(kv, 12, rows), global_batch_size=batch)
    devices = node_devices(shape)
    names = [f"{replica}.{slot}" for replica, slot in sorted(losses)]
    found = forecast(shape, devices, failed_places(names, shape, devices))
    if isinstance(found, NoPlan):
        return
    ranks = found.after.meeting_ranks(0)
    moves = [m for m in found.after.reshard[0].moves if ranks[m.source] != ranks[m.target]]
    assert found.moved == sum(
        shape.sizes[0].of(m.axis) * (len(m.atoms) if m.atoms else 1) for m in moves
    )
    # Only where replicas trade slots, moves more than must.
    assert found.moved == found.least or found.after.movers
    assert {(t.source, t.target) for t in found.transfers} == {(m.source, m.target) for m in moves}
    assert sum(found.sent().values()) == sum(found.received().values()) == found.moved
    replicas = [replica for alike in found.alike for replica in alike.replicas]
    assert sorted(replicas) == [0, 1, 2, 3]
    assert sum(sum(alike.samples) for alike in found.alike) == batch
    for alike in found.alike:
        for replica in alike.replicas if alike.shards else ():
            assert found.after.layout.replica(replica).shards == alike.shards
    assert found.throughput.equal_split <= found.throughput.planned <= 1.0
    assert found.memory.before <= found.memory.after <= found.memory.switching


def test_imbalance_is_the_largest_load_over_the_mean() -> None:
    assert imbalance([3, 3, 2]) == 9 / 8
    assert imbalance([5, 5]) == 1.0


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1", r"1: write it as REPLICA\.SLOT, such as 1\.2, or as a device, such as node0/3"),
        ("-1.2", "write it as"),
        ("2.0", r"2\.0: there is no such slot; replicas are 0\.\.1, and each has slots 0\.\.1"),
        ("0.2", r"0\.2: there is no such slot"),
        ("node0/2", "node0/2: the device is a spare, which holds no slot"),
        ("node7/0", "node7/0: the device does not exist; those of slots are node0/0 to node1/1"),
    ],
)
def test_a_slot_that_is_not_there_is_refused(name: str, message: str) -> None:
    shape = job_shape()
    devices = (*node_devices(shape), DeviceId(0, 2))
    with pytest.raises(ValueError, match=message):
        failed_places((name,), shape, devices)


def test_a_slot_named_twice_fails_once() -> None:
    shape = job_shape()
    devices = node_devices(shape)
    assert failed_places(("1.1", "node1/1", "1.1"), shape, devices) == (Coordinate(1, 0, 1),)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_an_element_takes_the_bytes_that_a_worker_keeps_of_it(
    dtype: torch.dtype, weight_decay: float
) -> None:
    config = load(
        DEMO,
        (f"train.dtype={str(dtype).removeprefix('torch.')}", f"train.weight_decay={weight_decay}"),
    )
    found = forecast(shape_of(config), cluster_devices(config), ())
    assert isinstance(found, Forecast)
    layout = found.after.layout.replica(0)
    device = torch.device("cpu")
    state = ShardState(tensor_specs(model_shape(config)), layout, 0, dtype, device)
    adam = Adam(state, AdamSettings(0.9, 0.95, 1e-8, weight_decay))
    held = [*vars(state).values(), *vars(adam).values()]
    tensors = [each for each in held if isinstance(each, torch.Tensor)]
    storages = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors}
    kept = sum(storage.nbytes() for storage in storages.values())
    element = element_bytes(config)
    assert kept == found.memory.before * element.resident
    travels = sum(each.untyped_storage().nbytes() for each in state.persistent)
    assert travels == found.memory.before * element.moved
