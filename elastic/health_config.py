"""The `health` section of the configuration: how long to wait for what."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from elastic.settings import Settings
from health.policy import LivenessPolicy, QuarantinePolicy


class HealthConfig(Settings):
    """How long the runtime waits before it calls something failed; all times in seconds."""

    spawn_timeout_seconds: float = Field(
        default=120.0,
        gt=0,
        description="Seconds a new worker process may take until it first reports itself ready.",
    )
    heartbeat_seconds: float = Field(
        default=1.0,
        gt=0,
        description="Seconds between two heartbeats of a worker, which take along what it says and "
        "nobody waits for.",
    )
    heartbeat_timeout_seconds: float = Field(
        default=4.0,
        gt=0,
        description="Seconds of silence after which a worker is killed as hung; must be above two "
        "heartbeats, and longer by one than the training thread ever holds Python's lock.",
    )
    stopped_timeout_seconds: float = Field(
        default=0.5,
        gt=0,
        description="Seconds a worker may be stopped (by SIGSTOP or a debugger) before it is "
        "killed as hung.",
    )
    progress_floor_seconds: float = Field(
        default=10.0,
        gt=0,
        description="Seconds an activity of the training thread may always take, waits for other "
        "workers not counted; and that it may always wait for others, before a wait in which all "
        "of the job's workers are is ended.",
    )
    progress_factor: float = Field(
        default=5.0,
        ge=1,
        description="An activity may take this many times the longest of its recent durations, "
        "and a wait in it this many times the longest of its recent waits.",
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
        "generation is rebuilt without a culprit. All nodes must have said for as long that they "
        "wait for others, before that is believed.",
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
