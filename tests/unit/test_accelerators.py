"""Which accelerator a worker takes, on one host or on several."""

import pytest

from elastic.config import ClusterConfig
from elastic.topology import DeviceId
from trainer.accelerators import accelerator_of

CLUSTER = ClusterConfig(nodes=2, devices_per_node=4)
DEVICES = [DeviceId(node, index) for node in range(2) for index in range(4)]


@pytest.mark.parametrize("present", [8, 16])
def test_a_host_with_enough_for_all_runs_all_nodes(present: int) -> None:
    assert [accelerator_of(device, CLUSTER, present) for device in DEVICES] == list(range(8))


@pytest.mark.parametrize("present", [4, 7])
def test_a_host_with_enough_for_one_node_is_one(present: int) -> None:
    taken = [accelerator_of(device, CLUSTER, present) for device in DEVICES]
    assert taken == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_host_without_any_computes_on_cpus() -> None:
    assert accelerator_of(DeviceId(1, 3), CLUSTER, 0) is None


def test_too_few_are_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ValueError, match=r"has 3 accelerators.*devices_per_node is 4; lower it"):
        accelerator_of(DeviceId(0, 0), CLUSTER, 3)
