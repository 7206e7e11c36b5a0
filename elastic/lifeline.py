"""Connections that tell that an agent is gone before its lease ends.

A leader keeps an idle connection to the address at which each agent serves its rendezvous. If the
agent's process ends, its host's kernel closes the connection within milliseconds; the lease says
the same seconds later. A closed connection alone proves nothing, as a middlebox may drop idle ones:
what counts is that the host then refuses another one, because nobody listens there any more. An
agent kills its workers before it stops to listen, and they end with it if it is killed.

Silence means nothing here. If the host itself is gone, or cannot be reached from the leader's, the
lease and the peers' broken connections decide.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time

RETRY_SECONDS = 5.0
"""Between attempts. The first one after the end of a connection comes at once; but a proxy may
accept, and hang up, for one who is gone, again and again."""


async def until_nobody_listens(address: str) -> None:
    """Return when the host at `address` (host:port), which was reached before, refuses connections.

    Never returns if it was not reached even once.
    """
    host, _, port = address.rpartition(":")
    reached, ended_at = False, -math.inf
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
        except ConnectionRefusedError:
            if reached:
                return
        except OSError:
            # Out of reach for now, which says nothing of the agent.
            pass
        else:
            reached = True
            try:
                with contextlib.suppress(OSError):
                    # Nothing is ever sent: this returns when the connection ends.
                    await reader.read(1)
            finally:
                writer.close()
            ended_before, ended_at = ended_at, time.monotonic()
            if ended_at - ended_before > RETRY_SECONDS:
                continue
        await asyncio.sleep(RETRY_SECONDS)
