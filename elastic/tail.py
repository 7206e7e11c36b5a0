"""What is added to a run's files, for somebody who only reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from elastic.journal import Listener


class Tail:
    """The whole lines of a JSONL file that were added since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> list[dict[str, Any]]:
        """The entries that are new; [] while there is no file."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            file.seek(self._offset)
            added = file.read()
        whole = added[: added.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [msgspec.json.decode(line) for line in whole.splitlines()]


class RunTail:
    """Journal and steps of a run, told to a listener as the recorder would tell them."""

    def __init__(self, run_dir: Path, listener: Listener) -> None:
        self._journal = Tail(run_dir / "journal.jsonl")
        self._steps = Tail(run_dir / "steps.jsonl")
        self._listener = listener
        self.committed = -1
        """The last step that is written."""

    def tell(self) -> None:
        """Tell what is new."""
        for step in self._steps.read():
            self.committed = step["step"]
            self._listener("step", step)
        for entry in self._journal.read():
            self._listener(entry["event"], entry)
