"""Entry of a worker process; importing this file loads no torch."""

from __future__ import annotations

from multiprocessing.connection import Connection

from elastic.agent import WorkerSpec


def worker_main(connection: Connection, spec: WorkerSpec) -> None:
    """Run a worker. Raises what the training raises; the process then exits with code 1."""
    from trainer.loop import run_worker

    run_worker(connection, spec)
