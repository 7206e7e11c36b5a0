"""The probe tells a stopped process from any other, whatever its name is."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from health.events import DeviceId
from health.probes.process import error_file, is_stopped, read_exit


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits for its input to end."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_is_stopped_from_sigstop_to_sigcont(sleeper: subprocess.Popen[bytes]) -> None:
    assert not is_stopped(sleeper.pid)
    sleeper.send_signal(signal.SIGSTOP)
    os.waitpid(sleeper.pid, os.WUNTRACED)
    assert is_stopped(sleeper.pid)
    sleeper.send_signal(signal.SIGCONT)
    os.waitpid(sleeper.pid, os.WCONTINUED)
    assert not is_stopped(sleeper.pid)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_that_ended_is_not_stopped(sleeper: subprocess.Popen[bytes]) -> None:
    sleeper.kill()
    # Leaves it a zombie.
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    assert not is_stopped(sleeper.pid)
    sleeper.wait()
    assert not is_stopped(sleeper.pid)


@pytest.mark.parametrize("name", ["cat", "a b", "a) T (b", ") T 1", ""])
@pytest.mark.parametrize(
    ("state", "stopped"),
    [("T", True), ("t", True), ("R", False), ("S", False), ("D", False), ("Z", False)],
)
def test_the_name_of_the_program_may_contain_anything(
    tmp_path: Path, name: str, state: str, stopped: bool
) -> None:
    stat = tmp_path / "7" / "stat"
    stat.parent.mkdir()
    stat.write_text(f"7 ({name}) {state} 1 7 7 0 -1\n")
    assert is_stopped(7, tmp_path) is stopped


@pytest.mark.parametrize("content", ["", "7 (cat)"])
def test_what_cannot_be_read_is_not_stopped(tmp_path: Path, content: str) -> None:
    assert not is_stopped(7, tmp_path)
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "stat").write_text(content)
    assert not is_stopped(7, tmp_path)


DEVICE = DeviceId(0, 1)


def test_an_exit_is_read_with_the_end_of_the_log(tmp_path: Path) -> None:
    log = tmp_path / "node0-1.1.log"
    assert read_exit(DEVICE, 1, 1, log).last_words == ""
    log.write_text("first\nlast\n")
    assert read_exit(DEVICE, 1, 1, log).last_words == "last"
    assert read_exit(DEVICE, 1, -9, log).last_words == "", "a killed process says nothing of it"


@pytest.mark.parametrize(
    ("record", "raised"),
    [
        ('{"message": {"message": "ValueError: x", "extraInfo": {}}}', "ValueError: x"),
        ('{"message": {"message": "ValueE', ""),
        ('{"message": "of an older format"}', ""),
        ("[]", ""),
        ("", ""),
    ],
)
def test_what_a_worker_raised_is_read_from_its_error_file(
    tmp_path: Path, record: str, raised: str
) -> None:
    log = tmp_path / "node0-1.1.log"
    error_file(log).write_text(record)
    assert read_exit(DEVICE, 1, 1, log).raised == raised
