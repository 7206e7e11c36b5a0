"""The peers: how each is launched, with its own defaults and with settings tuned for speed.

A launch starts the services that a job needs and then one launcher a node; a node runs one replica.
`.venv-peers` holds the optional peers; it sees the packages of `.venv`, so all run on one torch.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Final

from benchmarks.common import ROOT

PEERS_PYTHON = ROOT / ".venv-peers" / "bin" / "python"
LOOPBACK = "127.0.0.1"
RESTARTS = "1000"

Command = tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Site:
    """Where a job runs: `nodes` of `degree` ranks, a free port, and the files that all share."""

    nodes: int
    degree: int
    port: int
    config: Path
    checkpoints: Path
    fifo: Path

    def arguments(self, settings: str, timeout_seconds: float) -> Command:
        """What `benchmarks.peers.training.begin` reads in a rank."""
        files = (str(self.config), str(self.checkpoints), str(self.fifo))
        return (*files, settings, str(timeout_seconds))


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start: services first, then one launcher a node, each with its environment."""

    nodes: tuple[Command, ...]
    services: tuple[Command, ...] = ()
    environments: tuple[Mapping[str, str], ...] = ()
    shared: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Peer:
    """One row of the table; `module` is what must be importable."""

    name: str
    module: str
    launch: Callable[[Site], Launch]

    def is_installed(self) -> bool:
        """Whether the interpreter that runs the peers finds its module."""
        found = (
            f"import importlib.util, sys; sys.exit(not importlib.util.find_spec('{self.module}'))"
        )
        return subprocess.run([python(), "-c", found], check=False).returncode == 0


def python() -> str:
    """The interpreter that runs the peers."""
    return str(PEERS_PYTHON) if PEERS_PYTHON.exists() else sys.executable


UNSHARED: Final = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
"""With the store shared between agent and ranks, a restart meets the keys of the start before."""

TORCH_TIMEOUT_SECONDS: Final = 1800.0
"""torch's own default for a collective over gloo."""


def _torchrun(
    site: Site,
    *,
    timeout_seconds: float = TORCH_TIMEOUT_SECONDS,
    rendezvous: str = "",
    environment: Mapping[str, str],
) -> Launch:
    job = ("-m", "benchmarks.peers.torchrun_job", *site.arguments("", timeout_seconds))
    launcher = (python(), "-m", "torch.distributed.run")
    return _elastic(site, launcher, rendezvous, job, environment)


def _ft_launcher(site: Site, *, options: Command, rendezvous: str = "") -> Launch:
    job = ("-m", "benchmarks.peers.ft_launcher_job", *site.arguments("", TORCH_TIMEOUT_SECONDS))
    module = "nvidia_resiliency_ext.fault_tolerance.launcher"
    launcher = (python(), "-m", module, "--ft-enable-nic-monitor", "false", *options)
    return _elastic(site, launcher, rendezvous, job, UNSHARED)


def _elastic(
    site: Site, launcher: Command, rendezvous: str, job: Command, environment: Mapping[str, str]
) -> Launch:
    """One launcher a node that meet over c10d; node 0 serves the store."""
    nodes = tuple(
        (
            *launcher,
            f"--nnodes=1:{site.nodes}",
            f"--nproc-per-node={site.degree}",
            f"--max-restarts={RESTARTS}",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={LOOPBACK}:{site.port}",
            "--rdzv-id=recovery",
            f"--rdzv-conf=is_host={int(node == 0)}{rendezvous}",
            f"--local-addr={LOOPBACK}",
            *job,
        )
        for node in range(site.nodes)
    )
    return Launch(nodes, shared=environment)


def _in_process(site: Site, *, settings: str) -> Launch:
    arguments = site.arguments(settings, TORCH_TIMEOUT_SECONDS)
    world_size = str(site.nodes * site.degree)
    nodes = tuple(
        (
            *(python(), "-m", "benchmarks.peers.plain_node"),
            *(str(node * site.degree), str(site.degree), world_size, str(site.port)),
            *("benchmarks.peers.inprocess_job", *arguments),
        )
        for node in range(site.nodes)
    )
    # Each look at its store that finds nothing would be a warning.
    return Launch(nodes, shared={"TORCH_CPP_LOG_LEVEL": "ERROR"})


def _torchft(
    site: Site, *, lighthouse: Command = (), heartbeat: str = "default", timeout_seconds: float
) -> Launch:
    serve = (
        str(Path(python()).with_name("torchft_lighthouse")),
        *("--bind", f"[::]:{site.port}", "--min_replicas", "1"),
        *lighthouse,
    )
    job = ("-m", "benchmarks.peers.torchft_job", *site.arguments(heartbeat, timeout_seconds))
    group = (
        *(python(), "-m", "torch.distributed.run", "--standalone"),
        *(f"--nproc-per-node={site.degree}", f"--max-restarts={RESTARTS}", *job),
    )
    environments = tuple({"REPLICA_GROUP_ID": str(node)} for node in range(site.nodes))
    shared = {**UNSHARED, "TORCHFT_LIGHTHOUSE": f"http://{LOOPBACK}:{site.port}"}
    return Launch((group,) * site.nodes, (serve,), environments, shared)


_QUICK_RENDEZVOUS = ",last_call_timeout=1,keep_alive_interval=1,keep_alive_max_attempt=2"

PEERS: Final = (
    Peer("torchft, default", "torchft", partial(_torchft, timeout_seconds=60.0)),
    Peer(
        "torchft, 1 s heartbeats",
        "torchft",
        partial(_torchft, lighthouse=("--heartbeat_timeout_ms", "1000"), timeout_seconds=10.0),
    ),
    Peer(
        "torchft, 0.4 s heartbeats",
        "torchft",
        partial(
            _torchft,
            lighthouse=("--heartbeat_timeout_ms", "400", "--quorum_tick_ms", "10"),
            heartbeat="0.05",
            timeout_seconds=2.0,
        ),
    ),
    Peer("torchrun, default", "torch", partial(_torchrun, environment={})),
    Peer(
        "torchrun, tuned",
        "torch",
        partial(_torchrun, environment=UNSHARED, timeout_seconds=5.0, rendezvous=_QUICK_RENDEZVOUS),
    ),
    Peer(
        "nvrx ft_launcher, default",
        "nvidia_resiliency_ext",
        partial(_ft_launcher, options=("--ft-rank-heartbeat-timeout", "2700")),
    ),
    Peer(
        "nvrx ft_launcher, tuned",
        "nvidia_resiliency_ext",
        partial(
            _ft_launcher,
            options=(
                *("--ft-rank-heartbeat-timeout", "3", "--ft-workload-check-interval", "0.5"),
                *("--workers-stop-timeout", "1"),
            ),
            rendezvous=_QUICK_RENDEZVOUS,
        ),
    ),
    Peer(
        "nvrx in-process, default",
        "nvidia_resiliency_ext",
        partial(_in_process, settings="default"),
    ),
    Peer("nvrx in-process, tuned", "nvidia_resiliency_ext", partial(_in_process, settings="tuned")),
)
