"""Cluster and shape of a job: what the runtime itself reads of a configuration.

Theory of operation. A run is described by one YAML file. The sections that the runtime itself reads
live here, in `elastic.health_config` and in `elastic.store_config`; the model, data and training
sections live in `trainer.config`, which composes them all into one `RunConfig`. Every section is
frozen and refuses unknown keys, so a configuration is a value: it can be compared, sent to another
process as JSON and read back without surprises.

Checks of a single field are made by the field itself. `check_cluster` makes the one check that
spans two sections: a job in one piece needs exactly as many devices as the cluster section names,
because a device that nobody planned for is either a mistake or a spare, and a spare is said so.
"""

from __future__ import annotations

import yaml
from pydantic import Field

from elastic.settings import Settings


class ClusterConfig(Settings):
    """The machines that the job runs on."""

    nodes: int = Field(
        default=1, ge=1, description="Number of nodes (scale-up domains); one agent runs on each."
    )
    devices_per_node: int = Field(
        default=8, ge=1, description="Devices on each node; one worker process runs on each."
    )
    spare_devices: int = Field(
        default=0,
        ge=0,
        description="Devices of the whole cluster that hold no slot: the last ones. Their workers "
        "run idle and take the place of a lost one, preferably on their own node.",
    )
    tensor_across_nodes: bool = Field(
        default=True,
        description="Whether a tensor-parallel group that has members left may be completed by a "
        "device of another node. Turn it off where tensor parallelism needs the links inside a "
        "node; a whole group may always be placed elsewhere.",
    )
    least_gain: float = Field(
        default=0.02,
        ge=0,
        description="Share of a whole replica's throughput that must be gained before an active "
        "slot, with its state, is taken from one replica and given to another.",
    )
    device_memory_bytes: int = Field(
        default=0,
        ge=0,
        description="Bytes of a device's memory that parameters, gradients and optimizer state may "
        "take, in both layouts while one replaces the other; 0: unlimited. Leave room for "
        "activations. A reduced replica that would not fit is left out.",
    )

    @property
    def devices(self) -> int:
        """Number of devices in the cluster, spares included."""
        return self.nodes * self.devices_per_node


class ParallelConfig(Settings):
    """The shape of the job at full strength."""

    tensor: int = Field(
        default=1, ge=1, description="Full tensor-parallel degree (tp_base): slots of a replica."
    )
    pipeline: int = Field(default=1, ge=1, description="Pipeline stages of a replica.")
    virtual_pipeline: int = Field(
        default=1,
        ge=1,
        description="Chunks of layers on each stage; above 1 the interleaved schedule runs them.",
    )
    sequence_parallel: bool = Field(
        default=False,
        description="Cut the sequence over the slots between the linear layers; its length need "
        "not divide by the degree.",
    )
    replicas: int = Field(
        default=1, ge=1, description="Data-parallel replicas: complete copies of the model."
    )

    @property
    def devices(self) -> int:
        """Number of devices that hold a slot at full strength."""
        return self.tensor * self.pipeline * self.replicas


def check_cluster(cluster: ClusterConfig, parallel: ParallelConfig) -> None:
    """Check that the devices of the cluster are exactly those that the job and its spares need.

    Raises:
        ValueError: the numbers do not agree; the message gives every number and the settings that
            would make them agree.
    """
    needed = parallel.devices + cluster.spare_devices
    if cluster.devices == needed:
        return
    raise ValueError(
        f"cluster.nodes ({cluster.nodes}) x cluster.devices_per_node ({cluster.devices_per_node})"
        f" = {cluster.devices} devices, but parallel.tensor ({parallel.tensor}) x"
        f" parallel.pipeline ({parallel.pipeline}) x parallel.replicas ({parallel.replicas}) +"
        f" cluster.spare_devices ({cluster.spare_devices}) = {needed} devices;"
        f" {_remedy(cluster, parallel, needed)}"
    )


def _remedy(cluster: ClusterConfig, parallel: ParallelConfig, needed: int) -> str:
    """Name the single settings that would make the two sides agree, simplest first."""
    choices: list[str] = []
    if needed % cluster.nodes == 0:
        choices.append(f"cluster.devices_per_node to {needed // cluster.nodes}")
    if needed % cluster.devices_per_node == 0:
        choices.append(f"cluster.nodes to {needed // cluster.devices_per_node}")
    if cluster.devices >= parallel.devices:
        choices.append(f"cluster.spare_devices to {cluster.devices - parallel.devices}")
    for_slots = cluster.devices - cluster.spare_devices
    per_replica = parallel.tensor * parallel.pipeline
    if for_slots > 0 and for_slots % per_replica == 0:
        choices.append(f"parallel.replicas to {for_slots // per_replica}")
    if not choices:
        # Reachable with, for example, 2 x 2 devices for 3 slots and 2 spares.
        return f"change these numbers until both sides are equal (for example, 1 x {needed})"
    return "set " + ", or ".join(choices)


def yaml_problem(error: yaml.YAMLError) -> str:
    """Where and why a text is not YAML, on one line; lines and columns are counted from 1."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return str(error)
