"""A faults file is read as written, and whatever would silently not happen is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from elastic.config import ClusterConfig, ParallelConfig
from elastic.fault_checks import check_faults, check_launcher
from elastic.faults import (
    SUPPORTED_KINDS,
    SUPPORTED_PHASES,
    Component,
    ComponentTarget,
    Fault,
    FaultInjection,
    FaultPhase,
    FaultsError,
    NodeTarget,
    SlotTarget,
    load_faults,
)
from elastic.network import NetworkRefused
from elastic.store_config import StoreConfig

CONFIGS = Path(__file__).parents[2] / "configs"
GOOD = {"at_step": 3, "kind": "sigkill", "target": {"replica": 1, "slot": 2}}
SLOW, EXIT = GOOD | {"kind": "slow"}, GOOD | {"kind": "exit"}
CUT = {"at_step": 3, "kind": "partition", "target": {"node": 1}}
Reader = Callable[[object], tuple[Fault, ...]]


@pytest.fixture
def read(tmp_path: Path) -> Reader:
    def write_and_read(entries: object) -> tuple[Fault, ...]:
        path = tmp_path / "faults.yaml"
        path.write_text(entries if isinstance(entries, str) else yaml.safe_dump(entries))
        return load_faults(path)

    return write_and_read


def fault(**changes: Any) -> Fault:
    fields: dict[str, Any] = {
        "id": 1,
        "at_step": 3,
        "at_seconds": None,
        "phase": None,
        "target": SlotTarget(replica=1, slot=2),
        "kind": FaultInjection.SIGKILL,
        "heal_at_step": None,
    }
    return Fault(**(fields | changes))


def test_the_demo_file_reads_and_fits_its_configuration() -> None:
    faults = load_faults(CONFIGS / "demo-faults.yaml")
    assert faults == (fault(at_step=20, phase=FaultPhase.BACKWARD, heal_at_step=40),)
    parallel, cluster = (
        ParallelConfig(tensor=4, replicas=2),
        ClusterConfig(nodes=2, devices_per_node=4),
    )
    check_faults(faults, parallel, cluster, 60, StoreConfig())


def test_every_field_is_read(read: Reader) -> None:
    entries = [
        GOOD | {"phase": "vote", "heal_at_step": 0, "kind": "slow", "args": {"seconds": 1.5}},
        {"at_seconds": 2, "kind": "exit", "target": {"node": 1}},
    ]
    first, second = read(entries)
    assert first == fault(
        phase=FaultPhase.VOTE, heal_at_step=0, kind=FaultInjection.SLOW, args=(("seconds", 1.5),)
    )
    assert second == fault(
        id=2,
        at_step=None,
        at_seconds=2.0,
        target=NodeTarget(1),
        kind=FaultInjection.EXIT,
    )


def test_an_empty_file_holds_no_faults(read: Reader) -> None:
    assert read("# none yet\n") == ()


@given(
    step=st.integers(0, 10**6),
    phase=st.none() | st.sampled_from(SUPPORTED_PHASES),
    kind=st.sampled_from(SUPPORTED_KINDS),
    args=st.dictionaries(st.text(max_size=5), st.integers(), max_size=3),
)
def test_faults_encode_as_json(
    step: int, phase: FaultPhase | None, kind: FaultInjection, args: dict[str, int]
) -> None:
    described = fault(at_step=step, phase=phase, kind=kind, args=tuple(sorted(args.items())))
    decoded = msgspec.json.decode(msgspec.json.encode(described))
    assert decoded["at_step"] == step
    assert decoded["phase"] == phase
    assert decoded["kind"] == kind
    assert decoded["target"] == {"replica": 1, "slot": 2, "stage": 0}
    assert dict(decoded["args"]) == args


@pytest.mark.parametrize(
    "entry",
    [
        SLOW | {"args": {"seconds": 0.25}},
        EXIT | {"args": {"code": 255}},
        CUT | {"args": {"seconds": 5}},
        GOOD | {"target": {"component": "store"}, "args": {"seconds": 3}},
        GOOD | {"target": {"component": "store"}, "kind": "sigstop", "args": {"seconds": 3}},
        GOOD | {"target": {"component": "controller"}, "kind": "sigstop", "args": {"seconds": 3}},
        GOOD
        | {
            "target": {"component": "agent", "node": 0},
            "kind": "sigstop",
            "args": {"seconds": 0.5},
        },
    ],
)
def test_arguments_that_have_a_meaning_are_read(read: Reader, entry: dict[str, Any]) -> None:
    (found,) = read([entry])
    assert dict(found.args) == entry["args"]
    for name, value in entry["args"].items():
        assert found.argument(name) == value
    assert found.argument("other") is None


def without(name: str) -> dict[str, Any]:
    return {key: value for key, value in GOOD.items() if key != name}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (GOOD | {"at_seconds": 1}, "at_step, at_seconds: exactly one must be given, not both"),
        (without("at_step"), "at_step, at_seconds: exactly one must be given, not neither"),
        (GOOD | {"at_step": -1}, "at_step: -1 given; must be a whole number from 0"),
        (GOOD | {"at_step": True}, "at_step: True given"),
        (GOOD | {"at_step": 1.5}, "at_step: 1.5 given"),
        (without("at_step") | {"at_seconds": -0.5}, "at_seconds: -0.5 given"),
        (without("at_step") | {"at_seconds": float("nan")}, "at_seconds: nan given"),
        (GOOD | {"heal_at_step": "soon"}, "heal_at_step: 'soon' given"),
        (without("kind"), "kind: required; one of sigkill, sigstop, exit"),
        (GOOD | {"kind": "sigterm"}, "kind: 'sigterm' given; allowed: sigkill, sigstop, exit"),
        (GOOD | {"phase": "lunch"}, "phase: 'lunch' given; allowed: forward, backward, "),
        (GOOD | {"fase": "vote"}, "fase: no such field of the entry; did you mean phase?"),
        (without("target"), "target: None given; write {replica, slot}"),
        (GOOD | {"target": {"slot": 1}}, "target.replica: required"),
        (GOOD | {"target": {"replica": 1}}, "target.slot: required"),
        (GOOD | {"target": {"replica": 1, "slot": "x"}}, "target.slot: 'x' given"),
        (GOOD | {"target": {"replica": 1, "slott": 1}}, "slott: no such field of the target"),
        (GOOD | {"target": {"node": 1, "slot": 1}}, "slot: no such field of the target"),
        (GOOD | {"target": {"component": "disk"}}, "target.component: 'disk' given"),
        (GOOD | {"target": {"component": "agent"}}, "target: an agent is named with its node"),
        (
            GOOD | {"target": {"component": "store", "node": 1}},
            "target: an agent is named with its node",
        ),
        (
            GOOD | {"target": {"component": "store"}, "phase": "vote"},
            "phase: the store has no part in a step",
        ),
        (
            GOOD | {"target": {"component": "controller"}, "kind": "raise"},
            "kind: raise cannot strike the controller",
        ),
        (GOOD | {"kind": "partition"}, "target: a partition cuts off a node"),
        (CUT | {"phase": "vote"}, "phase: a node is cut off between steps"),
        (CUT | {"heal_at_step": 0}, "heal_at_step: a partition lasts until"),
        (CUT | {"heal_at_step": 9, "args": {"seconds": 1}}, "heal_at_step: a partition lasts"),
        (SLOW | {"args": [1]}, "args: [1] given; write name: value pairs"),
        (
            SLOW | {"args": {"second": 1}},
            "args.second: slow has no such argument; allowed: seconds",
        ),
        (SLOW | {"args": {1: 1}}, "args.1: slow has no such argument; allowed: seconds"),
        (EXIT | {"args": {"seconds": 1}}, "args.seconds: exit has no such argument; allowed: code"),
        (GOOD | {"args": {"seconds": 1}}, "args.seconds: sigkill has no such argument; leave args"),
        (GOOD | {"kind": "sigstop", "args": {"seconds": 1}}, "args.seconds: sigstop has no such"),
        (GOOD | {"kind": "raise", "args": {"code": 1}}, "args.code: raise has no such argument"),
        (
            GOOD | {"target": {"component": "controller"}, "args": {"seconds": 1}},
            "args.seconds: sigkill of the controller has no such argument; leave args out",
        ),
        (
            GOOD | {"target": {"component": "agent", "node": 1}, "args": {"seconds": 1}},
            "args.seconds: sigkill of the agent of node1 has no such argument; leave args out",
        ),
        (SLOW | {"args": {"seconds": 0}}, "args.seconds: 0 given; must be a number above 0"),
        (CUT | {"args": {"seconds": -1.5}}, "args.seconds: -1.5 given; must be a number above 0"),
        (SLOW | {"args": {"seconds": True}}, "args.seconds: True given"),
        (SLOW | {"args": {"seconds": "1"}}, "args.seconds: '1' given"),
        (SLOW | {"args": {"seconds": None}}, "args.seconds: None given"),
        (SLOW | {"args": {"seconds": [1]}}, "args.seconds: [1] given"),
        (SLOW | {"args": {"seconds": float("inf")}}, "args.seconds: inf given"),
        (SLOW | {"args": {"seconds": float("nan")}}, "args.seconds: nan given"),
        (EXIT | {"args": {"code": 0}}, "args.code: 0 given; must be a whole number in 1..255"),
        (EXIT | {"args": {"code": 256}}, "args.code: 256 given"),
        (EXIT | {"args": {"code": 1.5}}, "args.code: 1.5 given"),
        (EXIT | {"args": {"code": True}}, "args.code: True given"),
        ("sigkill", "entry: 'sigkill' given"),
    ],
)
def test_a_wrong_entry_is_named_with_what_is_allowed(
    read: Reader, entry: object, message: str
) -> None:
    with pytest.raises(FaultsError) as caught:
        read([GOOD, entry])
    lines = str(caught.value).splitlines()
    assert len(lines) == 2  # The file, and only the entry that is wrong.
    assert lines[1].startswith(f"fault 2: {message}")


@pytest.mark.parametrize(
    "kind", sorted(kind.value for kind in FaultInjection if kind not in SUPPORTED_KINDS)
)
def test_kinds_that_would_not_happen_are_refused(read: Reader, kind: str) -> None:
    with pytest.raises(FaultsError, match=f"fault 1: kind: {kind} is not supported"):
        read([GOOD | {"kind": kind}])


@pytest.mark.parametrize("phase", ["checkpoint"])
def test_phases_that_would_not_happen_are_refused(read: Reader, phase: str) -> None:
    with pytest.raises(FaultsError, match=f"fault 1: phase: {phase} is not supported"):
        read([GOOD | {"phase": phase}])


def test_every_wrong_entry_is_reported_at_once(read: Reader) -> None:
    with pytest.raises(FaultsError) as caught:
        read([GOOD | {"kind": "spike"}, GOOD, GOOD | {"phase": "checkpoint"}])
    assert [line[:7] for line in str(caught.value).splitlines()[1:]] == ["fault 1", "fault 3"]


def test_unreadable_files_are_named(read: Reader, tmp_path: Path) -> None:
    with pytest.raises(FaultsError, match=r"nothing\.yaml cannot be read"):
        load_faults(tmp_path / "nothing.yaml")
    with pytest.raises(FaultsError, match=r"faults\.yaml is not YAML: line 2, column 9: "):
        read("- at_step: 1\n  kind: ]\n")
    with pytest.raises(FaultsError, match="holds a dict; write a list"):
        read(GOOD)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (fault(target=SlotTarget(2, 0)), r"target.replica: 2 does not exist; the run has 0\.\.1"),
        (fault(target=SlotTarget(0, 4)), r"target.slot: 4 does not exist; the run has 0\.\.3"),
        (fault(target=SlotTarget(0, 0, 1)), r"target.stage: 1 does not exist; the run has 0\.\.0"),
        (fault(target=NodeTarget(3)), r"target.node: 3 does not exist; the run has 0\.\.2"),
        (fault(at_step=10), r"at_step: 10 never comes; the run has steps 0\.\.9"),
        (fault(heal_at_step=3), r"heal_at_step: 3 is not after at_step \(3\)"),
    ],
)
def test_faults_outside_the_run_are_refused(wrong: Fault, message: str) -> None:
    cluster = ClusterConfig(nodes=3, devices_per_node=4, spare_devices=4)
    inside = (
        fault(at_step=9, target=SlotTarget(1, 3), heal_at_step=0),
        fault(at_step=0, target=NodeTarget(2), heal_at_step=1),
        fault(at_step=None, at_seconds=1e9, heal_at_step=2),
    )
    parallel = ParallelConfig(tensor=4, replicas=2)
    check_faults(inside, parallel, cluster, 10, StoreConfig())
    with pytest.raises(FaultsError, match=f"^fault 1: {message}"):
        check_faults((*inside, wrong), parallel, cluster, 10, StoreConfig())


def test_what_the_launcher_cannot_carry_out_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster, parallel = ClusterConfig(nodes=2, devices_per_node=2), ParallelConfig(tensor=4)
    cut = fault(kind=FaultInjection.PARTITION, target=NodeTarget(1))
    with pytest.raises(FaultsError, match="fault 1: kind: with the memory store all nodes"):
        check_faults((cut,), parallel, cluster, 10, StoreConfig())
    elsewhere = StoreConfig(kind="etcd", endpoints=("10.0.0.1:2379",))
    check_faults((cut,), parallel, cluster, 10, elsewhere)
    struck = fault(target=ComponentTarget(Component.STORE))
    for each in (cut, struck):
        with pytest.raises(FaultsError, match=r"fault 1: the store at 10\.0\.0\.1:2379 is not"):
            check_launcher((each,), elsewhere)
    check_launcher((struck,), StoreConfig(kind="etcd"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(NetworkRefused, match="the program ip for them; install iproute2"):
        check_launcher((cut,), StoreConfig(kind="etcd"))
