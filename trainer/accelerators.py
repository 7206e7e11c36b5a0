"""Which accelerator of its host a worker takes.

Pure. A host that has one for each device of the cluster runs all nodes, as `everstep run` does on
one machine; otherwise it is one node of the cluster. A host without any runs its workers on CPUs.
"""

from __future__ import annotations

from elastic.config import ClusterConfig
from elastic.topology import DeviceId


def accelerator_of(device: DeviceId, cluster: ClusterConfig, present: int) -> int | None:
    """The index among the host's `present` accelerators; None: the CPU.

    Raises ValueError where there are some, but too few for one node.
    """
    if present == 0:
        return None
    if present >= cluster.devices:
        return device.node * cluster.devices_per_node + device.index
    if present >= cluster.devices_per_node:
        return device.index
    raise ValueError(
        f"this host has {present} accelerators, but cluster.devices_per_node is "
        f"{cluster.devices_per_node}; lower it, or hide them all to run on CPUs "
        "(CUDA_VISIBLE_DEVICES=)"
    )
