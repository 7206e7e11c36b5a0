"""Keeps one process of a run up: starts it, and starts it again when it was killed.

A process that ends by itself has said why, and is not started again: either the job is over, or it
cannot take part. One that was killed by a signal comes back after a moment, as under any cluster
manager, unless it is held down.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

REFUSED = 2
"""Exit code of a process that cannot take part; to start it again would not help."""
RESTART_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Part:
    """A process of the run. `name` is also that of its log.

    `leaves` are the exit codes with which it may end while the run goes on without it.
    """

    name: str
    command: tuple[str, ...]
    leaves: frozenset[int] = frozenset()


class PartRefused(RuntimeError):
    """A process cannot take part; the message ends with its last words."""


class Keeper:
    """Keeper of one part. `run` returns once the part ended by itself."""

    def __init__(self, part: Part, logs: Path, environment: Mapping[str, str]) -> None:
        self.part = part
        self._log = logs / f"{part.name}.log"
        self._environment = environment
        self._process: asyncio.subprocess.Process | None = None
        self._up = asyncio.Event()
        self._up.set()
        self._retired = False
        self.left = False
        """Whether it ended, and the run goes on without it."""

    async def run(self) -> None:
        """Keep it up. Raises PartRefused if it cannot take part; kills it when cancelled."""
        while True:
            await self._up.wait()
            if self._retired:
                return
            status = await self._run_once()
            self.left = status in self.part.leaves
            if status == REFUSED or (status > 0 and self.part.leaves and not self.left):
                lines = self._log.read_text(errors="replace").strip().splitlines()
                raise PartRefused(f"{self.part.name}: {lines[-1] if lines else 'it did not say'}")
            if status >= 0:
                return
            name = signal.Signals(-status).name
            with self._log.open("a") as log:
                log.write(f"{time.strftime('%H:%M:%S')} {self.part.name} was killed by {name}\n")
            await asyncio.sleep(RESTART_SECONDS)

    @property
    def is_up(self) -> bool:
        """Whether its process runs, or is stopped."""
        return self._process is not None and self._process.returncode is None

    def hold_down(self) -> None:
        """Do not start it again until it is let up."""
        self._up.clear()

    def let_up(self) -> None:
        """Start it again, if it is down."""
        self._up.set()

    def retire(self) -> None:
        """Do not start it again, as the job is over."""
        self._retired = True
        self._up.set()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal, if it runs."""
        if self._process is not None and self.is_up:
            with suppress(ProcessLookupError):
                os.kill(self._process.pid, number)

    async def _run_once(self) -> int:
        with self._log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *self.part.command,
                env=self._environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._process = process
        try:
            return await process.wait()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
