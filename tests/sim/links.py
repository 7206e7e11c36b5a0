"""Simulated communicators: collectives that may reach some members and not others.

Two shapes, because they break differently. In a *mesh* any member may get a result first and every
member notices a broken peer. In a *star* (small all-reduces over gloo) the first rank combines: it
alone notices the others, and the others only notice it. A member that severs its end, or dies, cuts
the communicator; whoever waits for it gets Broken, unless the result was faster. Where the network
is cut, neither the result nor the news of a broken peer gets through: the wait hangs until the
network heals or its timeout is over. A result may also get lost for one member, who waits on while
others may go on to the next collective, and wait there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from clock import Clock
from network import WAIT_SECONDS, Network
from sim_process import Wait, Waiter

from elastic.topology import Member


class Broken(RuntimeError):
    """A connection to a peer is gone, or a peer never appeared."""


class StepAborted(RuntimeError):
    """The step in flight was given up because a new generation was announced."""


class Comm:
    """One communicator of one generation, made in the store at `rendezvous`.

    Inside, members are numbers: their positions, as ranks are.
    """

    def __init__(
        self,
        clock: Clock,
        network: Network,
        members: tuple[Member, ...],
        rendezvous: str,
        star: bool,
    ) -> None:
        self.members = members
        self._clock = clock
        self._network = network
        self._rendezvous = rendezvous
        self._star = star
        self._ranks = {member: rank for rank, member in enumerate(members)}
        self._severed: set[int] = set()
        self._cut: set[int] = set()
        self._count = [0] * len(members)
        self._given: dict[int, dict[int, Any]] = {}
        self._waiting: dict[int, tuple[Waiter, int, int]] = {}
        self._arrived: set[int] = set()
        self._posted: dict[int, Any] = {}
        self._receiving: dict[int, tuple[Waiter, int, frozenset[int]]] = {}
        self._since: dict[int, float] = {}
        self._losing: dict[int, Callable[[], float]] = {}

    def intact(self, member: Member, members: Sequence[Member]) -> bool:
        """What the member itself believes: it did not sever its end."""
        return self.members == tuple(members) and self._ranks[member] not in self._severed

    # As waits of a member's task.

    def build(self, member: Member, timeout: float) -> Wait:
        """Wait until every member came; the result is this communicator."""
        return lambda task: self._build(self._ranks[member], task, timeout)

    def join(self, member: Member, value: Any = None) -> Wait:
        """Contribute to the next collective; the result is what all members gave."""
        return lambda task: self._join(self._ranks[member], task, value)

    def exchange(self, member: Member, letters: Any, sources: frozenset[Member]) -> Wait:
        """Post letters; the result is what each of `sources` posted, once all of them did."""
        return lambda task: self._exchange(self._ranks[member], task, letters, sources)

    def waits_since(self, member: Member) -> float | None:
        """When the member's wait in this communicator began; None: it does not wait here."""
        me = self._ranks[member]
        return self._since[me] if me in self._waiting or me in self._receiving else None

    def lose(self, member: Member, lost: Callable[[], float]) -> None:
        """The next result does not reach the member; `lost` is told, and says for how long."""
        self._losing[self._ranks[member]] = lost

    def sever(self, member: Member) -> None:
        """The member ends this communicator on its side."""
        me = self._ranks[member]
        self._severed.add(me)
        self.cut(member)
        for waiting in (self._waiting, self._receiving):
            if me in waiting:
                self._fail_soon(me, waiting[me][1], "severed here")

    def cut(self, member: Member) -> None:
        """The member's connections are gone: it died, or severed them."""
        gone = self._ranks.get(member)
        if gone is None or gone in self._cut:
            return
        self._cut.add(gone)
        for peer, (_, token, index) in list(self._waiting.items()):
            # A peer that is not there yet is missed by timeout only.
            if peer != gone and index >= 0 and self._notices(peer, gone):
                self._fail_soon(peer, token, f"lost {member}", gone)
        for peer, (_, token, sources) in list(self._receiving.items()):
            if gone in sources and gone not in self._posted:
                self._fail_soon(peer, token, f"lost {member}", gone)

    def _notices(self, peer: int, gone: int) -> bool:
        return not self._star or peer == 0 or gone == 0

    def _build(self, me: int, task: Waiter, timeout: float) -> None:
        self._arrived.add(me)
        self._waiting[me] = (task, task.token, -1)
        self._since[me] = self._clock.now
        self._clock.after(timeout, self._fail, me, task.token, "never appeared")
        if len(self._arrived) == len(self.members):
            for each, (_, token, _) in list(self._waiting.items()):
                self._clock.after(self._clock.delay(), self._built, each, token)

    def _built(self, rank: int, token: int) -> None:
        if self._network.meets(self._rendezvous, self.members):
            self._finish(rank, token, self, range(len(self.members)))

    def _join(self, me: int, task: Waiter, value: Any) -> None:
        token = task.token
        index = self._count[me]
        self._count[me] += 1
        self._waiting[me] = (task, token, index)
        self._since[me] = self._clock.now
        if me in self._severed:
            self._fail_soon(me, token, "severed here")
            return
        given = self._given.setdefault(index, {})
        given[me] = value
        if self._star and me != 0 and 0 in self._cut:
            self._fail_soon(me, token, "the first rank is gone", 0)
        elif len(given) == len(self.members):
            for rank in (0,) if self._star else range(len(self.members)):
                if rank in self._waiting:
                    wait = self._waiting[rank][1]
                    self._clock.after(self._clock.delay(), self._result, rank, wait, index)
        else:
            for gone in self._cut:
                if gone not in given and self._notices(me, gone):
                    self._fail_soon(me, token, "a peer is gone", gone)
                    break

    def _result(self, rank: int, token: int, index: int) -> None:
        if not self._is_waiting(rank, token) or self._is_lost(rank, token):
            return
        if not self._reaches(range(len(self.members)), rank):
            self._hang(rank, token, self._result, rank, token, index)
            return
        given = list(self._given[index].values())
        if self._star and rank == 0:
            for other in range(1, len(self.members)):
                if other in self._waiting and self._waiting[other][2] == index:
                    wait = self._waiting[other][1]
                    self._clock.after(self._clock.delay(), self._finish, other, wait, given, (0,))
        self._pop(rank).advance(token, given)

    def _exchange(self, me: int, task: Waiter, letters: Any, sources: frozenset[Member]) -> None:
        token = task.token
        wanted = frozenset(self._ranks[source] for source in sources)
        self._receiving[me] = (task, token, wanted)
        self._since[me] = self._clock.now
        if me in self._severed:
            self._fail_soon(me, token, "severed here")
            return
        self._posted[me] = letters
        for peer, (_, wait, needed) in list(self._receiving.items()):
            if needed <= self._posted.keys() and (peer == me or me in needed):
                received = [self._posted[source] for source in needed]
                delay = self._clock.delay()
                self._clock.after(delay, self._finish, peer, wait, received, needed)
        for gone in self._cut & wanted:
            if gone not in self._posted:
                self._fail_soon(me, token, "a sender is gone", gone)
                break

    def _reaches(self, sources: Iterable[int], target: int) -> bool:
        return self._network.is_whole or self._network.reaches(
            [self.members[source] for source in sources], self.members[target]
        )

    def _is_waiting(self, rank: int, token: int) -> bool:
        found = self._waiting.get(rank) or self._receiving.get(rank)
        return found is not None and found[1] == token

    def _finish(self, rank: int, token: int, value: Any, sources: Iterable[int]) -> None:
        """The wait succeeds, if the words of `sources` arrive."""
        if not self._is_waiting(rank, token) or self._is_lost(rank, token):
            return
        if self._reaches(sources, rank):
            self._pop(rank).advance(token, value)
        else:
            self._hang(rank, token, self._finish, rank, token, value, sources)

    def _is_lost(self, rank: int, token: int) -> bool:
        lost = self._losing.pop(rank, None)
        if lost is not None:
            self._clock.after(lost(), self._fail, rank, token, "timed out")
        return lost is not None

    def _fail_soon(self, rank: int, token: int, detail: str, source: int | None = None) -> None:
        self._clock.after(self._clock.delay(), self._fail, rank, token, detail, source)

    def _fail(self, rank: int, token: int, detail: str, source: int | None = None) -> None:
        """The wait fails, if the news of `source` arrives."""
        if not self._is_waiting(rank, token):
            return
        if source is None or self._reaches((source,), rank):
            self._pop(rank).advance(token, error=Broken(detail))
        else:
            self._hang(rank, token, self._fail, rank, token, detail, source)

    def _hang(self, rank: int, token: int, action: Callable[..., None], *arguments: Any) -> None:
        self._network.when_healed(action, *arguments)
        self._clock.after(WAIT_SECONDS, self._fail, rank, token, "timed out")

    def _pop(self, rank: int) -> Waiter:
        found = self._waiting.pop(rank, None) or self._receiving.pop(rank)
        return found[0]
