"""Runs the real command in its own session, and accounts for every process it starts.

Each launch carries a unique variable in its environment, which all its descendants inherit; whoever
still has it after the launcher is gone is a leak.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import select
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import yaml

IN_CREATE = 0x100
TOKEN = "EVERSTEP_TEST_TOKEN"
EVERSTEP = Path(sys.executable).with_name("everstep")

SMALL_JOB: dict[str, Any] = {
    "job": "chaos",
    "cluster": {"nodes": 2, "devices_per_node": 4},
    "parallel": {"tensor": 4, "replicas": 2},
    "model": {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 170,
        "vocab_size": 257,
    },
    "data": {"kind": "builtin_text"},
    "train": {
        "steps": 30,
        "global_batch_size": 8,
        "micro_batch_size": 2,
        "seq_length": 32,
        "dtype": "float64",
    },
    "health": {"quiesce_timeout_seconds": 20.0, "rebuild_timeout_seconds": 10.0},
}


ONE_PIECE = (
    "cluster.nodes=1",
    "cluster.devices_per_node=1",
    "parallel.tensor=1",
    "parallel.replicas=1",
    "parallel.pipeline=1",
    "parallel.sequence_parallel=false",
    "train.micro_batch_size=8",
)
"""For a calm run: one worker has the losses of any number, and is far quicker."""

LONGER = "train.steps=50"
"""For the small job with many failures."""

SHORT_QUARANTINE = ("health.quarantine_seconds=0.01", "health.quarantine_max_seconds=0.01")
"""For jobs whose devices fail again and again, and are to be used again."""


@dataclass(frozen=True, slots=True)
class Launch:
    """A launcher that runs, and the token its descendants carry."""

    process: subprocess.Popen[str]
    token: str

    @property
    def output(self) -> IO[str]:
        """Its standard output, line by line."""
        assert self.process.stdout is not None
        return self.process.stdout

    def descendants(self) -> list[int]:
        """Process ids of everybody that carries the token, without the launcher itself."""
        return [pid for pid in carriers(self.token) if pid != self.process.pid]

    def left_over(self) -> tuple[str, ...]:
        """Whoever carries the token now that all is over, as told by the kernel."""
        return tuple(map(_describe, self.descendants()))

    def worker(self, node: int, index: int) -> int:
        """Process id of the worker on a device, told by the log it writes to."""
        name = f"node{node}-{index}."
        for pid in self.descendants():
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/fd/1").readlink().name.startswith(name):
                    return pid
        raise AssertionError(f"no worker writes to {name}*.log")

    def wait_for_line(self, text: str) -> None:
        """Read output until a line contains `text`; fails when the output ends first."""
        seen = []
        for line in self.output:
            seen.append(line)
            if text in line:
                return
        raise AssertionError(f"no line with {text!r} in:\n{''.join(seen)}")


@contextlib.contextmanager
def launch(arguments: Sequence[str]) -> Iterator[Launch]:
    """Start ``everstep ARGUMENTS``; on leaving, kills whatever is left of it."""
    token = uuid.uuid4().hex
    process = subprocess.Popen(
        [str(EVERSTEP), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, TOKEN: token},
        start_new_session=True,
    )
    started = Launch(process, token)
    try:
        yield started
    finally:
        for pid in [process.pid, *started.descendants()]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        started.output.close()


def wait_for_file(path: Path) -> None:
    """Wait until a file exists, woken by the kernel for each change of the nearest directory."""
    libc = ctypes.CDLL(None, use_errno=True)
    while not path.exists():
        nearest = next(parent for parent in path.parents if parent.exists())
        descriptor = libc.inotify_init1(os.O_CLOEXEC)
        libc.inotify_add_watch(descriptor, os.fsencode(nearest), IN_CREATE)
        # Looked at again behind the watch: nothing can be made unseen from here on.
        now = next(parent for parent in path.parents if parent.exists())
        if nearest == now and not path.exists():
            os.read(descriptor, 4096)
        os.close(descriptor)


def carriers(token: str) -> list[int]:
    """Processes whose environment carries `token`."""
    found = []
    needle = f"{TOKEN}={token}".encode()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if needle in (entry / "environ").read_bytes():
                    found.append(int(entry.name))
    return found


def _describe(pid: int) -> str:
    """What a process is and does, as far as it lets that be told: it may be ending."""
    place, told = Path(f"/proc/{pid}"), [f"{pid}:"]
    with contextlib.suppress(OSError):
        told.append((place / "cmdline").read_text().replace("\0", " ").strip())
        told += re.findall(r"^(?:State|PPid|Threads):.*", (place / "status").read_text(), re.M)
        told.append(f"> {(place / 'fd' / '1').readlink()}")
    return " ".join(told)


def wait_until_gone(pids: Sequence[int], timeout_seconds: float) -> list[int]:
    """Wait for processes to end; returns those that did not within the time."""
    waiting: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            waiting[os.pidfd_open(pid)] = pid
    poll = select.poll()
    for descriptor in waiting:
        poll.register(descriptor, select.POLLIN)
    while waiting:
        ended = poll.poll(timeout_seconds * 1000)
        if not ended:
            break
        for descriptor, _ in ended:
            poll.unregister(descriptor)
            os.close(descriptor)
            del waiting[descriptor]
    left = list(waiting.values())
    for descriptor in waiting:
        os.close(descriptor)
    return left


@dataclass(frozen=True, slots=True)
class Run:
    """The files of a run that ended, and how it ended."""

    directory: Path
    exit_code: int
    output: str
    left_over: tuple[str, ...]

    @property
    def summary(self) -> dict[str, Any]:
        """summary.json."""
        loaded: dict[str, Any] = json.loads((self.directory / "summary.json").read_text())
        return loaded

    @property
    def steps(self) -> list[dict[str, Any]]:
        """steps.jsonl."""
        return _lines(self.directory / "steps.jsonl")

    @property
    def journal(self) -> list[dict[str, Any]]:
        """journal.jsonl."""
        return _lines(self.directory / "journal.jsonl")


def pause(step: int, seconds: float) -> dict[str, Any]:
    """A fault that holds the job up at a step, so that it is not over before something happens."""
    arguments = {"seconds": seconds}
    target = {"replica": 0, "slot": 0}
    return {"at_step": step, "kind": "slow", "target": target, "args": arguments}


def run_job(
    directory: Path, faults: Sequence[dict[str, Any]] = (), overrides: Sequence[str] = ()
) -> Run:
    """Run the small job to its end with the faults given; `directory` is made."""
    directory.mkdir(parents=True)
    config = directory / "job.yaml"
    config.write_text(yaml.safe_dump(SMALL_JOB))
    arguments = ["run", str(config), "--run-dir", str(directory / "run")]
    for override in overrides:
        arguments += ["--set", override]
    if faults:
        (directory / "faults.yaml").write_text(yaml.safe_dump(list(faults)))
        arguments += ["--faults", str(directory / "faults.yaml")]
    with launch(arguments) as started:
        output = started.output.read()
        exit_code = started.process.wait()
        left_over = started.left_over()
    return Run(directory / "run", exit_code, output, left_over)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]
