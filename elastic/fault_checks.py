"""Whether the faults of a file can happen in a run: its shape, its length, its store, its machine.

A fault that silently does not happen would make a run look more robust than it is. Every problem is
reported at once, each with the entry, the field and what is allowed.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from elastic.config import ClusterConfig, ParallelConfig
from elastic.faults import (
    Component,
    ComponentTarget,
    Fault,
    FaultInjection,
    FaultsError,
    NodeTarget,
    SlotTarget,
    Target,
)
from elastic.network import check_network
from elastic.store_config import StoreConfig


def check_faults(
    faults: Iterable[Fault],
    parallel: ParallelConfig,
    cluster: ClusterConfig,
    steps: int,
    store: StoreConfig,
) -> None:
    """Check that every fault can happen in a run of this shape and of this many steps.

    Raises:
        FaultsError: a target or a step lies outside the run; one line per problem.
    """
    problems = [
        f"fault {fault.id}: {problem}"
        for fault in faults
        for problem in (
            *_outside_shape(fault.target, parallel, cluster),
            *_outside_run(fault, steps),
            *_without_process(fault, store),
        )
    ]
    if problems:
        raise FaultsError("\n".join(problems))


def check_launcher(faults: Collection[Fault], store: StoreConfig) -> None:
    """Check that whoever starts the run, all on this machine, can carry its own part out.

    Raises:
        FaultsError: the store to strike or to separate nodes from is not the run's own.
        NetworkRefused: networks cannot be made here.
    """
    for fault in faults:
        cuts = fault.kind is FaultInjection.PARTITION
        if store.endpoints and (cuts or fault.target == ComponentTarget(Component.STORE)):
            raise FaultsError(
                f"fault {fault.id}: the store at {', '.join(store.endpoints)} is not this run's "
                "own; leave store.endpoints out, and a private one is started"
            )
    if any(fault.kind is FaultInjection.PARTITION for fault in faults):
        check_network()


def _without_process(fault: Fault, store: StoreConfig) -> Iterable[str]:
    if store.kind == "etcd":
        return
    if isinstance(fault.target, ComponentTarget):
        yield (
            f"target.component: {fault.target} is no process of its own in a run with the "
            "memory store; set store.kind: etcd"
        )
    if fault.kind is FaultInjection.PARTITION:
        yield (
            "kind: with the memory store all nodes are one process, which nothing separates; set "
            "store.kind: etcd"
        )


def _outside_shape(
    target: Target, parallel: ParallelConfig, cluster: ClusterConfig
) -> Iterable[str]:
    bounds: tuple[tuple[str, int, int], ...]
    match target:
        case SlotTarget():
            bounds = (
                ("replica", target.replica, parallel.replicas),
                ("stage", target.stage, parallel.pipeline),
                ("slot", target.slot, parallel.tensor),
            )
        case NodeTarget():
            bounds = (("node", target.node, cluster.nodes),)
        case ComponentTarget():
            bounds = (("node", target.node or 0, cluster.nodes),)
    for name, value, size in bounds:
        if value >= size:
            yield f"target.{name}: {value} does not exist; the run has 0..{size - 1}"


def _outside_run(fault: Fault, steps: int) -> Iterable[str]:
    if fault.at_step is None:
        return
    if fault.at_step >= steps:
        yield f"at_step: {fault.at_step} never comes; the run has steps 0..{steps - 1}"
    if fault.heal_at_step and fault.heal_at_step <= fault.at_step:
        yield (
            f"heal_at_step: {fault.heal_at_step} is not after at_step ({fault.at_step}); set it to"
            f" {fault.at_step + 1} or more, to 0 (at once), or leave it out (never)"
        )
