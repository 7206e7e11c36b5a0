"""The faults file: which device or node is made to fail, when, how, and when it returns.

Theory of operation. A faults file is a YAML list; `load_faults` turns each entry into a frozen
`Fault`, numbered from 1 by its place in the file, so a message about fault 3 is about the third
entry. A fault only describes; the launcher decides who carries it out. Reading makes the checks
that need the file alone; `elastic.fault_checks` makes those that need the run. Both report every
problem at once, each with the entry, the field and what is allowed.

The format names more than this version can inject. Such entries are refused rather than skipped: a
fault that silently does not happen would make a run look more robust than it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, Final, TypeAlias, TypeVar

import yaml

from elastic.config import yaml_problem


class FaultsError(ValueError):
    """A faults file cannot be used; the message has one line per problem."""


class FaultPhase(StrEnum):
    """The part of a step, or of a recovery, in which a fault strikes."""

    FORWARD = "forward"
    BACKWARD = "backward"
    GRAD_SYNC = "grad_sync"
    VOTE = "vote"
    OPTIMIZER = "optimizer"
    CHECKPOINT = "checkpoint"
    REBUILD = "rebuild"
    RESHARD = "reshard"


class FaultInjection(StrEnum):
    """What is done to the target."""

    SIGKILL = "sigkill"
    SIGSTOP = "sigstop"
    EXIT = "exit"
    RAISE = "raise"
    SLOW = "slow"
    NAN_LOSS = "nan_loss"
    SPIKE = "spike"
    BITFLIP = "bitflip"
    XID = "xid"
    PARTITION = "partition"


Choice = TypeVar("Choice", bound=StrEnum)

SUPPORTED_PHASES: Final = (
    FaultPhase.FORWARD,
    FaultPhase.BACKWARD,
    FaultPhase.GRAD_SYNC,
    FaultPhase.VOTE,
    FaultPhase.OPTIMIZER,
    FaultPhase.REBUILD,
    FaultPhase.RESHARD,
)
RECOVERY_PHASES: Final = (FaultPhase.REBUILD, FaultPhase.RESHARD)
"""Phases of a change of generation; some other fault has to cause one."""
SUPPORTED_KINDS: Final = (
    FaultInjection.SIGKILL,
    FaultInjection.SIGSTOP,
    FaultInjection.EXIT,
    FaultInjection.RAISE,
    FaultInjection.SLOW,
    FaultInjection.PARTITION,
)
COMPONENT_KINDS: Final = (FaultInjection.SIGKILL, FaultInjection.SIGSTOP)
ENTRY_FIELDS: Final = (
    "at_step",
    "at_seconds",
    "phase",
    "target",
    "kind",
    "heal_at_step",
    "args",
)


@dataclass(frozen=True, slots=True)
class SlotTarget:
    """The worker in one slot of one replica's stage."""

    replica: int
    slot: int
    stage: int = 0


@dataclass(frozen=True, slots=True)
class NodeTarget:
    """Every worker of one node."""

    node: int


class Component(StrEnum):
    """Processes of the runtime itself; they exist as such in a run with etcd."""

    CONTROLLER = "controller"
    AGENT = "agent"
    STORE = "store"


@dataclass(frozen=True, slots=True)
class ComponentTarget:
    """The leading controller, the agent of `node`, or the store."""

    component: Component
    node: int | None = None

    def __str__(self) -> str:
        return self.component if self.node is None else f"{self.component} of node{self.node}"


Target: TypeAlias = SlotTarget | NodeTarget | ComponentTarget


@dataclass(frozen=True, slots=True)
class Fault:
    """One failure to inject.

    Attributes:
        id: number of the entry in its file, from 1.
        at_step: step in which it strikes, from 0; in a phase of a recovery, the least step
            that the generation may begin with; None when `at_seconds` is given.
        at_seconds: seconds after the launcher started; None when `at_step` is given.
        phase: part of a step or of a recovery in which it strikes; None: any of a step, as early
            as possible.
        target: whom it strikes.
        kind: what is done.
        heal_at_step: step from which the device may be used again; 0: at once, as only its process
            failed; None: never in this run.
        args: arguments of the kind, all of them numbers, sorted by name.
    """

    id: int
    at_step: int | None
    at_seconds: float | None
    phase: FaultPhase | None
    target: Target
    kind: FaultInjection
    heal_at_step: int | None
    args: tuple[tuple[str, int | float], ...] = ()

    def argument(self, name: str) -> int | float | None:
        """The argument of this name; None if the file gives none."""
        return dict(self.args).get(name)


def without_struck(faults: Iterable[Fault], struck: Collection[int]) -> list[Fault]:
    """The faults that may still strike; one of a whole node strikes each of its workers."""
    return [f for f in faults if f.id not in struck or not isinstance(f.target, SlotTarget)]


def load_faults(path: Path) -> tuple[Fault, ...]:
    """Read a faults file; an empty file holds no faults.

    Raises:
        FaultsError: the file or an entry cannot be used; one line per entry with a problem.
    """
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise FaultsError(f"{path} cannot be read: {error}") from None
    except yaml.YAMLError as error:
        raise FaultsError(f"{path} is not YAML: {yaml_problem(error)}") from None
    if entries is None:
        return ()
    if not isinstance(entries, list):
        raise FaultsError(
            f"{path} holds a {type(entries).__name__}; write a list, one '- at_step: ...' a fault"
        )
    faults: list[Fault] = []
    problems: list[str] = []
    for number, entry in enumerate(entries, start=1):
        try:
            faults.append(_fault(number, entry))
        except FaultsError as error:
            problems.append(f"fault {number}: {error}")
    if problems:
        raise FaultsError("\n".join([f"{path} cannot be used:", *problems]))
    return tuple(faults)


def _fault(number: int, entry: object) -> Fault:
    fields = _mapping(entry, "entry", ENTRY_FIELDS)
    at_step = _whole(fields, "at_step")
    at_seconds = _seconds(fields)
    if (at_step is None) == (at_seconds is None):
        given = "neither" if at_step is None else "both"
        raise FaultsError(f"at_step, at_seconds: exactly one must be given, not {given}")
    if fields.get("kind") is None:
        raise FaultsError(f"kind: required; one of {_listed(SUPPORTED_KINDS)}")
    kind = _supported(FaultInjection, SUPPORTED_KINDS, "kind", fields["kind"])
    target = _target(fields.get("target"))
    if isinstance(target, ComponentTarget) and kind not in COMPONENT_KINDS:
        raise FaultsError(
            f"kind: {kind} cannot strike the {target}; allowed: {_listed(COMPONENT_KINDS)}"
        )
    if isinstance(target, ComponentTarget) and fields.get("phase") is not None:
        raise FaultsError(f"phase: the {target} has no part in a step; leave it out")
    phase = (
        _supported(FaultPhase, SUPPORTED_PHASES, "phase", fields["phase"])
        if fields.get("phase") is not None
        else None
    )
    args = _arguments(fields.get("args"), kind, target)
    if kind is FaultInjection.PARTITION:
        _check_partition(target, fields, args)
    return Fault(
        id=number,
        at_step=at_step,
        at_seconds=at_seconds,
        phase=phase,
        target=target,
        kind=kind,
        heal_at_step=_whole(fields, "heal_at_step"),
        args=args,
    )


def _check_partition(
    target: Target, fields: Mapping[str, Any], args: Collection[tuple[str, int | float]]
) -> None:
    if not isinstance(target, NodeTarget):
        raise FaultsError("target: a partition cuts off a node; write {node: 1}")
    if fields.get("phase") is not None:
        raise FaultsError("phase: a node is cut off between steps; leave it out")
    if fields.get("heal_at_step") == 0 or (args and fields.get("heal_at_step") is not None):
        raise FaultsError(
            "heal_at_step: a partition lasts until the others have committed this step, which is "
            "after at_step, or for args.seconds, or without both for the rest of the run"
        )


def _target(value: object) -> Target:
    allowed = "{replica, slot}, {replica, stage, slot}, {node} or {component}"
    if not isinstance(value, dict):
        raise FaultsError(f"target: {value!r} given; write {allowed}")
    if "component" in value:
        return _component(_mapping(value, "target", ("component", "node")))
    if "node" in value:
        fields = _mapping(value, "target", ("node",))
        return NodeTarget(_required(fields, "node"))
    fields = _mapping(value, "target", ("replica", "stage", "slot"))
    return SlotTarget(
        replica=_required(fields, "replica"),
        slot=_required(fields, "slot"),
        stage=_whole(fields, "stage", "target.") or 0,
    )


def _component(fields: Mapping[str, Any]) -> ComponentTarget:
    component = _supported(Component, tuple(Component), "target.component", fields["component"])
    node = _whole(fields, "node", "target.")
    if (component is Component.AGENT) != (node is not None):
        raise FaultsError(
            "target: an agent is named with its node, {component: agent, node: 1}; a controller "
            "and the store without"
        )
    return ComponentTarget(component, node)


def _required(fields: Mapping[str, Any], name: str) -> int:
    value = _whole(fields, name, "target.")
    if value is None:
        raise FaultsError(f"target.{name}: required; a whole number from 0")
    return value


def _whole(fields: Mapping[str, Any], name: str, prefix: str = "") -> int | None:
    value = fields.get(name)
    if value is None:
        return None
    # YAML's true is an int to Python, but not to whoever wrote it.
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise FaultsError(f"{prefix}{name}: {value!r} given; must be a whole number from 0")
    return value


def _seconds(fields: Mapping[str, Any]) -> float | None:
    value = fields.get("at_seconds")
    if value is None:
        return None
    # The comparison also refuses nan.
    if not _is_number(value) or not 0 <= value < float("inf"):
        raise FaultsError(f"at_seconds: {value!r} given; must be a number of seconds from 0")
    return float(value)


def _arguments(
    value: object, kind: FaultInjection, target: Target
) -> tuple[tuple[str, int | float], ...]:
    if value is None:
        return ()
    if not isinstance(value, dict):
        raise FaultsError(f"args: {value!r} given; write name: value pairs")
    allowed = _argument_of(kind, target)
    for name, argument in value.items():
        if name != allowed:
            what = f"{kind} of the {target}" if isinstance(target, ComponentTarget) else kind
            remedy = "leave args out" if allowed is None else f"allowed: {allowed}"
            raise FaultsError(f"args.{name}: {what} has no such argument; {remedy}")
        if name == "seconds" and not (_is_number(argument) and 0 < argument < float("inf")):
            raise FaultsError(f"args.seconds: {argument!r} given; must be a number above 0")
        # Status 0 says that nothing is wrong, and the system keeps a byte.
        if name == "code" and not (_is_number(argument) and argument in range(1, 256)):
            raise FaultsError(f"args.code: {argument!r} given; must be a whole number in 1..255")
    return tuple(sorted(value.items()))


def _argument_of(kind: FaultInjection, target: Target) -> str | None:
    """The name of the one argument that such a fault may have; None: it has none."""
    match kind, target:
        case FaultInjection.SLOW | FaultInjection.PARTITION, _:
            return "seconds"
        case FaultInjection.EXIT, _:
            return "code"
        case FaultInjection.SIGSTOP, ComponentTarget():
            return "seconds"
        case FaultInjection.SIGKILL, ComponentTarget(Component.STORE):
            return "seconds"
        case _:
            return None


def _is_number(value: object) -> bool:
    # YAML's true is an int to Python, but not to whoever wrote it.
    return isinstance(value, int | float) and not isinstance(value, bool)


def _mapping(value: object, where: str, allowed: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise FaultsError(f"{where}: {value!r} given; must have the fields {_listed(allowed)}")
    for name in value:
        if name not in allowed:
            nearest = difflib.get_close_matches(str(name), allowed, n=1, cutoff=0.0)[0]
            raise FaultsError(
                f"{name}: no such field of the {where}; did you mean {nearest}?"
                f" Allowed: {_listed(allowed)}"
            )
    return value


def _supported(
    kind: type[Choice], supported: tuple[Choice, ...], name: str, value: object
) -> Choice:
    choice = next((each for each in kind if each == value), None)
    if choice is None:
        raise FaultsError(f"{name}: {value!r} given; allowed: {_listed(supported)}")
    if choice not in supported:
        raise FaultsError(
            f"{name}: {choice} is not supported in this version; allowed: {_listed(supported)}"
        )
    return choice


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)
