"""A run's configuration -> the controllers and agents that carry it out, here or on other hosts."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from elastic.faults import Fault
from elastic.journal import Listener
from elastic.local import Ended
from elastic.network import Network
from elastic.run_spec import RunSpec
from elastic.spawn import end_with
from elastic.store_config import StoreConfig
from trainer.config import RunConfig
from trainer.data import load_corpus
from trainer.entry import Payload, worker_main
from trainer.job import job_shape

if TYPE_CHECKING:
    from elastic.agent import Departure

UNDRAINED = 5
"""Exit code of an agent that left although its node's work was not handed over."""

PASSWORD = "EVERSTEP_STORE_PASSWORD"
"""Environment variable in which the launcher passes a password of the configuration on."""


def run_spec(config: RunConfig, faults: tuple[Fault, ...], run_dir: Path) -> RunSpec:
    """What the processes of the run are told. Raises ValueError or OSError for missing data."""
    corpus = load_corpus(
        config.data.kind,
        config.data.path,
        seq_length=config.train.seq_length,
        seed=config.train.seed,
    )
    # How to reach the store is no business of the workers, and may differ between hosts.
    told = config.model_copy(update={"store": StoreConfig()})
    return RunSpec(
        job=config.job,
        shape=job_shape(config),
        cluster=config.cluster,
        health=config.health,
        faults=faults,
        run_dir=run_dir,
        worker_main=worker_main,
        preload=("trainer.preload", "trainer.main"),
        payload=Payload(config=told, corpus=corpus.fingerprint).model_dump_json(),
    )


def save(config: RunConfig, run_dir: Path) -> None:
    """Write the configuration to the run's directory, without a password."""
    dumped = config.model_dump(mode="json")
    dumped["store"].pop("password")
    (run_dir / "config.yaml").write_text(yaml.safe_dump(dumped, sort_keys=False))


def start_parts(run: RunSpec, config: RunConfig, faults: Path | None, listener: Listener) -> Ended:
    """Run on this machine with etcd, each controller and agent a process of its own."""
    # gRPC takes longer to import than all that a run without etcd needs.
    from elastic.keeper import Part
    from elastic.launch import run_parts

    password = config.store.password
    environment = {PASSWORD: password.get_secret_value()} if password is not None else {}
    shared = [str(run.run_dir / "config.yaml"), "--run-dir", str(run.run_dir)]
    if password is not None:
        shared += ["--set", f"store.password_env={PASSWORD}"]
    if faults is not None:
        shared += ["--faults", str(faults)]

    def make_parts(endpoints: tuple[str, ...], network: Network) -> list[Part]:
        where = ["--set", f"store.endpoints=[{', '.join(endpoints)}]"]

        def line(command: str, *arguments: str) -> tuple[str, ...]:
            return (sys.executable, "-m", "trainer.main", command, *shared, *where, *arguments)

        def agent(node: int) -> Part:
            own = ("--node", str(node), "--host", network.address(node))
            command = (*network.inside(node), *line("agent", *own))
            return Part(f"agent{node}", command, frozenset({0, UNDRAINED}))

        names = [f"controller{number}" for number in range(config.store.controllers)]
        nodes = sorted({device.node for device in run.devices})
        return [
            *(Part(name, line("controller", "--name", name)) for name in names),
            *(agent(node) for node in nodes),
        ]

    return run_parts(run, config.store, make_parts, environment, listener)


def run_controller(
    config: RunConfig, faults: tuple[Fault, ...], run_dir: Path, name: str | None
) -> str | None:
    """Lead or stand by; returns the job's outcome, None if asked to end before."""
    from elastic.effects import Finish
    from elastic.serve import serve_controller

    _live_with_parent()
    _check_endpoints(config, "controller")
    run = run_spec(config, faults, run_dir)
    own = name or f"{socket.gethostname()}-{os.getpid()}"
    ended = asyncio.run(serve_controller(run, config.store, own, lambda _event, _fields: None))
    return ended.outcome if isinstance(ended, Finish) else None


def run_agent(
    config: RunConfig, faults: tuple[Fault, ...], run_dir: Path, node: int, host: str | None
) -> Departure | None:
    """Serve a node until the job is over or its work is handed over; None if asked to end at once.

    Raises ValueError for a node that the job lacks.
    """
    from elastic.agent import Departure
    from elastic.serve import address_towards, serve_agent

    _live_with_parent()
    _check_endpoints(config, "agent")
    if not 0 <= node < config.cluster.nodes:
        raise ValueError(
            f"--node {node}: the job has cluster.nodes = {config.cluster.nodes}, numbered from 0"
        )
    run = run_spec(config, faults, run_dir)
    own = host or address_towards(config.store.endpoints[0])
    ended = asyncio.run(serve_agent(run, config.store, node, own))
    return ended if isinstance(ended, Departure) else None


def ask_to_stop(config: RunConfig) -> None:
    """Ask the leader of the job to end it."""
    from elastic.open_store import open_store
    from elastic.serve import wish_to_stop

    _check_endpoints(config, "stop")

    async def ask() -> None:
        async with open_store(config.store, Path(os.devnull)) as store:
            await wish_to_stop(store, config.job, "everstep stop was called")

    asyncio.run(ask())


def _check_endpoints(config: RunConfig, command: str) -> None:
    if config.store.kind != "etcd" or not config.store.endpoints:
        raise ValueError(
            f"everstep {command} works with others through etcd; set store.kind: etcd and "
            "store.endpoints: [host:port, ...], or run everything on this machine with everstep run"
        )


def _live_with_parent() -> None:
    """End with the launcher, if one started this process."""
    from elastic.launch import PARENT

    parent = os.environ.pop(PARENT, None)
    if parent is not None and not end_with(int(parent)):
        raise RuntimeError("the launcher is gone")
