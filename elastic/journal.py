"""The files of a run: journal.jsonl, steps.jsonl, and summary.json at its end.

The recorder sits beside the driver and sees what the controller sees. It writes on change, one
named event with its fields a line, and tells the same to its listener (the live view). It runs in
the launcher, so no worker ever waits for a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import msgspec

from elastic.effects import Finish, Note
from elastic.messages import AgentRecord, NodeProgress, StepDone, StoreMessage
from elastic.plan import Plan
from elastic.step_log import StepLine, StepLog
from elastic.summary import summarize

Listener = Callable[[str, Mapping[str, Any]], None]
"""Called with the name of an event (``step`` for a committed step) and its fields."""

STEP_FIELDS = (
    "step",
    "generation",
    "loss",
    "grad_norm",
    "tokens",
    "sample_digest",
    "weights_digest",
    "seconds",
    "degrees",
)


class Recorder:
    """Writes the files of one run. `close` finishes them and returns the summary.

    `injected` are the faults that struck.
    """

    def __init__(
        self, run_dir: Path, job: str, plans: Mapping[int, Plan], listener: Listener
    ) -> None:
        self._run_dir = run_dir
        self._job = job
        self._listener = listener
        self._step_log = StepLog(plans)
        self._journal: list[dict[str, Any]] = []
        self._steps: list[dict[str, Any]] = []
        self.injected: set[int] = set()
        self._ready: dict[int, tuple[str, ...]] = {}
        self._journal_file = _open(run_dir / "journal.jsonl")
        self._steps_file = _open(run_dir / "steps.jsonl")

    def observe(self, at: float, seen: StoreMessage | Note | Finish) -> None:
        """Take what the driver saw or did at time `at`."""
        match seen:
            case Note(event, fields):
                self.note(at, event, fields)
            case Finish(outcome, reason):
                self.note(at, "finish", {"outcome": outcome, "reason": reason})
            case AgentRecord():
                ready = tuple(str(member) for member in seen.ready)
                if self._ready.get(seen.node) != ready:
                    self._ready[seen.node] = ready
                    self.note(at, "workers_ready", {"node": seen.node, "ready": ready})
            case NodeProgress():
                for note in seen.notes:
                    if isinstance(note, StepDone):
                        self._write_steps(self._step_log.take(note))
            case _:
                pass

    def note(self, at: float, event: str, fields: Mapping[str, Any]) -> None:
        """Write one event to the journal and tell the listener."""
        # Through msgspec, so that the entry in memory is what a reader of the file gets.
        entry = msgspec.json.decode(msgspec.json.encode({"at": at, "event": event, **fields}))
        self._journal.append(entry)
        _write_line(self._journal_file, entry)
        if event == "fault_injected":
            self.injected.add(entry["fault"])
        self._listener(event, entry)

    def close(self, outcome: str) -> dict[str, Any]:
        """Write what is left and summary.json; returns the summary."""
        self._write_steps(self._step_log.flush())
        self._journal_file.close()
        self._steps_file.close()
        summary = summarize(self._job, self._journal, self._steps, outcome)
        encoded = msgspec.json.format(msgspec.json.encode(summary), indent=2)
        partial = self._run_dir / "summary.json.partial"
        partial.write_bytes(encoded + b"\n")
        partial.replace(self._run_dir / "summary.json")
        return summary

    def _write_steps(self, lines: list[StepLine]) -> None:
        for line in lines:
            fields = asdict(line)
            _write_line(self._steps_file, {name: fields[name] for name in STEP_FIELDS})
            entry = {**fields, "replicas_equal": line.replicas_equal}
            self._steps.append(entry)
            if line.replicas_equal is False:
                digests = {str(replica): digest for replica, digest in line.replica_digests}
                self.note(line.at, "replicas_differ", {"step": line.step, "digests": digests})
            if not math.isfinite(line.grad_norm):
                self.note(line.at, "non_finite", {"step": line.step, "update": "skipped"})
            self._listener("step", entry)


def _open(path: Path) -> IO[bytes]:
    # Line by line to disk: a killed launcher leaves whole lines.
    return path.open("wb", buffering=0)


def _write_line(file: IO[bytes], entry: Mapping[str, Any]) -> None:
    file.write(msgspec.json.encode(entry) + b"\n")
