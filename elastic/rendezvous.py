"""The torch store that communicators are built through, as a process of its own.

torch's TCPStore must not live in a worker, whose death would take it along, and an agent does not
load torch. So each agent has one such process; a plan names the one to use.
"""

from __future__ import annotations

from multiprocessing.connection import Connection


def serve(connection: Connection, host: str) -> None:
    """Serve a TCPStore until the other end of `connection` closes; first sends its host:port."""
    import torch.distributed as dist

    store = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)
    connection.send_bytes(f"{host}:{store.port}".encode())
    try:
        connection.recv_bytes()
    except (EOFError, OSError):
        return
