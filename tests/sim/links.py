"""Simulated communicators: collectives that may reach some members and not others.

Two shapes, because they break differently. In a *mesh* any member may get a result first and every
member notices a broken peer. In a *star* (small all-reduces over gloo) the first rank combines: it
alone notices the others, and the others only notice it. A member that severs its end, or dies, cuts
the communicator; whoever waits for it gets Broken, unless the result was faster.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random
from typing import Any, Protocol

from elastic.topology import Member


class Broken(RuntimeError):
    """A connection to a peer is gone, or a peer never appeared."""


class Waiter(Protocol):
    """A simulated training thread, blocked; `token` names the wait it is in."""

    member: Member
    token: int

    def advance(self, token: int, value: Any = None, error: Exception | None = None) -> None: ...


class Clock(Protocol):
    """Virtual time."""

    rng: Random

    def after(self, delay: float, action: Callable[..., None], *arguments: Any) -> None: ...


Wait = Callable[[Any], None]


class Comm:
    """One communicator of one generation."""

    def __init__(self, clock: Clock, members: tuple[Member, ...], star: bool) -> None:
        self.members = members
        self._clock = clock
        self._star = star
        self._severed: set[Member] = set()
        self._cut: set[Member] = set()
        self._count = dict.fromkeys(members, 0)
        self._given: dict[int, dict[Member, Any]] = {}
        self._waiting: dict[Member, tuple[Waiter, int, int]] = {}
        self._arrived: set[Member] = set()
        self._posted: dict[Member, Any] = {}
        self._receiving: dict[Member, tuple[Waiter, int, frozenset[Member]]] = {}

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
                token = waiting[member][1]
                self._clock.after(self._delay(), self._fail, member, token, "severed here")

    def cut(self, member: Member) -> None:
        """The member's connections are gone: it died, or severed them."""
        if member in self._cut:
            return
        self._cut.add(member)
        for peer, (_, token, index) in list(self._waiting.items()):
            # A peer that is not there yet is missed by timeout only.
            if peer != member and index >= 0 and self._notices(peer, member):
                self._clock.after(self._delay(), self._fail, peer, token, f"lost {member}")
        for peer, (_, token, sources) in list(self._receiving.items()):
            if member in sources and member not in self._posted:
                self._clock.after(self._delay(), self._fail, peer, token, f"lost {member}")

    def _notices(self, peer: Member, member: Member) -> bool:
        return not self._star or self.members[0] in (peer, member)

    def _build(self, waiter: Waiter, timeout: float) -> None:
        self._arrived.add(waiter.member)
        self._waiting[waiter.member] = (waiter, waiter.token, -1)
        self._clock.after(timeout, self._fail, waiter.member, waiter.token, "never appeared")
        if len(self._arrived) == len(self.members):
            for member in list(self._waiting):
                _, token, _ = self._waiting[member]
                self._clock.after(self._delay(), self._finish, member, token, self)

    def _join(self, waiter: Waiter, value: Any) -> None:
        me, token = waiter.member, waiter.token
        index = self._count[me]
        self._count[me] += 1
        self._waiting[me] = (waiter, token, index)
        if me in self._severed:
            self._clock.after(self._delay(), self._fail, me, token, "severed here")
            return
        given = self._given.setdefault(index, {})
        given[me] = value
        root = self.members[0]
        if self._star and me != root and root in self._cut:
            self._clock.after(self._delay(), self._fail, me, token, "the first rank is gone")
        elif len(given) == len(self.members):
            for member in self.members[:1] if self._star else self.members:
                if member in self._waiting:
                    wait = self._waiting[member][1]
                    self._clock.after(self._delay(), self._result, member, wait, index)
        elif any(c not in given and self._notices(me, c) for c in self._cut):
            self._clock.after(self._delay(), self._fail, me, token, "a peer is gone")

    def _result(self, member: Member, token: int, index: int) -> None:
        if not self._is_waiting(member, token):
            return
        given = self._given[index]
        if self._star and member == self.members[0]:
            for other in self.members[1:]:
                if other in self._waiting and self._waiting[other][2] == index:
                    wait = self._waiting[other][1]
                    self._clock.after(self._delay(), self._finish, other, wait, given)
        self._finish(member, token, given)

    def _exchange(
        self, waiter: Waiter, letters: dict[Any, Any], sources: frozenset[Member]
    ) -> None:
        me, token = waiter.member, waiter.token
        self._receiving[me] = (waiter, token, sources)
        if me in self._severed:
            self._clock.after(self._delay(), self._fail, me, token, "severed here")
            return
        self._posted[me] = letters
        for peer, (_, wait, needed) in list(self._receiving.items()):
            if needed <= self._posted.keys() and (peer == me or me in needed):
                self._clock.after(self._delay(), self._finish, peer, wait, self._posted)
        if any(c in sources and c not in self._posted for c in self._cut):
            self._clock.after(self._delay(), self._fail, me, token, "a sender is gone")

    def _is_waiting(self, member: Member, token: int) -> bool:
        return any(
            member in waiting and waiting[member][1] == token
            for waiting in (self._waiting, self._receiving)
        )

    def _finish(self, member: Member, token: int, value: Any) -> None:
        if self._is_waiting(member, token):
            self._pop(member).advance(token, value)

    def _fail(self, member: Member, token: int, detail: str) -> None:
        if self._is_waiting(member, token):
            self._pop(member).advance(token, error=Broken(detail))

    def _pop(self, member: Member) -> Waiter:
        found = self._waiting.pop(member, None) or self._receiving.pop(member)
        return found[0]

    def _delay(self) -> float:
        return 0.01 + 0.2 * self._clock.rng.random() ** 3
