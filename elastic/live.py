"""What a person sees while a job runs: a live panel on a terminal, plain lines elsewhere.

Both are listeners of the recorder, so they show what the journal says and nothing else.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from elastic.config import ParallelConfig
from elastic.journal import Listener
from elastic.topology import Coordinate

PLAIN_EVERY_STEPS = 10
RECENT_EVENTS = 6


@contextlib.contextmanager
def view(console: Console, title: str, parallel: ParallelConfig, steps: int) -> Iterator[Listener]:
    """A listener to give to the recorder; shows the job until the block ends."""
    if not console.is_terminal:
        yield _Lines(console, title, steps).listen
        return
    panel = _Panel(title, parallel, steps)
    with Live(panel, console=console, refresh_per_second=8, transient=False):
        yield panel.listen


class _Lines:
    """One line per event worth reading, and one every few steps."""

    def __init__(self, console: Console, title: str, steps: int) -> None:
        self._console = console
        self._title = title
        self._steps = steps

    def listen(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take one event of the recorder."""
        if event == "step":
            done = fields["step"] + 1
            if done % PLAIN_EVERY_STEPS == 0 or done == self._steps:
                self._print(f"step {done}/{self._steps}  loss {fields['loss']:.4f}")
        elif (sentence := describe(event, fields)) is not None:
            self._print(sentence)

    def _print(self, text: str) -> None:
        self._console.print(
            f"[{self._title}] {text}", markup=False, highlight=False, soft_wrap=True
        )


class _Panel:
    """The state of a job as a panel; rich renders it a few times a second."""

    def __init__(self, title: str, parallel: ParallelConfig, steps: int) -> None:
        self._title = title
        self._parallel = parallel
        self._steps = steps
        self._slots: dict[str, str] = {}
        self._committed = 0
        self._loss: float | None = None
        self._generation = 0
        self._decision = "workers are starting: the first import of torch takes some seconds"
        self._events: list[str] = []
        self._began = time.monotonic()
        self._outcome: str | None = None

    def listen(self, event: str, fields: Mapping[str, Any]) -> None:
        """Take one event of the recorder."""
        match event:
            case "step":
                self._committed = fields["step"] + 1
                self._loss = fields["loss"]
            case "plan":
                self._generation = fields["generation"]
                slots = {**self._slots, **fields["slots"]}
                self._slots = {place: member for place, member in slots.items() if member}
                self._decision = f"{fields['action']}: {fields['reason']}"
            case "failure":
                lost = fields["member"]
                self._slots = {place: m for place, m in self._slots.items() if m != lost}
            case "finish":
                self._outcome = f"{fields['outcome']}: {fields['reason']}"
            case _:
                pass
        if (sentence := describe(event, fields)) is not None:
            self._events = [*self._events, sentence][-RECENT_EVENTS:]

    def __rich__(self) -> RenderableType:
        """The panel now."""
        figures = Table.grid(padding=(0, 3))
        loss = f"{self._loss:.4f}" if self._loss is not None else "-"
        figures.add_row(
            Text.assemble(("step ", "dim"), (f"{self._committed}/{self._steps}", "bold")),
            Text.assemble(("loss ", "dim"), (loss, "bold")),
            Text.assemble(("generation ", "dim"), (str(self._generation), "bold")),
            Text.assemble(("elapsed ", "dim"), f"{time.monotonic() - self._began:.0f} s"),
        )
        rows: list[RenderableType] = [
            figures,
            ProgressBar(total=self._steps, completed=self._committed, width=60),
            Text(),
            self._grid(),
            Text(),
            Text.assemble(("decision  ", "dim"), self._outcome or self._decision),
        ]
        rows += [Text(f"  {sentence}", style="dim") for sentence in self._events]
        return Panel(Group(*rows), title=self._title, title_align="left", padding=(1, 2))

    def _grid(self) -> Table:
        grid = Table.grid(padding=(0, 2))
        if not self._generation:
            return grid
        parallel = self._parallel
        for replica, stage in product(range(parallel.replicas), range(parallel.pipeline)):
            name = f"replica {replica}" + (f" stage {stage}" if parallel.pipeline > 1 else "")
            cells = [Text(name, style="dim")]
            active = 0
            for slot in range(parallel.tensor):
                held = str(Coordinate(replica, stage, slot)) in self._slots
                active += held
                cells.append(
                    Text(f"■ {slot}", style="green")
                    if held
                    else Text(f"□ {slot}", style="bold red")
                )
            whole = active == parallel.tensor
            cells.append(Text(f"TP{active}", style="green" if whole else "bold yellow"))
            grid.add_row(*cells)
        return grid


def describe(event: str, fields: Mapping[str, Any]) -> str | None:
    """An event of the journal as a sentence; None for those that a person need not see."""
    match event:
        case "failure":
            return f"{fields['device']} failed: {fields['evidence']} (step {fields['at_step']})"
        case "plan":
            action, reason = fields["action"], fields["reason"]
            return f"generation {fields['generation']}: {action}, {reason}"
        case "running":
            return f"generation {fields['generation']} runs"
        case "late_start":
            return f"begins late: {fields['reason']}"
        case "drained":
            return f"node{fields['node']} may leave: nothing of it is in use"
        case "drain_waits":
            nodes = ", ".join(f"node{node}" for node in fields["nodes"])
            return f"{nodes} is to leave, but is still needed: {fields['reason']}"
        case "quarantined":
            return f"quarantine: {fields['reason']}"
        case "quarantine_over":
            return f"{fields['device']} may be used again"
        case "connection_lost":
            return f"{fields['member']} lost a connection: {fields['detail'].splitlines()[0][:100]}"
        case "stalled":
            return f"stalled: {fields['reason']}"
        case "replicas_differ":
            return f"REPLICAS DIFFER after step {fields['step']}: {fields['digests']}"
        case "non_finite":
            return f"step {fields['step']}: loss or gradients are not finite, update skipped"
        case "fault_not_injected":
            return f"fault {fields['fault']} never struck: nobody was in its place in time"
        case "halt":
            return f"halted: {fields['reason']}"
        case "finish":
            return f"{fields['outcome']}: {fields['reason']}"
        case _:
            return None
