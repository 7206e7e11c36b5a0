"""The one owner of torch process groups.

Modules hold proxies (`ntp.stable_group`). `ProcessGroups` is the only holder of the communicators
that serve them, which matters because a forgotten reference keeps sockets open and with them every
peer that waits on the other end. ``sever`` may be called from any thread.

Communicators are created directly, without torch's default group: only members take part, under a
store prefix that carries the generation, in one order on all ranks, with an explicit timeout.
"""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from time import monotonic

import torch.distributed as dist

from ntp.groups import GroupAxis, GroupSpec
from ntp.stable_group import Communicator, GroupSevered, StableGroup, Unwatched, Waits

GroupKey = tuple[GroupAxis, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Link:
    """How communicators are made. ``host`` is this worker's address; timeouts in seconds."""

    backend: str
    host: str
    build_timeout_seconds: float
    operation_timeout_seconds: float


class ProcessGroups:
    """Owner of this worker's communicators and of the proxies that others hold.

    `meeting` is `world` unless a generation has donors; a donor is in no other group. `stage` is
    `world` where there is one pipeline stage, and `pipeline` is None there; `home` is None where
    this rank reduces its home atoms with nobody. `waits` is told of every wait for other ranks.
    """

    def __init__(self, link: Link, waits: Waits | None = None) -> None:
        self._link = link
        self._waits = waits or Unwatched()
        self._live: dict[GroupKey, Communicator] = {}
        self.world = StableGroup(GroupAxis.WORLD, waits)
        self.tensor = StableGroup(GroupAxis.TENSOR, waits)
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

    @property
    def unbroken(self) -> bool:
        """Whether there are communicators, and none of them was severed."""
        return bool(self._live) and not any(live.severed for live in self._live.values())

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
        *,
        unbroken: bool = False,
    ) -> None:
        """Serve `specs` from now on; communicators in `kept` go on, all others are made anew.

        `members` names the worker behind each rank; `specs` is the same sequence on all ranks, and
        ranks build their groups in its order. `unbroken`, also the same: all ranks had all of their
        communicators when they stopped. Then groups that only lost members are shrunk, where the
        backend can. Raises RuntimeError when a peer does not appear within the build timeout, and
        GroupSevered when a communicator that is to be kept or shrunk broke meanwhile.
        """
        mine = [spec for spec in specs if rank in spec.ranks]
        wanted = {
            (spec.axis, spec.index): tuple(members[rank] for rank in spec.ranks) for spec in mine
        }
        shrinks = {
            key
            for key, live in self._live.items()
            if unbroken and key not in kept and live.can_shrink_to(wanted.get(key, ()))
        }
        for key in self._live.keys() - kept - shrinks:
            self._live.pop(key).close()
        self.meeting, self.home = self.world, None
        for spec in mine:
            key = (spec.axis, spec.index)
            names = wanted[key]
            if key in kept:
                if not self.intact(key, names):
                    raise GroupSevered(f"the plan keeps the {key[0]} group, which broke meanwhile")
            else:
                place = "-".join(str(number) for number in spec.index)
                prefix = dist.PrefixStore(f"{generation}/{spec.axis}/{place}", store)
                self._waits.wait(monotonic())
                try:
                    if key in shrinks:
                        self._live[key] = self._live[key].shrunk_to(names)
                    else:
                        position = spec.ranks.index(rank)
                        self._live[key] = _connect(self._link, prefix, position, names)
                finally:
                    self._waits.resume(monotonic())
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
                self.meeting = StableGroup(GroupAxis.MEETING, self._waits)
                self.meeting.communicator = communicator
            case GroupAxis.STAGE:
                if self.stage is self.world:
                    self.stage = StableGroup(GroupAxis.STAGE, self._waits)
                self.stage.communicator = communicator
            case GroupAxis.TENSOR:
                self.tensor.communicator = communicator
            case GroupAxis.PIPELINE:
                self.pipeline = self.pipeline or StableGroup(GroupAxis.PIPELINE, self._waits)
                self.pipeline.communicator = communicator
            case GroupAxis.HOME:
                self.home = self.home or StableGroup(GroupAxis.HOME, self._waits)
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
