"""Simulated communicators: collectives that may reach some members and not others.

Two shapes, because they break differently. In a *mesh* any member may get a result first and every
member notices a broken peer. In a *star* (small all-reduces over gloo) the first rank combines: it
alone notices the others, and the others only notice it. A member that severs its end, or dies, cuts
the communicator; whoever waits for it gets Broken, unless the result was faster. Where the network
is cut, neither the result nor the news of a broken peer gets through: the wait hangs until the
network heals or its timeout is over.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

from clock import Clock
from network import WAIT_SECONDS, Network
from sim_process import Wait

from elastic.topology import Member


class Broken(RuntimeError):
    """A connection to a peer is gone, or a peer never appeared."""


class Comm:
    """One communicator of one generation, made in the store at `rendezvous`."""

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
        self._severed: set[Member] = set()
        self._cut: set[Member] = set()
        self._count = dict.fromkeys(members, 0)
        self._given: dict[int, dict[Member, Any]] = {}
        self._waiting: dict[Member, tuple[Any, int, int]] = {}
        self._arrived: set[Member] = set()
        self._posted: dict[Member, Any] = {}
        self._receiving: dict[Member, tuple[Any, int, frozenset[Member]]] = {}

    def intact(self, member: Member, members: Sequence[Member]) -> bool:
        """What the member itself believes: it did not sever its end."""
        return member not in self._severed and self.members == tuple(members)

    def build(self, timeout: float) -> Wait:
        """Wait until every member came; the result is this communicator."""
        return lambda waiter: self._build(waiter, timeout)

    def join(self, value: Any) -> Wait:
        """Contribute to the next collective; the result is what all members gave, by member."""
        return lambda waiter: self._join(waiter, value)

    def exchange(self, letters: dict[Any, Any], sources: frozenset[Member]) -> Wait:
        """Post letters; the result is what `sources` posted, once all of them did."""
        return lambda waiter: self._exchange(waiter, letters, sources)

    def sever(self, member: Member) -> None:
        """The member ends this communicator on its side."""
        self._severed.add(member)
        self.cut(member)
        for waiting in (self._waiting, self._receiving):
            if member in waiting:
                self._fail_soon(member, waiting[member][1], "severed here")

    def cut(self, member: Member) -> None:
        """The member's connections are gone: it died, or severed them."""
        if member in self._cut:
            return
        self._cut.add(member)
        for peer, (_, token, index) in list(self._waiting.items()):
            # A peer that is not there yet is missed by timeout only.
            if peer != member and index >= 0 and self._notices(peer, member):
                self._fail_soon(peer, token, f"lost {member}", member)
        for peer, (_, token, sources) in list(self._receiving.items()):
            if member in sources and member not in self._posted:
                self._fail_soon(peer, token, f"lost {member}", member)

    def _notices(self, peer: Member, member: Member) -> bool:
        return not self._star or self.members[0] in (peer, member)

    def _build(self, waiter: Any, timeout: float) -> None:
        self._arrived.add(waiter.member)
        self._waiting[waiter.member] = (waiter, waiter.token, -1)
        self._clock.after(timeout, self._fail, waiter.member, waiter.token, "never appeared")
        if len(self._arrived) == len(self.members):
            for member in list(self._waiting):
                self._clock.after(
                    self._clock.delay(), self._built, member, self._waiting[member][1]
                )

    def _built(self, member: Member, token: int) -> None:
        if self._network.meets(self._rendezvous, self.members):
            self._finish(member, token, self, self.members)

    def _join(self, waiter: Any, value: Any) -> None:
        me, token = waiter.member, waiter.token
        index = self._count[me]
        self._count[me] += 1
        self._waiting[me] = (waiter, token, index)
        if me in self._severed:
            self._fail_soon(me, token, "severed here")
            return
        given = self._given.setdefault(index, {})
        given[me] = value
        root = self.members[0]
        if self._star and me != root and root in self._cut:
            self._fail_soon(me, token, "the first rank is gone", root)
        elif len(given) == len(self.members):
            for member in self.members[:1] if self._star else self.members:
                if member in self._waiting:
                    wait = self._waiting[member][1]
                    self._clock.after(self._clock.delay(), self._result, member, wait, index)
        elif self._cut:
            for gone in self._cut:
                if gone not in given and self._notices(me, gone):
                    self._fail_soon(me, token, "a peer is gone", gone)
                    break

    def _result(self, member: Member, token: int, index: int) -> None:
        if not self._is_waiting(member, token):
            return
        if not self._network.reaches(self.members, member):
            self._hang(member, token, self._result, member, token, index)
            return
        given = self._given[index]
        if self._star and member == self.members[0]:
            for other in self.members[1:]:
                if other in self._waiting and self._waiting[other][2] == index:
                    wait = self._waiting[other][1]
                    self._clock.after(
                        self._clock.delay(), self._finish, other, wait, given, (member,)
                    )
        self._pop(member).advance(token, given)

    def _exchange(self, waiter: Any, letters: dict[Any, Any], sources: frozenset[Member]) -> None:
        me, token = waiter.member, waiter.token
        self._receiving[me] = (waiter, token, sources)
        if me in self._severed:
            self._fail_soon(me, token, "severed here")
            return
        self._posted[me] = letters
        for peer, (_, wait, needed) in list(self._receiving.items()):
            if needed <= self._posted.keys() and (peer == me or me in needed):
                delay = self._clock.delay()
                self._clock.after(delay, self._finish, peer, wait, self._posted, needed)
        for gone in self._cut:
            if gone in sources and gone not in self._posted:
                self._fail_soon(me, token, "a sender is gone", gone)
                break

    def _is_waiting(self, member: Member, token: int) -> bool:
        found = self._waiting.get(member) or self._receiving.get(member)
        return found is not None and found[1] == token

    def _finish(self, member: Member, token: int, value: Any, sources: Collection[Member]) -> None:
        """The wait succeeds, if the words of `sources` arrive."""
        if not self._is_waiting(member, token):
            return
        if self._network.reaches(sources, member):
            self._pop(member).advance(token, value)
        else:
            self._hang(member, token, self._finish, member, token, value, sources)

    def _fail_soon(
        self, member: Member, token: int, detail: str, source: Member | None = None
    ) -> None:
        self._clock.after(self._clock.delay(), self._fail, member, token, detail, source)

    def _fail(self, member: Member, token: int, detail: str, source: Member | None = None) -> None:
        """The wait fails, if the news of `source` arrives."""
        if not self._is_waiting(member, token):
            return
        if source is None or self._network.reaches((source,), member):
            self._pop(member).advance(token, error=Broken(detail))
        else:
            self._hang(member, token, self._fail, member, token, detail, source)

    def _hang(
        self, member: Member, token: int, action: Callable[..., None], *arguments: Any
    ) -> None:
        self._network.when_healed(action, *arguments)
        self._clock.after(WAIT_SECONDS, self._fail, member, token, "timed out")

    def _pop(self, member: Member) -> Any:
        found = self._waiting.pop(member, None) or self._receiving.pop(member)
        return found[0]
