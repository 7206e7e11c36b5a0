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
import time

FIRST_PAUSE_SECONDS = 0.01
"""Before the first new attempt: the kernel may close a process's connection before its listener."""
LONGEST_PAUSE_SECONDS = 5.0
"""Pauses double up to this: a proxy may accept, and hang up, for one who is gone, again and again.
A connection that lasted longer ends that."""


async def until_nobody_listens(address: str) -> None:
    """Return when the host at `address` (host:port), which was reached before, refuses connections.

    Never returns if it was not reached even once.
    """
    host, _, port = address.rpartition(":")
    reached, pause = False, FIRST_PAUSE_SECONDS
    while True:
        began_at = time.monotonic()
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
            if time.monotonic() - began_at > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE_SECONDS)
