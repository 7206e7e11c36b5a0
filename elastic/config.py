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

from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

from health.policy import LivenessPolicy, QuarantinePolicy


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
    heartbeat_seconds: float = Field(
        default=0.25, gt=0, description="Seconds between two heartbeats of a worker."
    )
    heartbeat_timeout_seconds: float = Field(
        default=3.0,
        gt=0,
        description="Seconds of silence after which a worker is killed as hung; must be above two "
        "heartbeats, and longer than the training thread ever holds Python's lock.",
    )
    stopped_timeout_seconds: float = Field(
        default=0.5,
        gt=0,
        description="Seconds a worker whose heartbeats are overdue may be stopped (by SIGSTOP or a "
        "debugger) before it is killed as hung.",
    )
    progress_floor_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Seconds an activity of the training thread may always take, waits for other "
        "workers not counted.",
    )
    progress_factor: float = Field(
        default=5.0,
        ge=1,
        description="An activity may take this many times the longest of its recent durations.",
    )
    progress_initial_seconds: float = Field(
        default=120.0,
        gt=0,
        description="Seconds an activity may take while no duration of it is known: in the first "
        "step after each change of generation, and during the change.",
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
        description="Seconds that an agent's record in the store outlives it; then its node counts "
        "as lost. Etcd rounds up to whole seconds, at least two.",
    )
    drain_timeout_seconds: float = Field(
        default=25.0,
        gt=0,
        description="Seconds that an agent which is to leave waits until its node's work is handed "
        "over; then it leaves anyway, and the node is lost. Kubernetes kills after 30 s.",
    )
    report_seconds: float = Field(
        default=2.0,
        gt=0,
        description="Seconds for which an agent collects what its workers say and nobody waits for "
        "(mostly that they committed a step, which two of the job's workers say at once), before "
        "it writes that to the store.",
    )
    leader_lease_seconds: float = Field(
        default=2.0,
        gt=0,
        description="Seconds that the lead of a controller outlives it; then a standby takes over.",
    )
    agent_timeout_seconds: float = Field(
        default=0.5,
        gt=0,
        description="Seconds an agent may take to answer for itself when peers lost connections "
        "and no failure explains it; one that does not is lost with its node.",
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
    flap_window_seconds: float = Field(
        default=600.0,
        gt=0,
        description="A device that fails again this soon after its return, or after its "
        "quarantine, is quarantined; one that stays well for as long is forgiven.",
    )
    quarantine_seconds: float = Field(
        default=60.0,
        gt=0,
        description="Seconds of the first quarantine; each further one is twice as long.",
    )
    quarantine_max_seconds: float = Field(
        default=3600.0, gt=0, description="Seconds that no quarantine exceeds."
    )

    @property
    def liveness(self) -> LivenessPolicy:
        """When a worker process counts as hung."""
        return LivenessPolicy(
            heartbeat_seconds=self.heartbeat_seconds,
            heartbeat_timeout_seconds=self.heartbeat_timeout_seconds,
            stopped_timeout_seconds=self.stopped_timeout_seconds,
            spawn_timeout_seconds=self.spawn_timeout_seconds,
            progress_floor_seconds=self.progress_floor_seconds,
            progress_factor=self.progress_factor,
            progress_initial_seconds=self.progress_initial_seconds,
        )

    @property
    def quarantine(self) -> QuarantinePolicy:
        """How long a device that keeps failing is left out."""
        return QuarantinePolicy(
            flap_window_seconds=self.flap_window_seconds,
            quarantine_seconds=self.quarantine_seconds,
            quarantine_max_seconds=self.quarantine_max_seconds,
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

    @model_validator(mode="after")
    def _policies_are_valid(self) -> Self:
        try:
            _ = self.liveness, self.quarantine
        except ValueError as error:
            raise ValueError(f"health.{error}") from None
        return self


class StoreConfig(Settings):
    """Where the coordination state (plans, leases, reports) is kept."""

    kind: Literal["memory", "etcd"] = Field(
        default="memory",
        description="Store adapter; memory: embedded in the launcher's process (one machine); "
        "etcd: for any number of machines.",
    )
    controllers: int = Field(
        default=2,
        ge=1,
        description="Controllers that everstep run starts with etcd: one leads, the others stand "
        "by. In the memory store there is always one.",
    )
    endpoints: tuple[str, ...] = Field(
        default=(),
        description="host:port of etcd's members: several addresses, or one name that resolves to "
        "all of them. Empty with kind etcd: a private etcd is started for the run, on one machine.",
    )
    prefix: str = Field(
        default="",
        pattern=r"^(/.*[^/])?$",
        description="Goes before every key in etcd, such as /team-a: begins with a slash, does not "
        "end with one. Empty: keys begin with /everstep/.",
    )
    user: str | None = Field(default=None, description="User of etcd, if it wants one.")
    password: SecretStr | None = Field(
        default=None,
        description="The user's password. It is left out of the files that a run writes.",
    )
    password_env: str | None = Field(
        default=None,
        description="Name of the environment variable that holds the password, instead of it.",
    )
    ca: Path | None = Field(
        default=None,
        description="PEM file of the authority that signed etcd's certificates; connections use "
        "TLS if it is given.",
    )
    cert: Path | None = Field(
        default=None, description="PEM file of this client's certificate, if etcd wants one."
    )
    key: Path | None = Field(default=None, description="PEM file of the certificate's key.")
    server_name: str | None = Field(
        default=None,
        description="Name to expect in the members' certificates; needed with TLS and several "
        "endpoints.",
    )

    @field_validator("endpoints")
    @classmethod
    def _endpoints_have_ports(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for endpoint in endpoints:
            host, _, port = endpoint.rpartition(":")
            if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(
                    f"{endpoint!r} is not host:port; write, for example, 10.0.0.1:2379 (TLS is "
                    "asked for by store.ca, not by https://)"
                )
        versions = {_ip_version(endpoint) for endpoint in endpoints}
        if len(endpoints) > 1 and (None in versions or len(versions) > 1):
            raise ValueError(
                f"{len(endpoints)} endpoints must all be IPv4 or all IPv6 addresses; give such, or "
                "one name that resolves to all members"
            )
        return endpoints

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        given = [
            name for name in type(self).model_fields if getattr(self, name) not in (None, "", ())
        ]
        given = [name for name in given if name not in ("kind", "controllers")]
        if given and self.kind != "etcd":
            raise ValueError(f"store.{given[0]} means nothing to the memory store; set kind: etcd")
        if given and not self.endpoints:
            raise ValueError(
                f"store.{given[0]} means nothing to a private etcd; set store.endpoints to reach "
                "another one"
            )
        if self.password is not None and self.password_env is not None:
            raise ValueError("store.password and store.password_env exclude each other; keep one")
        if (self.user is None) != (self.password is None and self.password_env is None):
            raise ValueError(
                "store.user needs a password and a password a user; set store.user and "
                "store.password_env, or neither"
            )
        if (self.cert is None) != (self.key is None) or (self.cert is not None and self.ca is None):
            raise ValueError(
                "a client's certificate needs its key and the servers' authority; set store.ca, "
                "store.cert and store.key"
            )
        if self.server_name is not None and self.ca is None:
            raise ValueError("store.server_name means nothing without TLS; set store.ca")
        if self.ca is not None and self.server_name is None and len(self.endpoints) > 1:
            raise ValueError(
                f"TLS with {len(self.endpoints)} endpoints needs a name that all their "
                "certificates hold; set store.server_name"
            )
        return self


def _ip_version(endpoint: str) -> int | None:
    """4 or 6; None for a name."""
    try:
        return ip_address(endpoint.rpartition(":")[0].strip("[]")).version
    except ValueError:
        return None


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
