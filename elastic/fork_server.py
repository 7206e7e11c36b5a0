"""What a fork server does besides its imports: it ends at once when its agent has.

Python takes seconds to end a process that has imported torch, in which the server's children would
live on: the kernel kills them with it (`elastic.spawn`), and one that is stopped or stuck notices
its agent's end in no other way. A fork server runs no code of ours but the imports it is told to
make, so this module acts on import. Nobody else imports it.
"""

from __future__ import annotations

import atexit
import os


def _end(server: int) -> None:
    if os.getpid() == server:
        os._exit(0)


# What is registered last is called first: this comes behind all other imports.
atexit.register(_end, os.getpid())
