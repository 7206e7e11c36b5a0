"""Entry of a worker process, and what the launcher tells it; importing this file loads no torch."""

from __future__ import annotations

from multiprocessing.connection import Connection

from elastic.config import Settings
from elastic.node_workers import WorkerSpec
from trainer.config import RunConfig


class Payload(Settings):
    """The trainer's part of a worker's specification.

    `corpus` is the fingerprint of the data that the launcher found: a worker that reads something
    else, because files changed meanwhile, must not take part.
    """

    config: RunConfig
    corpus: str


def worker_main(connection: Connection, spec: WorkerSpec) -> None:
    """Run a worker. Raises what the training raises; the process then exits with code 1."""
    from trainer.loop import run_worker

    run_worker(connection, spec)
