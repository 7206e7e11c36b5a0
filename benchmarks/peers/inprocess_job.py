"""A rank under nvidia-resiliency-ext's in-process restart.

The wrapper calls the training again, in the processes that are left, as many of them as make whole
replicas. Its settings ``default`` are its own; ``tuned`` shortens its intervals and adds an abort
that it does not have for gloo: shutting down the connections of the groups wakes whoever waits on
them.

The wrapper looks at annotations of the function that it calls, so these must not become strings.
"""

import contextlib
import os
import socket
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist
from nvidia_resiliency_ext import inprocess
from nvidia_resiliency_ext.inprocess.abort import Abort
from nvidia_resiliency_ext.inprocess.rank_assignment import ActiveWorldSizeDivisibleBy, ShiftRanks

from benchmarks.peers.training import Job, begin, train


class ShutConnections(Abort):  # type: ignore[misc]  # untyped, and optional
    """Shut down every connection of this process but those of the wrapper's store."""

    def __call__(self, state: Any) -> Any:
        """Called by the wrapper's thread; returns `state`."""
        store = int(os.environ["MASTER_PORT"])
        for each in psutil.Process().net_connections("tcp"):
            if each.raddr and store not in (each.laddr.port, each.raddr.port):
                with contextlib.suppress(OSError), socket.socket(fileno=os.dup(each.fd)) as found:
                    found.shutdown(socket.SHUT_RDWR)
        return state


def main() -> None:
    """Train to the end, in as many calls as it takes."""
    job = begin()
    settings = {} if job.settings == "default" else _tuned()
    degree = job.config.parallel.tensor
    assignment = inprocess.Compose(ActiveWorldSizeDivisibleBy(degree), ShiftRanks())
    inprocess.Wrapper(rank_assignment=assignment, **settings)(run)(job)


def run(job: Job, call: inprocess.CallWrapper | None = None) -> None:
    """One call of the wrapped function; the wrapper fills in `call`."""
    assert call is not None
    if dist.is_initialized():
        # The call before was interrupted while it left its groups.
        dist.destroy_process_group()
    # The wrapper's own store: rank 0 serves it as long as it lives.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, wait_for_workers=False)
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"call{call.iteration}", store),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=job.timeout,
    )
    try:
        train(job, after_step=call.ping)
    finally:
        # Closes this rank's connections, which wakes whoever waits for it.
        dist.destroy_process_group()


def _tuned() -> dict[str, Any]:
    interval = timedelta(milliseconds=100)
    return {
        "abort": ShutConnections(),
        "monitor_thread_interval": interval,
        "monitor_process_interval": interval,
        "progress_watchdog_interval": interval,
        "last_call_wait": interval,
        "heartbeat_interval": timedelta(milliseconds=200),
        "heartbeat_timeout": timedelta(seconds=2),
        # Shorter ones strike while ranks build the model, or wait for others that do.
        "soft_timeout": timedelta(seconds=8),
        "hard_timeout": timedelta(seconds=15),
        "termination_grace_time": timedelta(milliseconds=100),
    }


if __name__ == "__main__":
    main()
