"""A run's directory: never written over unless it is asked for."""

from __future__ import annotations

import shutil
from pathlib import Path

PARTS = ("journal.jsonl", "steps.jsonl", "summary.json", "config.yaml", "logs")


class RunDirTaken(ValueError):
    """The directory holds a run already."""


def claim(path: Path, *, replace: bool = False) -> Path:
    """Make `path` ready for a new run. Raises RunDirTaken if one is there, unless `replace`."""
    taken = [name for name in PARTS if (path / name).exists()]
    if taken and not replace:
        raise RunDirTaken(
            f"{path} holds a run already ({', '.join(taken)}); choose another --run-dir, "
            "or move it away"
        )
    for name in taken:
        part = path / name
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    path.mkdir(parents=True, exist_ok=True)
    return path
