"""The bare loop as a command, so that `benchmarks.overhead` can have it run in turns with everstep.

    python -m benchmarks.bare_job FOLDER

The folder has the configuration in CONFIG. STEPS grows by a line with each step; at the end RESULT
has when each step was done by its last rank (`ended_at`, seconds since the epoch), and `losses`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.common import run_main
from benchmarks.ranks import run_ranks
from trainer.config import RunConfig

CONFIG = "config.json"
STEPS = "steps.jsonl"
"""As everstep names its own."""

RESULT = "result.json"


def main() -> None:
    """Train in the folder named on the command line."""
    # Only here, as this loads torch, for which who needs the files' names should not wait.
    from benchmarks.bare_loop import train

    folder = Path(sys.argv[1])
    text = (folder / CONFIG).read_text()
    config = RunConfig.model_validate_json(text)
    steps = folder / STEPS
    given = run_ranks(train, config.parallel.devices, folder / "logs", text, steps)
    ended_at, loss_sums = zip(*given, strict=True)
    # All slots of a replica have the same loss: one of each is enough.
    by_replica = loss_sums[:: config.parallel.tensor]
    tokens = config.train.global_batch_size * config.train.seq_length
    result = {
        "ended_at": [max(times) for times in zip(*ended_at, strict=True)],
        "losses": [sum(of_step) / tokens for of_step in zip(*by_replica, strict=True)],
    }
    (folder / RESULT).write_text(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
