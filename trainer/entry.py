"""Entry of a worker process, and what the launcher tells it; importing this file loads no torch."""

from __future__ import annotations

import os
from multiprocessing.connection import Connection

from elastic.node_workers import WorkerSpec
from elastic.settings import Settings
from trainer.config import RunConfig


class Payload(Settings):
    """The trainer's part of a worker's specification.

    `corpus` is the fingerprint of the data that the launcher found: a worker that reads something
    else, because files changed meanwhile, must not take part.
    """

    config: RunConfig
    corpus: str


def worker_main(connection: Connection, spec: WorkerSpec) -> None:
    """Run a worker. Raises what the training raises; the process then exits with code 1.

    What it raises is left in `spec.error_file`, as torch elastic records it; a crash inside native
    code leaves the Python stacks in the log.
    """
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(spec.error_file)
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from trainer.loop import run_worker

    handler = get_error_handler()
    handler.initialize()
    try:
        run_worker(connection, spec)
    except Exception as error:
        handler.record_exception(error)
        raise
