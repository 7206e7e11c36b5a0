"""Names of the keys under ``/everstep/<job>/`` and the encoding of what is under them."""

from __future__ import annotations

import msgspec

from elastic.messages import (
    Adopt,
    AgentRecord,
    Failed,
    Fence,
    NodeProgress,
    NodeReport,
    Quiesce,
    Stop,
    StoreMessage,
)


def key_of(job: str, message: StoreMessage) -> str:
    """The key that `message` is written under."""
    return f"/everstep/{job}/{_path(message)}"


def job_prefix(job: str) -> str:
    """Prefix of all keys of a job."""
    return f"/everstep/{job}/"


def encode(message: StoreMessage) -> bytes:
    """The value of a key. Not JSON, which has no number for a loss that is not finite."""
    return msgspec.msgpack.encode(message)


def decode(value: bytes) -> StoreMessage:
    """Inverse of `encode`. Raises msgspec.ValidationError for a foreign value."""
    return msgspec.msgpack.decode(value, type=StoreMessage)  # type: ignore[no-any-return]


def _path(message: StoreMessage) -> str:
    match message:
        case Quiesce():
            return f"commands/quiesce/{message.generation}"
        case Adopt():
            return f"plan/{message.plan.generation}"
        case Fence():
            return f"commands/fence/{message.member}"
        case Stop():
            return "commands/stop"
        case AgentRecord():
            return f"agents/{message.node}"
        case Failed():
            return f"events/{message.failure.id}"
        case NodeReport():
            return f"reports/{message.generation}/{message.node}"
        case NodeProgress():
            return f"progress/{message.node}"
