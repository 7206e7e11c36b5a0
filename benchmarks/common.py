"""What every benchmark needs: commands that cannot leak, progress lines, and everstep's own runs.

A command is started as the leader of its own session and, however the benchmark ends, is asked to
stop and then killed with its process group. Its output goes to a log, whose end becomes part of the
error if it fails. Everything is written below one temporary directory, which is removed at the end.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from elastic.spawn import PR_SET_PDEATHSIG

ROOT = Path(__file__).resolve().parent.parent
DEMO_CONFIG = ROOT / "configs" / "demo.yaml"

STOP_SECONDS = 45.0
"""How long a command may take to end once it was asked to; torchrun gives its ranks 30 s."""

PROGRESS_SECONDS = 5.0
LOG_TAIL_BYTES = 3000

_EVERSTEP = "import sys; from trainer.main import main; sys.exit(main())"


REFUSED = 2
"""Exit code of `everstep run` for a configuration or faults file that it cannot carry out."""


class BenchmarkError(RuntimeError):
    """A measured program failed; the message ends with the end of its log."""


class RefusedError(BenchmarkError):
    """everstep cannot be asked that."""


def progress(text: str) -> None:
    """Say on standard error what is going on."""
    print(f"{time.strftime('%H:%M:%S')}  {text}", file=sys.stderr, flush=True)


def log_tail(log: Path) -> str:
    """The end of a log file, for an error message."""
    if not log.exists():
        return f"{log} was never written"
    return log.read_bytes()[-LOG_TAIL_BYTES:].decode(errors="replace")


def run_main(main: Callable[[], None]) -> None:
    """Run a benchmark's main function; a failed program or Ctrl-C ends it without a traceback."""
    try:
        main()
    except BenchmarkError as error:
        sys.exit(f"the benchmark failed: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextlib.contextmanager
def scratch_folder() -> Iterator[Path]:
    """A temporary directory, which is removed also when SIGTERM or SIGHUP ends the benchmark."""

    def interrupt(number: int, frame: object) -> NoReturn:
        raise SystemExit(128 + number)

    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    with tempfile.TemporaryDirectory(prefix="everstep-bench-", ignore_cleanup_errors=True) as name:
        yield Path(name)


@contextlib.contextmanager
def command(
    arguments: Sequence[str], log: Path, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command running in the checkout while the block lasts; nothing of it is left after it."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            arguments,
            cwd=ROOT,
            env={**os.environ, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STOP_SECONDS)
        # Whatever is left of the group, also where its leader ended by itself.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(
    process: subprocess.Popen[bytes],
    log: Path,
    describe: Callable[[], str],
    limit_seconds: float = math.inf,
) -> None:
    """Wait for a command to end, telling every few seconds what `describe` says.

    Raises:
        BenchmarkError: it ended with a code other than 0, or not within `limit_seconds`.
    """
    deadline = time.monotonic() + limit_seconds
    while True:
        try:
            code = process.wait(PROGRESS_SECONDS)
        except subprocess.TimeoutExpired:
            progress(describe())
            if time.monotonic() > deadline:
                raise BenchmarkError(
                    f"{process.args!r} ran for more than {limit_seconds:g} s:\n{log_tail(log)}"
                ) from None
            continue
        if code:
            raise BenchmarkError(f"{process.args!r} ended with code {code}:\n{log_tail(log)}")
        return


def children_of(pid: int) -> list[int]:
    """The processes that `pid` started and did not wait for; none if it ended."""
    found: list[int] = []
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):  # The thread ended; another one has its children now.
            found += (int(child) for child in listing.read_text().split())
    return found


def die_with_parent() -> None:
    """In a rank that its launcher started in a session of its own: be killed when that ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class EverstepRun:
    """The files of a finished run, parsed."""

    summary: dict[str, Any]
    journal: list[dict[str, Any]]
    steps: list[dict[str, Any]]


def everstep_command(config: Path, overrides: Sequence[str], run_dir: Path) -> list[str]:
    """The command line of `everstep run`."""
    arguments = [sys.executable, "-c", _EVERSTEP, "run", str(config), "--run-dir", str(run_dir)]
    for override in overrides:
        arguments += ["--set", override]
    return arguments


def run_everstep(
    config: Path,
    overrides: Sequence[str],
    faults: list[dict[str, Any]],
    run_dir: Path,
    limit_seconds: float = math.inf,
) -> EverstepRun:
    """Run `everstep run` to its end. Faults are written as the faults file has them.

    Raises:
        RefusedError: it cannot carry out the configuration or the faults.
        BenchmarkError: the run failed, took longer than `limit_seconds`, or did not complete.
    """
    run_dir.mkdir(parents=True)
    arguments = everstep_command(config, overrides, run_dir)
    if faults:
        faults_file = run_dir.with_suffix(".faults.yaml")
        # JSON is YAML.
        faults_file.write_text(json.dumps(faults))
        arguments += ["--faults", str(faults_file)]
    log, steps_file = run_dir.with_suffix(".log"), run_dir / "steps.jsonl"
    with command(arguments, log) as process:
        try:
            wait_for(
                process,
                log,
                lambda: f"everstep: {line_count(steps_file)} steps committed",
                limit_seconds,
            )
        except BenchmarkError as error:
            if process.returncode == REFUSED:
                raise RefusedError(log_tail(log)) from error
            raise
    summary = json.loads((run_dir / "summary.json").read_text())
    if summary["outcome"] != "completed":
        raise BenchmarkError(f"everstep ended as {summary['outcome']}:\n{log_tail(log)}")
    return EverstepRun(summary, read_lines(run_dir / "journal.jsonl"), read_lines(steps_file))


def line_count(file: Path) -> int:
    """Lines of a file; 0 if it is not there yet."""
    return file.read_bytes().count(b"\n") if file.exists() else 0


def read_lines(file: Path) -> list[dict[str, Any]]:
    """The objects of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text().splitlines()]
