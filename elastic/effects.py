"""What goes into the controller and what comes out of it, as values.

Events are messages from the store, the passing of time, and a person's wish. Effects are what the
driver must do: write to the store, write to the journal, end the job.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from elastic.messages import (
    Adopt,
    AgentRecord,
    ComponentFault,
    Failed,
    Fence,
    Leave,
    NodeAlive,
    NodeProgress,
    NodeReport,
    PlanChange,
    Quiesce,
    Stop,
    WholePlan,
)
from health.policy import QuarantinePolicy


class Phase(StrEnum):
    """Phases of the controller's machine; `elastic.controller` describes them."""

    QUIESCING = "quiescing"
    REBUILDING = "rebuilding"
    RESHARDING = "resharding"
    RESUMING = "resuming"
    RUNNING = "running"
    COMPLETED = "completed"
    HALTED = "halted"


@dataclass(frozen=True, slots=True)
class Tick:
    """Time passed."""


@dataclass(frozen=True, slots=True)
class StopRequested:
    """A person wants the job to end, or something failed without which it cannot go on."""

    reason: str
    outcome: str = "interrupted"


@dataclass(frozen=True, slots=True)
class NodeLost:
    """A node's agent is gone: its lease ended. `evidence` is what a person would want to read."""

    node: int
    evidence: str


@dataclass(frozen=True, slots=True)
class AgentGone:
    """Nobody listens any more where the agent of `node` did in its life number `life`."""

    node: int
    life: int


@dataclass(frozen=True, slots=True)
class Outage:
    """The store did not answer for so many seconds, and now does."""

    seconds: float


Event = (
    AgentRecord
    | Failed
    | ComponentFault
    | NodeAlive
    | NodeReport
    | NodeProgress
    | NodeLost
    | AgentGone
    | Outage
    | Tick
    | StopRequested
)


@dataclass(frozen=True, slots=True)
class Note:
    """Effect: an entry of the journal."""

    event: str
    fields: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Send:
    """Effect: write a message to the store under the key that belongs to it."""

    message: Quiesce | Adopt | PlanChange | WholePlan | Fence | Leave | Stop


@dataclass(frozen=True, slots=True)
class ForgetNode:
    """Effect: delete the record of a node that was found lost before its lease ended."""

    node: int


@dataclass(frozen=True, slots=True)
class ForgetPlan:
    """Effect: delete a plan that nobody can need any more."""

    generation: int


@dataclass(frozen=True, slots=True)
class Finish:
    """Effect: the job is over."""

    outcome: str
    reason: str


Effect = Note | Send | ForgetNode | ForgetPlan | Finish


@dataclass(frozen=True, slots=True)
class Limits:
    """Deadlines in seconds, and after how many generations the job gives up.

    `pause_timeout_seconds` bounds a quiesce that waits for the step in flight;
    `max_fruitless_recoveries` counts generations in a row that committed nothing; `quarantine` says
    how long a device is kept out that keeps failing.
    """

    spawn_timeout_seconds: float
    quiesce_timeout_seconds: float
    pause_timeout_seconds: float
    corroboration_seconds: float
    agent_timeout_seconds: float
    max_recoveries: int
    max_fruitless_recoveries: int
    quarantine: QuarantinePolicy
