"""Cluster, shape, health and store settings: what the runtime needs to know about a job.

Theory of operation. A run is described by one YAML file. The parts that the runtime itself reads
live here; the model, data and training parts live in `trainer.config`, which composes the two into
one `RunConfig`. Every model is frozen and refuses unknown keys, so a configuration is a value: it
can be compared, sent to another process as JSON and read back without surprises.

Checks of a single field are made by the field itself. `check_cluster` makes the one check that
spans two sections: a job in one piece needs exactly as many devices as the cluster section names,
because a device that nobody planned for is either a mistake or a spare, and a spare is said so.
"""

from __future__ import annotations

from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator


class Settings(BaseModel):
    """Base of every configuration section: frozen, without unknown keys, without inf or nan."""

    # validate_default: the defaults are held to the same bounds as what a user writes.
    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, validate_default=True
    )


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


class HealthConfig(Settings):
    """How long the runtime waits before it calls something failed; all times in seconds."""

    spawn_timeout_seconds: float = Field(
        default=120.0,
        gt=0,
        description="Seconds a new worker process may take until it first reports itself ready.",
    )
    spawn_attempts: int = Field(
        default=3,
        gt=0,
        description="Processes in a row that may fail on a device before they are ready; then the "
        "device is given up for the run.",
    )
    lease_seconds: float = Field(
        default=5.0,
        gt=0,
        description="Seconds that an agent's record in the store outlives it. Nothing reacts to "
        "its end yet: in a one-machine run agents live and die with the launcher.",
    )
    corroboration_seconds: float = Field(
        default=1.0,
        gt=0,
        description="Seconds to wait for the failure behind a broken connection before the "
        "generation is rebuilt without a culprit.",
    )
    quiesce_timeout_seconds: float = Field(
        default=45.0,
        gt=0,
        description="Seconds the survivors of a failure may take to stop at a step boundary; must "
        "be longer than a step. Whoever takes longer is killed; keep it above "
        "collective_timeout_seconds, as gloo may not notice sooner that a message stopped midway.",
    )
    rebuild_timeout_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Seconds the members may take to build the communicators of a generation.",
    )
    collective_timeout_seconds: float = Field(
        default=30.0,
        gt=0,
        description="Seconds one collective of a training step may take before it counts as hung.",
    )
    max_recoveries: int = Field(
        default=1000,
        ge=0,
        description="Generations after the first that one run may need; one more halts the job.",
    )
    max_fruitless_recoveries: int = Field(
        default=20,
        gt=0,
        description="Generations in a row that may pass without a committed step; one more halts "
        "the job, as whatever fails would fail again.",
    )

    @model_validator(mode="after")
    def _deadlines_are_nested(self) -> Self:
        if self.quiesce_timeout_seconds <= self.rebuild_timeout_seconds:
            raise ValueError(
                f"health.quiesce_timeout_seconds: {self.quiesce_timeout_seconds:g} must be above "
                f"health.rebuild_timeout_seconds ({self.rebuild_timeout_seconds:g}), or a survivor "
                "that waits for a dead peer in a rebuild is killed as silent"
            )
        return self


class StoreConfig(Settings):
    """Where the coordination state (plans, leases, reports) is kept."""

    kind: Literal["memory"] = Field(
        default="memory",
        description="Store adapter; memory: embedded in the launcher's process (one machine).",
    )


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
