"""A run's directory: never written over unless it is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

FILES = ("journal.jsonl", "steps.jsonl", "summary.json", "config.yaml")


class RunDirTaken(ValueError):
    """The directory holds a run already."""


def claim(path: Path, *, replace: bool = False) -> Path:
    """Make `path` ready for a new run. Raises RunDirTaken if one is there, unless `replace`."""
    taken = [name for name in FILES if (path / name).exists()]
    if taken and not replace:
        raise RunDirTaken(
            f"{path} holds a run already ({', '.join(taken)}); choose another --run-dir, "
            "or move it away"
        )
    for name in taken:
        (path / name).unlink()
    shutil.rmtree(path / "logs", ignore_errors=True)
    path.mkdir(parents=True, exist_ok=True)
    return path
