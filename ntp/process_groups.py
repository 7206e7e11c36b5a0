"""The one owner of torch process groups.

Modules, schedules and collectives hold *stable* groups: proxies that delegate to whatever
communicator currently serves their axis. A recovery replaces the communicators below and leaves the
proxies, so nothing in a model has to be rebuilt or told. `ProcessGroups` is the only holder of the
communicators themselves, which matters because a forgotten reference keeps sockets open and with
them every peer that waits on the other end.

How a blocked collective is ended depends on the backend. Gloo's own ``abort`` does not wake pending
operations, but shutting its connections down does, within milliseconds and on both ends; so the
owner duplicates the descriptors of the sockets that a communicator opened and ``sever`` shuts those
down. Duplicates, so that a descriptor number which gloo closed and the kernel reused is never hit.
NCCL communicators are aborted. ``sever`` may be called from any thread.

Communicators are created directly, without torch's default group: only members take part, under a
store prefix that carries the generation, in one order on all ranks, with an explicit timeout.

Small all-reduces over gloo do not use gloo's ring, whose 2(n-1) dependent rounds cost milliseconds
each on a busy host: the first rank adds what the others send it, in rank order, and returns the
sum.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ntp.groups import GroupAxis, GroupSpec

STAR_LIMIT_BYTES = 4 * 1024 * 1024
"""All-reduces over gloo go through the first rank while that receives at most this much;
`benchmarks/all_reduce.py` measures where the ring overtakes."""

STAR_TAG = 1 << 20
"""Tag of the star's messages; the exchanges of `ntp.exchange` stay below it."""

GroupKey = tuple[GroupAxis, tuple[int, ...]]


class GroupSevered(RuntimeError):
    """An operation was asked of a group that has no communicator at present."""


@dataclass(frozen=True, slots=True)
class Link:
    """How communicators are made. ``host`` is this worker's address; timeouts in seconds."""

    backend: str
    host: str
    build_timeout_seconds: float
    operation_timeout_seconds: float


class Communicator:
    """One live torch process group together with the means to end it from another thread."""

    def __init__(
        self,
        group: Any,
        sockets: Sequence[socket.socket],
        members: tuple[str, ...],
        timeout: timedelta,
    ):
        self.group = group
        self.members = members
        self.timeout = timeout
        self.severed = False
        self._sockets = list(sockets)

    def sever(self) -> None:
        """End operations with an error, here and on peers that wait for this rank. Idempotent."""
        self.severed = True
        # Another thread may be closing this communicator.
        group, sockets = self.group, self._sockets
        if group is not None and not isinstance(group, dist.ProcessGroupGloo):
            group.abort()
        for connection in sockets:
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                # The peer closed first: there is nothing left to wake.
                continue

    def close(self) -> None:
        """Sever, and let go of the group and its descriptors."""
        self.sever()
        self.group = None
        for connection in self._sockets:
            connection.close()
        self._sockets = []


class _Done:
    """Work that was finished when it was returned."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Always true."""
        return True


class _Bounded:
    """Gloo's work on a message, waited for as long as an operation may take.

    By itself it waits for as long as the group was given to build.
    """

    def __init__(self, work: Any, timeout: timedelta) -> None:
        self._work = work
        self._timeout = timeout

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until the message is sent or received."""
        return bool(self._work.wait(timeout or self._timeout))


class StableGroup(dist.ProcessGroup):
    """Proxy that outlives the communicators that serve it.

    ``torch.distributed.all_reduce(x, group=proxy)`` works; ``dist.get_rank(proxy)`` does not, use
    ``proxy.rank()``. Raises GroupSevered while no communicator is bound.
    """

    def __init__(self, axis: GroupAxis) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]  # torch also has this form
        self.axis = axis
        self.communicator: Communicator | None = None

    @property
    def inner(self) -> Any:
        """The process group that serves this proxy now."""
        if self.communicator is None or self.communicator.group is None:
            raise GroupSevered(f"the {self.axis} group has no communicator: its generation ended")
        return self.communicator.group

    def rank(self) -> int:
        """This process's rank in the group."""
        return int(self.inner.rank())

    def size(self) -> int:
        """Number of ranks."""
        return int(self.inner.size())

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        """Name of the backend that serves the group."""
        return str(self.inner.name())

    def allreduce(self, tensors: Any, opts: Any = None) -> Any:  # type: ignore[override]
        """Reduce in place over the group; small tensors over gloo take the star (see module)."""
        inner = self.inner
        opts = opts if opts is not None else dist.AllreduceOptions()
        tensor = tensors[0] if isinstance(tensors, (list, tuple)) else tensors
        small = tensor.numel() * tensor.element_size() * (inner.size() - 1) <= STAR_LIMIT_BYTES
        if isinstance(inner, dist.ProcessGroupGloo) and small and tensor.is_contiguous():
            _star_all_reduce(self, tensor, opts.reduceOp)
            return _Done()
        return inner.allreduce([tensor], opts)

    def broadcast(self, tensors: Any, *args: Any) -> Any:
        """Delegate."""
        return self.inner.broadcast(tensors, *args)

    def allgather(self, *args: Any) -> Any:
        """Delegate."""
        return self.inner.allgather(*args)

    # torch 2.13's names for collectives on single tensors.

    def all_gather_single(self, *args: Any) -> Any:
        """Delegate."""
        return self.inner._allgather_base(*args)

    def reduce_scatter(self, *args: Any) -> Any:
        """Delegate."""
        return self.inner.reduce_scatter(*args)

    def reduce_scatter_single(self, *args: Any) -> Any:
        """Delegate."""
        return self.inner._reduce_scatter_base(*args)

    def all_to_all_single(self, *args: Any) -> Any:
        """Delegate."""
        return self.inner.alltoall_base(*args)

    def send(self, tensors: Any, rank: int, tag: int) -> Any:
        """Delegate; over gloo the work's wait has the timeout of operations."""
        return self._bounded(self.inner.send(tensors, rank, tag))

    def recv(self, tensors: Any, rank: int, tag: int) -> Any:
        """Delegate; over gloo the work's wait has the timeout of operations."""
        return self._bounded(self.inner.recv(tensors, rank, tag))

    def _bounded(self, work: Any) -> Any:
        communicator = self.communicator
        if communicator is None or not isinstance(communicator.group, dist.ProcessGroupGloo):
            return work
        return _Bounded(work, communicator.timeout)

    def _start_coalescing(self, device: torch.device) -> None:
        self.inner._start_coalescing(device)

    def _end_coalescing(self, device: torch.device) -> Any:
        return self.inner._end_coalescing(device)

    def barrier(self, opts: Any = None) -> Any:
        """Delegate."""
        return self.inner.barrier(opts if opts is not None else dist.BarrierOptions())


def _star_all_reduce(group: Any, tensor: torch.Tensor, operation: Any) -> None:
    """All-reduce through rank 0, which combines contributions in rank order."""
    size, rank = group.size(), group.rank()
    if size == 1:
        return
    if rank:
        given = group.send([tensor], 0, STAR_TAG)
        # The sum comes when all of the part has left, so it may take its place. A wait for the part
        # would not notice that the first rank was lost in the middle of it.
        group.recv([tensor], 0, STAR_TAG + 1).wait()
        given.wait()
        return
    received = [torch.empty_like(tensor) for _ in range(size - 1)]
    pending = [group.recv([buffer], peer + 1, STAR_TAG) for peer, buffer in enumerate(received)]
    for work, buffer in zip(pending, received, strict=True):
        work.wait()
        if operation == dist.ReduceOp.MAX:
            torch.maximum(tensor, buffer, out=tensor)
        else:
            assert operation == dist.ReduceOp.SUM, operation
            tensor += buffer
    for work in [group.send([tensor], peer, STAR_TAG + 1) for peer in range(1, size)]:
        work.wait()


class ProcessGroups:
    """Owner of this worker's communicators and of the proxies that others hold.

    `meeting` is `world` unless a generation has donors; a donor is in no other group. `stage` is
    `world` where there is one pipeline stage, and `pipeline` is None there; `home` is None where
    this rank reduces its home atoms with nobody.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._live: dict[GroupKey, Communicator] = {}
        self.world = StableGroup(GroupAxis.WORLD)
        self.tensor = StableGroup(GroupAxis.TENSOR)
        self.meeting = self.world
        self.stage = self.world
        self.pipeline: StableGroup | None = None
        self.home: StableGroup | None = None

    @property
    def build_timeout_seconds(self) -> float:
        """How long the members of a new group may take to appear."""
        return self._link.build_timeout_seconds

    def intact(self, key: GroupKey, members: tuple[str, ...]) -> bool:
        """Whether `key` is served by an unsevered communicator of exactly `members`."""
        live = self._live.get(key)
        return live is not None and not live.severed and live.members == members

    def sever(self, *, keep: frozenset[GroupKey] = frozenset()) -> None:
        """End every operation on the groups not in `keep`. May be called from any thread."""
        for key, communicator in list(self._live.items()):
            if key not in keep:
                communicator.sever()

    def adopt(
        self,
        specs: Sequence[GroupSpec],
        members: Sequence[str],
        rank: int,
        generation: int,
        store: dist.Store,
        kept: frozenset[GroupKey],
    ) -> None:
        """Serve `specs` from now on; communicators in `kept` go on, all others are made anew.

        `members` names the worker behind each rank; `specs` is the same sequence on all ranks, and
        ranks build their groups in its order. Raises RuntimeError when a peer does not appear
        within the build timeout, and GroupSevered when a kept communicator broke meanwhile.
        """
        mine = [spec for spec in specs if rank in spec.ranks]
        for key in [key for key in self._live if key not in kept]:
            self._live.pop(key).close()
        self.meeting, self.home = self.world, None
        for spec in mine:
            key = (spec.axis, spec.index)
            names = tuple(members[r] for r in spec.ranks)
            if key in kept:
                if not self.intact(key, names):
                    raise GroupSevered(f"the plan keeps the {key[0]} group, which broke meanwhile")
            else:
                place = "-".join(str(number) for number in spec.index)
                prefix = dist.PrefixStore(f"{generation}/{spec.axis}/{place}", store)
                self._live[key] = _connect(self._link, prefix, spec.ranks.index(rank), names)
            self._bind(spec.axis, self._live[key])

    def close(self) -> None:
        """Let every communicator go."""
        for key in list(self._live):
            self._live.pop(key).close()

    def _bind(self, axis: GroupAxis, communicator: Communicator) -> None:
        match axis:
            case GroupAxis.WORLD:
                self.world.communicator = communicator
            case GroupAxis.MEETING:
                self.meeting = StableGroup(GroupAxis.MEETING)
                self.meeting.communicator = communicator
            case GroupAxis.STAGE:
                if self.stage is self.world:
                    self.stage = StableGroup(GroupAxis.STAGE)
                self.stage.communicator = communicator
            case GroupAxis.TENSOR:
                self.tensor.communicator = communicator
            case GroupAxis.PIPELINE:
                self.pipeline = self.pipeline or StableGroup(GroupAxis.PIPELINE)
                self.pipeline.communicator = communicator
            case GroupAxis.HOME:
                self.home = self.home or StableGroup(GroupAxis.HOME)
                self.home.communicator = communicator


def _connect(link: Link, store: dist.Store, rank: int, members: tuple[str, ...]) -> Communicator:
    build = timedelta(seconds=link.build_timeout_seconds)
    operation = timedelta(seconds=link.operation_timeout_seconds)
    if link.backend == "nccl":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = operation
        nccl = dist.ProcessGroupNCCL(store, rank, len(members), options)
        return Communicator(nccl, (), members, operation)
    store.set_timeout(build)
    before = _socket_descriptors()
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    # The constructor waits for its peers under this timeout; operations get their own below.
    options._timeout = build
    options._threads = 1
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=link.host)]
    group = dist.ProcessGroupGloo(store, rank, len(members), options)
    group._set_default_timeout(operation)
    sockets = _connections(_socket_descriptors() - before)
    return Communicator(group, sockets, members, operation)


def _socket_descriptors() -> set[int]:
    found = set()
    for entry in Path("/proc/self/fd").iterdir():
        try:
            if stat.S_ISSOCK(os.fstat(int(entry.name)).st_mode):
                found.add(int(entry.name))
        except OSError:
            # The descriptor of the listing itself, or one closed meanwhile.
            continue
    return found


def _connections(descriptors: set[int]) -> list[socket.socket]:
    """Duplicates of the connected sockets among `descriptors`; gloo's listener is left alone."""
    connected = []
    for descriptor in sorted(descriptors):
        duplicate = socket.socket(fileno=os.dup(descriptor))
        try:
            duplicate.getpeername()
        except OSError:
            duplicate.close()
            continue
        connected.append(duplicate)
    return connected


def connection_error(error: BaseException | None) -> BaseException | None:
    """What in `error` says that a peer or a communicator is gone; None if code is wrong.

    torch raises plain RuntimeErrors for gloo, so its text is all there is to go by. Its wrapper
    around collectives fails in turn while it describes an error of a group that it did not make,
    so the error that was being handled counts too.
    """
    signs = ("gloo", "Connection closed", "Connection reset", "timed out", "Timed out")
    while error is not None:
        if isinstance(error, (GroupSevered, dist.DistError)):
            return error
        if isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs):
            return error
        error = error.__cause__ or error.__context__
    return None


def is_connection_error(error: BaseException | None) -> bool:
    """Whether `error` says that a peer or a communicator is gone, rather than that code is wrong.

    See `connection_error`.
    """
    return connection_error(error) is not None
