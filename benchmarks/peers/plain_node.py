"""Starts the ranks of one node and lets them be: nvidia-resiliency-ext's in-process restart wants a
launcher that does not end the others when one rank fails.

    python -m benchmarks.peers.plain_node FIRST_RANK RANKS WORLD_SIZE PORT MODULE ARGUMENTS...
"""

from __future__ import annotations

import os
import subprocess
import sys


def main() -> None:
    """Start the ranks, and wait until all have ended."""
    first, count, world_size, port, module, *arguments = sys.argv[1:]
    shared = {"WORLD_SIZE": world_size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            env={**os.environ, **shared, "RANK": str(rank)},
        )
        for rank in range(int(first), int(first) + int(count))
    ]
    for rank in ranks:
        rank.wait()


if __name__ == "__main__":
    main()
