"""Names of the keys under ``/everstep/<job>/`` and the encoding of what is under them."""

from __future__ import annotations

import zlib

import msgspec

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
    StopWish,
    StoreMessage,
    Struck,
    WholePlan,
)

AGENTS = "agents/"
_MESSAGES = frozenset(
    {"commands", "plan", "whole", "agents", "events", "alive", "reports", "progress", "wishes"}
)
_DECODER: msgspec.msgpack.Decoder[StoreMessage] = msgspec.msgpack.Decoder(StoreMessage)
_COMPRESSED = b"\x78"
"""How zlib's data begins, and no message, which is a map or an array."""
COMPRESS_BYTES = 16_384
"""Longer values are compressed: etcd takes 1.5 MB, and a whole plan of 80,000 workers has 4 MB."""


def key_of(job: str, message: StoreMessage) -> str:
    """The key that `message` is written under."""
    return f"{job_prefix(job)}{_path(message)}"


def job_prefix(job: str) -> str:
    """Prefix of all keys of a job."""
    return f"/everstep/{job}/"


def leader_key(job: str) -> str:
    """Whoever created this one leads the job; see `elastic.leadership`."""
    return f"{job_prefix(job)}leader"


def position_key(job: str) -> str:
    """Up to which revision the run's files are written."""
    return f"{job_prefix(job)}written"


def settings_key(job: str) -> str:
    """What all processes of the job must have been started with."""
    return f"{job_prefix(job)}settings"


def plan_key(job: str, generation: int) -> str:
    """Where the plan of a generation is published."""
    return f"{job_prefix(job)}plan/{generation}"


def whole_plan_key(job: str) -> str:
    """The plan that the published changes begin with, once old ones were deleted."""
    return f"{job_prefix(job)}whole"


def life_key(job: str, node: int) -> str:
    """How many agents a node has had."""
    return f"{job_prefix(job)}lives/{node}"


def agent_key(job: str, node: int) -> str:
    """The record of a node's agent."""
    return f"{job_prefix(job)}{AGENTS}{node}"


def node_of_agent(job: str, key: str) -> int | None:
    """The node whose agent's record `key` is; None if it is another key."""
    path = key.removeprefix(job_prefix(job))
    return int(path.removeprefix(AGENTS)) if path.startswith(AGENTS) else None


def encode(message: StoreMessage) -> bytes:
    """The value of a key. Not JSON, which has no number for a loss that is not finite."""
    value = msgspec.msgpack.encode(message)
    return zlib.compress(value, level=1) if len(value) > COMPRESS_BYTES else value


def decode(job: str, key: str, value: bytes) -> StoreMessage | None:
    """Inverse of `encode`; None where `key` holds no message.

    Raises msgspec.ValidationError or zlib.error for a foreign value.
    """
    kind = key.removeprefix(job_prefix(job)).partition("/")[0]
    if kind not in _MESSAGES:
        return None
    if value[:1] == _COMPRESSED:
        value = zlib.decompress(value)
    return _DECODER.decode(value)


def _path(message: StoreMessage) -> str:
    match message:
        case Quiesce():
            return "commands/quiesce"
        case Adopt():
            return f"plan/{message.plan.generation}"
        case PlanChange():
            return f"plan/{message.generation}"
        case WholePlan():
            return "whole"
        case Fence():
            return f"commands/fence/{message.member.device}"
        case Leave():
            return f"commands/leave/{message.node}"
        case Stop():
            return "commands/stop"
        case StopWish():
            return "wishes/stop"
        case Struck():
            return f"commands/struck/{message.fault}"
        case AgentRecord():
            return f"{AGENTS}{message.node}"
        case Failed():
            return f"events/{message.failure.id}"
        case ComponentFault():
            return f"events/fault{message.fault}"
        case NodeAlive():
            return f"alive/{message.node}"
        case NodeReport():
            return f"reports/{message.node}"
        case NodeProgress():
            return f"progress/{message.node}"
