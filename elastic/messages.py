"""What controller, agents and workers say to each other, as frozen msgspec structs.

Three conversations. Workers and their agent talk over a socket of the node, where a worker's words
go in lists (`elastic.agent_link`). Agents and controller talk through the store: each struct says
under which key it is written. The step and phase reports that only the journal needs travel the
same way as all others; nobody waits for them.

A key is mostly its author's or its subject's, and the next message of the kind replaces the last,
so that a long job leaves no more keys than a short one. Plans are deleted when nobody can need them
any more (`elastic.plan_chain`); failures and lives of agents, which are few, stay.

Every message that could be late carries the generation it belongs to.

They are encoded as arrays, as the names of their fields would be most of their bytes.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from elastic.plan import Plan
from elastic.plan_change import PlanChange as PlanChange
from elastic.session import Standing
from elastic.topology import DeviceId, Member
from health.events import FailureEvent
from health.heartbeat import Heartbeat
from health.liveness import Stalled


class RecoveryPhase(StrEnum):
    """The parts of a recovery that workers time; the controller times what comes before them."""

    REBUILD = "rebuild"
    RESHARD = "reshard"
    RESUME = "resume"


class Quiesce(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Controller: stop, generation `generation` is coming. Key ``commands/quiesce``.

    `urgent`: somebody is lost, abort the step in flight; otherwise finish it first. `lost` are the
    members that are gone, so that a survivor knows which of its groups cannot complete.
    `ask_agents`: each agent is to answer at once with NodeAlive. `sever_all`: keep no group, as
    each may be the one in which everybody waits.
    """

    generation: int
    urgent: bool
    lost: tuple[Member, ...]
    reason: str
    ask_agents: bool = False
    sever_all: bool = False


class Adopt(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Controller: become this generation. Key ``plan/<generation>``, created once.

    Mostly a PlanChange says so instead.
    """

    plan: Plan


class WholePlan(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Controller: the plan that the changes after it begin with. Key ``whole``."""

    plan: Plan


class Fence(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Controller: kill this process. Key ``commands/fence/<device>``."""

    member: Member
    asked_to: str
    waited_seconds: float


class Leave(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Controller: nothing of this node is in use any more, so its agent, which drains, may end.

    Meant for the agent of that `life` alone. Key ``commands/leave/<node>``.
    """

    node: int
    life: int


class Stop(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Controller: the job is over. Key ``commands/stop``. `outcome` as in summary.json."""

    reason: str
    outcome: str


class StopWish(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Anybody: the controller is to end the job, as `outcome`. Key ``wishes/stop``."""

    reason: str
    outcome: str


class Ready(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker: imports are done, a plan is awaited."""

    member: Member


class Quiesced(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker: stopped for `generation`; `standing` is None where it holds no state.

    `replica_groups_intact`: it severed none of the groups inside its replica; `unbroken`: none at
    all, of those that it had.
    """

    generation: int
    member: Member
    standing: Standing | None
    replica_groups_intact: bool
    at: float
    unbroken: bool = False


class PhaseDone(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker: finished one part of the recovery into `generation`."""

    generation: int
    member: Member
    phase: RecoveryPhase
    at: float


class ConnectionLost(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker: a peer's connection broke, or a rebuild failed, in `generation`."""

    generation: int
    member: Member
    detail: str


class FaultFired(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker: an injected fault strikes now. Sent by the process that is about to fail."""

    fault: int
    member: Member
    step: int
    phase: str
    at: float


class StepDone(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker: committed `step`. The figures are the vote's, equal on all ranks.

    `sharded_digest` and `replicated_digest` are this rank's parts of its replica's weights digest,
    modulo 2**64; None where none is computed in this step. `started_at` is when this attempt began,
    and `compute_seconds` how long it then took to the boundary before gradient sync. `awaited`:
    somebody waits for this report; all others may come later (`elastic.worker_status`).
    """

    generation: int
    member: Member
    replica: int
    step: int
    loss: float
    grad_norm: float
    tokens: int
    sample_digest: str
    sharded_digest: int | None
    replicated_digest: int | None
    started_at: float
    compute_seconds: float
    at: float
    awaited: bool = False


class Struck(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Agent, to all others and their workers: an injected fault struck. Key ``commands/struck/..``.

    It is said before the failure that it causes, so everybody knows before the next plan comes.
    """

    fault: int


class AgentRecord(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Agent: it is alive, and these workers are ready. Key ``agents/<node>``, under its lease.

    `life` counts the agents that the node has had: who returns after its record was gone begins a
    new one, with new workers. `draining`: the node is to be empty soon; place nothing on it. It
    stays so for the rest of the life.
    """

    node: int
    life: int
    devices: tuple[DeviceId, ...]
    ready: tuple[Member, ...]
    rendezvous: str
    draining: bool = False


class Failed(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Agent: a worker failed and is fenced (its process group is dead). Key ``events/<id>``.

    The other fields tell of the injected fault that caused it, where one did.
    """

    failure: FailureEvent
    fault: int | None
    fault_at: float | None
    fault_phase: str | None
    fault_step: int | None = None

    @property
    def member(self) -> Member:
        """The worker that failed."""
        return Member(self.failure.device, self.failure.incarnation)


class ComponentFault(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Launcher: an injected fault strikes a part of the runtime. Key ``events/fault<number>``.

    `node` is that of an agent, and `life` the number of the agent that it has then; None for a
    controller and the store. A later life of the node has nothing to do with the fault.
    """

    fault: int
    component: str
    node: int | None
    step: int
    at: float
    life: int | None = None


class NodeAlive(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Agent: it heard the announcement of `generation`. Key ``alive/<node>``."""

    generation: int
    node: int


class NodeReport(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Agent: its workers' answers to a quiesce. Key ``reports/<node>``."""

    generation: int
    node: int
    workers: tuple[Quiesced, ...]


class WorkerStatus(msgspec.Struct, frozen=True, array_like=True):
    """How far a worker came in the generation it adopts or runs.

    `phases` are the parts of the recovery into `generation` that it finished, `broken` whether it
    lost a connection since; `committed` is the last step that it reported (-1: none).
    """

    member: Member
    generation: int
    phases: tuple[RecoveryPhase, ...]
    broken: bool
    committed: int


class NodeProgress(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Agent: what its workers said since its last one. Key ``progress/<node>``.

    `statuses` sum up what was said before, for a controller that did not hear it. `stall`: none of
    them can go on; None: somebody can.
    """

    node: int
    notes: tuple[PhaseDone | ConnectionLost | StepDone | FaultFired, ...]
    statuses: tuple[WorkerStatus, ...] = ()
    stall: Stalled | None = None


class Beat(msgspec.Struct, frozen=True, tag=True, array_like=True):
    """Worker: it lives, and this is what it does."""

    heartbeat: Heartbeat


WorkerMessage = Ready | Beat | Quiesced | PhaseDone | ConnectionLost | FaultFired | StepDone
AgentMessage = Quiesce | Adopt | PlanChange | Stop | Struck
StoreMessage = (
    Quiesce
    | Adopt
    | PlanChange
    | WholePlan
    | Fence
    | Leave
    | Stop
    | StopWish
    | Struck
    | AgentRecord
    | Failed
    | ComponentFault
    | NodeAlive
    | NodeReport
    | NodeProgress
)
