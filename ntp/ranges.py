"""Ranges of atoms, and how to cut and join them.

A range is half open, as in Python. Functions here take and give tuples of disjoint ranges; where
they say ascending, the ranges are in order of their atoms.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter


@dataclass(frozen=True, slots=True, order=True)
class Range:
    """Atoms start..stop-1 of an axis. Never empty. Raises ValueError if it would be."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"range {self.start}..{self.stop} is empty or negative; leave it out")

    def __len__(self) -> int:
        return self.stop - self.start

    def contains(self, other: Range) -> bool:
        """Whether every atom of `other` is in this range."""
        return self.start <= other.start and other.stop <= self.stop


by_start = attrgetter("start")
"""Sort key of disjoint ranges."""


def intersect(first: Range, second: Range) -> Range | None:
    """The atoms in both ranges, None if there are none."""
    start, stop = max(first.start, second.start), min(first.stop, second.stop)
    return Range(start, stop) if start < stop else None


def common(first: Iterable[Range], second: Iterable[Range]) -> tuple[Range, ...]:
    """The atoms in both sets of ranges, ascending, cut at the bounds of either."""
    second = tuple(second)
    found = (intersect(one, other) for one in first for other in second)
    return tuple(sorted((atoms for atoms in found if atoms is not None), key=by_start))


def subtract(minuend: Range, taken: Iterable[Range]) -> tuple[Range, ...]:
    """The atoms of `minuend` that are in no range of `taken`, ascending."""
    rest: list[Range] = []
    start = minuend.start
    for hole in sorted(taken, key=by_start):
        if start < min(hole.start, minuend.stop):
            rest.append(Range(start, min(hole.start, minuend.stop)))
        start = max(start, hole.stop)
    if start == minuend.start:
        return (minuend,)
    if start < minuend.stop:
        rest.append(Range(start, minuend.stop))
    return tuple(rest)


def cut(tiles: Sequence[Range], atoms: Range) -> list[tuple[int, Range]]:
    """`atoms` cut at the bounds of contiguous `tiles` that hold them: (tile, range) pieces."""
    index = bisect_right(tiles, atoms.start, key=by_start) - 1
    if atoms.stop <= tiles[index].stop:
        return [(index, atoms)]
    first = Range(atoms.start, tiles[index].stop)
    return [(index, first), *cut(tiles, Range(first.stop, atoms.stop))]


def merged(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """Disjoint `ranges`, ascending, those that touch joined."""
    result: list[Range] = []
    for piece in sorted(ranges, key=by_start):
        if result and result[-1].stop == piece.start:
            piece = Range(result.pop().start, piece.stop)
        result.append(piece)
    return tuple(result)


def take(ranges: tuple[Range, ...], atoms: int) -> tuple[tuple[Range, ...], tuple[Range, ...]]:
    """Split `ranges` into their first `atoms` atoms (fewer if there are fewer) and the rest."""
    for index, piece in enumerate(ranges):
        if atoms < len(piece):
            cut = piece.start + atoms
            head = (Range(piece.start, cut),) if atoms else ()
            return (*ranges[:index], *head), (Range(cut, piece.stop), *ranges[index + 1 :])
        atoms -= len(piece)
    return ranges, ()


def deal(ranges: Iterable[Range], amounts: Iterable[int]) -> Iterator[tuple[Range, ...]]:
    """Consecutive shares of `ranges`, one per amount: so many atoms, merged where they touch.

    The amounts must use up the ranges exactly.
    """
    left = iter(merged(ranges))
    start = stop = 0
    for amount in amounts:
        share: list[Range] = []
        while amount:
            if start == stop:
                start, stop = (piece := next(left)).start, piece.stop
            end = min(stop, start + amount)
            share.append(Range(start, end))
            start, amount = end, amount - (end - start)
        yield tuple(share)
    assert start == stop and next(left, None) is None, "dealt less than there was"


@dataclass(frozen=True, slots=True)
class EvenParts:
    """`length` atoms in a row, cut into `parts` consecutive parts within one atom of each other.

    Part i is ``bound(i)..bound(i + 1)``, and may be empty. Where the length does not divide, `turn`
    (any number) says which parts have an atom more: over any consecutive turns, too, the sums of
    all parts are within one atom of each other.
    """

    length: int
    parts: int
    turn: int = 0

    def bound(self, part: int) -> int:
        """First atom of `part`; the length for part number `parts`."""
        return (part * self.length + self._phase) // self.parts

    def part_of(self, atom: int) -> int:
        """The part that `atom` is in: the last one that begins at or before it."""
        return ((atom + 1) * self.parts - self._phase - 1) // self.length

    @property
    def _phase(self) -> int:
        # Parts of all turns lie end to end on one line, of which turn t begins with part t.
        return self.turn * self.length % self.parts
