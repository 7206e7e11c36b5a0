"""What a plan needs to know of the job and of its cluster, whatever happens to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from elastic.topology import Coordinate, DeviceId
from elastic.workload import SplitBatchBy
from ntp.atoms import AtomCounts, AtomSizes


@dataclass(frozen=True, slots=True)
class PlacementRules:
    """What the planner may do with devices.

    `tensor_across_nodes`: a tensor-parallel group that has members may be completed by a worker of
    another node. `least_gain`: share of a whole replica's throughput that a plan must gain before
    it takes an active slot from a replica. `device_memory_bytes`: what the model's state may take
    of each device (0: unlimited); an element takes `element_bytes` of that.
    """

    tensor_across_nodes: bool = True
    least_gain: float = 0.02
    device_memory_bytes: int = 0
    element_bytes: int = 1


@dataclass(frozen=True, slots=True)
class JobShape:
    """The model in atoms, the grid, the batch, the job's length, and the rules of placement.

    `sizes` are those of each pipeline stage, whose number is `stages`. `least_share`: samples that
    each replica must take.
    """

    counts: AtomCounts
    sizes: tuple[AtomSizes, ...]
    tensor: int
    stages: int
    replicas: int
    global_batch_size: int
    micro_batch_size: int
    steps: int
    split_batch_by: SplitBatchBy = SplitBatchBy.DEGREE
    least_share: int = 1
    rules: PlacementRules = field(default_factory=PlacementRules)

    @property
    def workers(self) -> int:
        """Workers at full strength."""
        return self.tensor * self.stages * self.replicas


def cluster_devices(nodes: int, devices_per_node: int) -> tuple[DeviceId, ...]:
    """The devices of a cluster, in order; those beyond the grid are spares."""
    return tuple(
        DeviceId(node, index) for node in range(nodes) for index in range(devices_per_node)
    )


def home_devices(shape: JobShape, devices: Sequence[DeviceId]) -> dict[Coordinate, DeviceId]:
    """The device that each place prefers, over `devices` in order: replica by replica, stage by
    stage, so that the slots of a stage, and a replica's stages, lie next to each other.

    Devices beyond the grid are spares.
    """
    grid = [
        Coordinate(replica, stage, slot)
        for replica in range(shape.replicas)
        for stage in range(shape.stages)
        for slot in range(shape.tensor)
    ]
    return dict(zip(grid, devices, strict=False))
