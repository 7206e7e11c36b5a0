"""The files of a run: journal.jsonl, steps.jsonl, and summary.json at its end.

The recorder sits beside the controller and sees what it sees. It writes on change, one named event
with its fields a line, and tells the same to its listener (the live view). No worker ever waits for
a file. A controller that takes over opens the files of its predecessor and goes on with them.

The files grow with the run. In memory is what was told of recoveries, and nothing of steps; the
summary is made from the files. What a step has in the journal is written before its line, so that a
successor, who goes on behind the last line, misses none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import msgspec

from elastic.effects import Finish, Note
from elastic.messages import AgentRecord, NodeProgress, StepDone, StoreMessage
from elastic.notes import EntryId, entry_id, fault_notes
from elastic.plan import Plan
from elastic.step_log import StepLine, StepLog
from elastic.summary import step_figures, summarize

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
    """Writes the files of one run. `faults` are the ids of those that are to be injected."""

    def __init__(
        self,
        run_dir: Path,
        job: str,
        plans: Mapping[int, Plan],
        listener: Listener,
        faults: tuple[int, ...] = (),
    ) -> None:
        self._run_dir = run_dir
        self._job = job
        self._listener = listener
        self._faults = faults
        self._told: set[EntryId] = set()
        self._injected: set[int] = set()
        self._resumed = 0
        self._is_new = True
        for entry in _lines(run_dir / "journal.jsonl"):
            self._remember(entry["event"], entry)
        last_step = max((line["step"] for line in _lines(run_dir / "steps.jsonl")), default=-1)
        self._step_log = StepLog(plans, after=last_step)
        self._ready: dict[int, tuple[str, ...]] = {}
        self._outcome: str | None = None
        self._journal_file = _open(run_dir / "journal.jsonl")
        self._steps_file = _open(run_dir / "steps.jsonl")

    @property
    def is_new(self) -> bool:
        """Whether nothing was written yet."""
        return self._is_new

    @property
    def is_concluded(self) -> bool:
        """Whether the run's end is written."""
        return (self._run_dir / "summary.json").exists()

    @property
    def told(self) -> Collection[EntryId]:
        """Of the entries that a journal has once, those that this one has."""
        return self._told

    @property
    def waits_since(self) -> int | None:
        """The revision of the oldest report of a step whose line is not due yet; None: no such."""
        return self._step_log.waits_since

    def observe(self, at: float, seen: StoreMessage | Note | Finish, revision: int = 0) -> None:
        """Take what the driver saw or did at time `at`; `revision` is that of a message's key."""
        match seen:
            case Note(event, fields):
                self.note(at, event, fields)
            case Finish(outcome, reason):
                self._outcome = outcome
                self._write_steps(self._step_log.flush())
                for fault in sorted(set(self._faults) - self._injected):
                    self.note(at, "fault_not_injected", {"fault": fault})
                self.note(at, "finish", {"outcome": outcome, "reason": reason})
            case AgentRecord():
                ready = tuple(str(member) for member in seen.ready)
                if self._ready.get(seen.node) != ready:
                    self._ready[seen.node] = ready
                    self.note(at, "workers_ready", {"node": seen.node, "ready": ready})
            case NodeProgress():
                for note in seen.notes:
                    if isinstance(note, StepDone):
                        self._write_steps(self._step_log.take(note, revision))
            case _:
                pass

    def catch_up(self, at: float, seen: object) -> None:
        """Write those faults that `seen` tells of and that a predecessor did not write."""
        for note in fault_notes(seen):
            self._note_once(at, note.event, note.fields)

    def note(self, at: float, event: str, fields: Mapping[str, Any]) -> None:
        """Write one event to the journal and tell the listener."""
        # Through msgspec, so that the listener gets what a reader of the file gets.
        entry = msgspec.json.decode(msgspec.json.encode({"at": at, "event": event, **fields}))
        self._remember(event, entry)
        _write_line(self._journal_file, entry)
        self._listener(event, entry)

    def close(self) -> None:
        """Close the files; write summary.json if the job is over."""
        self._journal_file.close()
        self._steps_file.close()
        if self._outcome is None:
            return
        journal = list(_lines(self._run_dir / "journal.jsonl"))
        steps = map(step_figures, _lines(self._run_dir / "steps.jsonl"))
        summary = summarize(self._job, journal, list(steps), self._outcome)
        encoded = msgspec.json.format(msgspec.json.encode(summary), indent=2)
        partial = self._run_dir / "summary.json.partial"
        partial.write_bytes(encoded + b"\n")
        partial.replace(self._run_dir / "summary.json")

    def _remember(self, event: str, fields: Mapping[str, Any]) -> None:
        self._is_new = False
        if (identity := entry_id(event, fields)) is not None:
            self._told.add(identity)
        if event == "fault_injected":
            self._injected.add(fields["fault"])
        elif event == "resumed":
            self._resumed = fields["generation"]

    def _note_once(self, at: float, event: str, fields: Mapping[str, Any]) -> None:
        if entry_id(event, fields) not in self._told:
            self.note(at, event, fields)

    def _write_steps(self, lines: list[StepLine]) -> None:
        for line in lines:
            if line.generation > self._resumed:
                resumed = {"generation": line.generation, "step": line.step}
                self._note_once(line.at, "resumed", resumed)
            if line.replicas_equal is False:
                digests = {str(replica): digest for replica, digest in line.replica_digests}
                differ = {"step": line.step, "digests": digests}
                self._note_once(line.at, "replicas_differ", differ)
            if not math.isfinite(line.grad_norm):
                skipped = {"step": line.step, "update": "skipped"}
                self._note_once(line.at, "non_finite", skipped)
            entry = {name: getattr(line, name) for name in STEP_FIELDS}
            _write_line(self._steps_file, entry)
            self._listener("step", entry)


def _open(path: Path) -> IO[bytes]:
    # Line by line to disk: whoever is killed leaves whole lines.
    return path.open("ab", buffering=0)


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """The entries of a file that may not exist yet."""
    if path.exists():
        with path.open("rb") as file:
            yield from map(msgspec.json.decode, file)


def _write_line(file: IO[bytes], entry: Mapping[str, Any]) -> None:
    file.write(msgspec.json.encode(entry) + b"\n")
