"""A run as the processes that make it up are told of it: what to run, on what, and where.

The same specification makes a run in one process (`elastic.local`) and one of many
(`elastic.serve`, `elastic.launch`), so both forms are made of the same controllers and agents.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from elastic.config import ClusterConfig
from elastic.controller import Controller
from elastic.driver import Driver
from elastic.effects import Limits
from elastic.faults import Fault
from elastic.health_config import HealthConfig
from elastic.job_shape import JobShape, cluster_devices
from elastic.journal import Listener, Recorder
from elastic.node_workers import NodeSpec, WorkerMain
from elastic.recorded import Recorded
from elastic.store import Store
from elastic.topology import DeviceId


@dataclass(frozen=True, slots=True)
class RunSpec:
    """What to run, where. `preload` are modules that workers need and that take long to import."""

    job: str
    shape: JobShape
    cluster: ClusterConfig
    health: HealthConfig
    faults: tuple[Fault, ...]
    run_dir: Path
    worker_main: WorkerMain
    preload: tuple[str, ...]
    payload: str

    @property
    def devices(self) -> tuple[DeviceId, ...]:
        """All devices, in order; those beyond the grid are spares."""
        return cluster_devices(self.cluster.nodes, self.cluster.devices_per_node)

    @property
    def logs(self) -> Path:
        """Where every process of the run writes what it has to say."""
        return self.run_dir / "logs"


def node_spec(run: RunSpec, node: int, host: str) -> NodeSpec:
    """What the agent of `node` is told, whose address is `host`."""
    return NodeSpec(
        job=run.job,
        node=node,
        host=host,
        devices=tuple(device for device in run.devices if device.node == node),
        health=run.health,
        faults=run.faults,
        logs=run.logs,
        worker_main=run.worker_main,
        payload=run.payload,
        started_at=time.time(),
    )


def candidate(run: RunSpec, store: Store, name: str, listener: Listener) -> Driver:
    """A candidate for the lead of `run`, which writes the run's files while it leads."""

    def make_controller(recorded: Recorded, now: float) -> Controller:
        return Controller(run.shape, run.devices, _limits(run.health), now, recorded)

    def open_recorder(controller: Controller) -> Recorder:
        faults = tuple(fault.id for fault in run.faults)
        recorder = Recorder(run.run_dir, run.job, controller.plans, listener, faults)
        if recorder.is_new:
            recorder.note(time.time(), "start", {"job": run.job, "workers": len(run.devices)})
        return recorder

    lease_seconds = run.health.leader_lease_seconds
    return Driver(store, run.job, name, lease_seconds, make_controller, open_recorder)


def _limits(health: HealthConfig) -> Limits:
    return Limits(
        spawn_timeout_seconds=health.spawn_timeout_seconds,
        quiesce_timeout_seconds=health.quiesce_timeout_seconds,
        pause_timeout_seconds=health.collective_timeout_seconds + health.quiesce_timeout_seconds,
        corroboration_seconds=health.corroboration_seconds,
        agent_timeout_seconds=health.agent_timeout_seconds,
        max_recoveries=health.max_recoveries,
        max_fruitless_recoveries=health.max_fruitless_recoveries,
        quarantine=health.quarantine,
    )
