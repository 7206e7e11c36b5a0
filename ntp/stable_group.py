"""The groups that modules, schedules and collectives hold, and what serves them at present.

A `StableGroup` delegates to whatever communicator currently serves its axis. A recovery replaces
the communicator and leaves the proxy, so nothing in a model has to be rebuilt or told. It also
tells whoever wants to know when this process waits for other ranks, since one that waits is held up
by somebody else.

How a blocked collective is ended depends on the backend. Gloo's own ``abort`` does not wake pending
operations, but shutting its connections down does, within milliseconds and on both ends; so a
communicator holds duplicates of the descriptors of its sockets, and ``sever`` shuts those down.
Duplicates, so that a descriptor number which gloo closed and the kernel reused is never hit. NCCL
communicators are aborted; one that nobody had to abort may be shrunk to some of its members, by all
of these together: one that connected anew instead would wait for the others in vain.

Small all-reduces over gloo do not use gloo's ring, but `ntp.star`.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from datetime import timedelta
from time import monotonic
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ntp.groups import GroupAxis
from ntp.star import star_all_reduce

STAR_LIMIT_BYTES = 4 * 1024 * 1024
"""All-reduces over gloo go through the first rank while that receives at most this much;
`benchmarks/all_reduce.py` measures where the ring overtakes."""


class GroupSevered(RuntimeError):
    """An operation was asked of a group that has no communicator at present."""


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
        self.unanswered: list[Any] = []
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

    def can_shrink_to(self, members: tuple[str, ...]) -> bool:
        """Whether the backend makes communicators of `members` out of such ones as this.

        All members say the same, whatever happened to their ends of it.
        """
        stay = tuple(member for member in self.members if member in members)
        fewer = 0 < len(members) < len(self.members) and stay == members
        return fewer and bool(getattr(self.group, "supports_shrinking", False))

    def shrunk_to(self, members: tuple[str, ...]) -> Communicator:
        """The communicator of `members`, all of whom call this; this one is closed.

        Raises GroupSevered where this end was severed, and RuntimeError when a peer is gone.
        """
        if self.severed:
            raise GroupSevered("the plan shrinks a group that broke meanwhile")
        leave = [rank for rank, member in enumerate(self.members) if member not in members]
        try:
            smaller = self.group.shrink(leave, distributed_c10d.SHRINK_DEFAULT, None)
        finally:
            self.close()
        return Communicator(smaller, (), members, self.timeout)

    def close(self) -> None:
        """Sever, and let go of the group and its descriptors."""
        self.sever()
        self.group = None
        self.unanswered.clear()
        for connection in self._sockets:
            connection.close()
        self._sockets = []


class Waits(Protocol):
    """Who is told when this process waits for others, and when it goes on.

    `now` is a reading of the monotonic clock, in seconds. No wait is within another. A step waits
    dozens of times, so whoever keeps the account is told directly.
    """

    def wait(self, now: float, /) -> None:
        """A wait begins."""

    def resume(self, now: float, /) -> None:
        """It is over."""


class Unwatched:
    """Nobody wants to know."""

    def wait(self, now: float) -> None:
        """A wait begins."""

    def resume(self, now: float) -> None:
        """It is over."""


class _Done:
    """Work that was finished when it was returned."""

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return at once."""
        return True

    def is_completed(self) -> bool:
        """Always true."""
        return True


class _Watched:
    """Work whose wait is told to `waits`.

    `timeout` bounds the wait for one of gloo's messages, which by itself lasts as long as the group
    was given to build; None leaves it to the backend.
    """

    def __init__(self, work: Any, waits: Waits, timeout: timedelta | None = None) -> None:
        self._work = work
        self._waits = waits
        self._timeout = timeout

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Wait until the work is done."""
        limit = timeout or self._timeout
        self._waits.wait(monotonic())
        try:
            return bool(self._work.wait(limit) if limit is not None else self._work.wait())
        finally:
            self._waits.resume(monotonic())

    def is_completed(self) -> bool:
        """Whether a wait would return at once."""
        return bool(self._work.is_completed())


class StableGroup(dist.ProcessGroup):
    """Proxy that outlives the communicators that serve it.

    ``torch.distributed.all_reduce(x, group=proxy)`` works; ``dist.get_rank(proxy)`` does not, use
    ``proxy.rank()``. Raises GroupSevered while no communicator is bound.
    """

    def __init__(self, axis: GroupAxis, waits: Waits | None = None) -> None:
        super().__init__(0, 1)  # type: ignore[call-arg]  # torch also has this form
        self.axis = axis
        self._waits = waits or Unwatched()
        self.communicator: Communicator | None = None

    @property
    def inner(self) -> Any:
        """The process group that serves this proxy now."""
        return self._serving.group

    @property
    def _serving(self) -> Communicator:
        communicator = self.communicator
        if communicator is None or communicator.group is None:
            raise GroupSevered(f"the {self.axis} group has no communicator: its generation ended")
        return communicator

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
        communicator = self._serving
        inner: Any = communicator.group
        opts = opts if opts is not None else dist.AllreduceOptions()
        tensor = tensors[0] if isinstance(tensors, (list, tuple)) else tensors
        small = tensor.numel() * tensor.element_size() * (inner.size() - 1) <= STAR_LIMIT_BYTES
        if small and isinstance(inner, dist.ProcessGroupGloo) and tensor.is_contiguous():
            # One wait for all of its messages: a step has a dozen of these and more.
            self._waits.wait(monotonic())
            try:
                star_all_reduce(
                    inner, tensor, opts.reduceOp, communicator.timeout, communicator.unanswered
                )
            finally:
                self._waits.resume(monotonic())
            return _Done()
        return self._watched(inner.allreduce([tensor], opts))

    def broadcast(self, tensors: Any, *args: Any) -> Any:
        """Delegate."""
        return self._watched(self.inner.broadcast(tensors, *args))

    def allgather(self, *args: Any) -> Any:
        """Delegate."""
        return self._watched(self.inner.allgather(*args))

    # torch 2.13's names for collectives on single tensors.

    def all_gather_single(self, *args: Any) -> Any:
        """Delegate."""
        return self._watched(self.inner._allgather_base(*args))

    def reduce_scatter(self, *args: Any) -> Any:
        """Delegate."""
        return self._watched(self.inner.reduce_scatter(*args))

    def reduce_scatter_single(self, *args: Any) -> Any:
        """Delegate."""
        return self._watched(self.inner._reduce_scatter_base(*args))

    def all_to_all_single(self, *args: Any) -> Any:
        """Delegate."""
        return self._watched(self.inner.alltoall_base(*args))

    def send(self, tensors: Any, rank: int, tag: int) -> Any:
        """Delegate; over gloo the work's wait has the timeout of operations."""
        return self._bounded(self.inner.send(tensors, rank, tag))

    def recv(self, tensors: Any, rank: int, tag: int) -> Any:
        """Delegate; over gloo the work's wait has the timeout of operations."""
        return self._bounded(self.inner.recv(tensors, rank, tag))

    def _watched(self, work: Any) -> Any:
        return _Watched(work, self._waits)

    def _bounded(self, work: Any) -> Any:
        communicator = self.communicator
        if communicator is None or not isinstance(communicator.group, dist.ProcessGroupGloo):
            return self._watched(work)
        return _Watched(work, self._waits, communicator.timeout)

    def _start_coalescing(self, device: torch.device) -> None:
        self.inner._start_coalescing(device)

    def _end_coalescing(self, device: torch.device) -> Any:
        return self._watched(self.inner._end_coalescing(device))

    def barrier(self, opts: Any = None) -> Any:
        """Delegate."""
        opts = opts if opts is not None else dist.BarrierOptions()
        return self._watched(self.inner.barrier(opts))
