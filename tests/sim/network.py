"""Who reaches whom: the network between the nodes, as the workers' connections use it.

A connection over a cut does not break. What is sent arrives when the cut heals; until then only a
timeout tells.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable

from clock import Clock

from elastic.topology import Member

WAIT_SECONDS = 4.0
"""Timeout of a collective that hangs."""


class Network:
    """All nodes reach each other, until some are cut off."""

    def __init__(self, clock: Clock, serves: Callable[[str], int | None]) -> None:
        self._clock = clock
        self._serves = serves
        self._cuts: list[frozenset[tuple[int, int]]] = []
        self._held: list[tuple[Callable[..., None], tuple[object, ...]]] = []

    @property
    def is_whole(self) -> bool:
        """Whether nobody is cut off."""
        return not self._cuts

    def cut(self, sources: Collection[int], targets: Collection[int], seconds: float) -> None:
        """What the nodes `sources` send does not reach `targets`, for so long."""
        pairs = frozenset((a, b) for a in sources for b in targets if a != b)
        self._cuts.append(pairs)
        self._clock.after(seconds, self._heal, pairs)

    def is_isolated(self, node: int) -> bool:
        """Whether some of what the node sends does not arrive."""
        return any(source == node for pairs in self._cuts for source, _ in pairs)

    def reaches(self, sources: Iterable[Member], target: Member) -> bool:
        """Whether words of all `sources` arrive at `target`."""
        if not self._cuts:
            return True
        node = target.device.node
        return not any((s.device.node, node) in pairs for pairs in self._cuts for s in sources)

    def meets(self, rendezvous: str, members: Iterable[Member]) -> bool:
        """Whether the store at that address is served, and all members reach it."""
        host = self._serves(rendezvous)
        if host is None:
            return False
        nodes = {member.device.node for member in members}
        ways = {(host, node) for node in nodes} | {(node, host) for node in nodes}
        return not any(ways & pairs for pairs in self._cuts)

    def when_healed(self, action: Callable[..., None], *arguments: object) -> None:
        """Try `action` again when a cut heals."""
        self._held.append((action, arguments))

    def _heal(self, pairs: frozenset[tuple[int, int]]) -> None:
        self._cuts.remove(pairs)
        self._clock.tell("the network heals")
        held, self._held = self._held, []
        for action, arguments in held:
            self._clock.after(self._clock.delay(), action, *arguments)
