"""Ranges against sets of atoms; even parts against sums over their atoms."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.ranges import EvenParts, Range, common, cut, deal, intersect, merged, subtract, take

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
RANGES = st.builds(
    lambda start, size: Range(start, start + size), st.integers(0, 20), st.integers(1, 6)
)


def atoms(*ranges: Range) -> list[int]:
    return [atom for piece in ranges for atom in range(piece.start, piece.stop)]


@st.composite
def rows(draw: st.DrawFn) -> tuple[Range, ...]:
    """Disjoint ranges, ascending; some touch."""
    bounds = draw(st.lists(st.integers(0, 4), min_size=2, max_size=12))
    ranges: list[Range] = []
    start = 0
    for gap, size in zip(bounds[::2], bounds[1::2], strict=False):
        start += gap
        if size:
            ranges.append(Range(start, start + size))
        start += size
    return tuple(ranges)


@PROPERTY
@given(RANGES, RANGES)
def test_two_ranges(first: Range, second: Range) -> None:
    both = set(atoms(first)) & set(atoms(second))
    shared = intersect(first, second)
    assert set(atoms(shared) if shared else ()) == both
    assert first.contains(second) == (len(both) == len(second))
    assert len(first) == len(atoms(first))


@PROPERTY
@given(RANGES, st.lists(RANGES, max_size=4))
def test_subtract(minuend: Range, taken: list[Range]) -> None:
    rest = subtract(minuend, taken)
    assert atoms(*rest) == sorted(set(atoms(minuend)) - set(atoms(*taken)))
    assert merged(reversed(rest)) == rest


@PROPERTY
@given(rows(), rows())
def test_common_and_merged(first: tuple[Range, ...], second: tuple[Range, ...]) -> None:
    shared = common(first, second)
    assert atoms(*shared) == sorted(set(atoms(*first)) & set(atoms(*second)))
    for piece in shared:
        assert any(one.contains(piece) for one in first)
        assert any(one.contains(piece) for one in second)
    joined = merged(reversed(first))
    assert atoms(*joined) == atoms(*first)
    assert all(one.stop < two.start for one, two in pairwise(joined))


@PROPERTY
@given(rows(), st.integers(0, 30))
def test_take(ranges: tuple[Range, ...], count: int) -> None:
    head, tail = take(ranges, count)
    assert atoms(*head) == atoms(*ranges)[:count]
    assert atoms(*tail) == atoms(*ranges)[count:]


@PROPERTY
@given(rows(), st.lists(st.integers(0, 24), max_size=6))
def test_deal(ranges: tuple[Range, ...], cuts: list[int]) -> None:
    left = atoms(*ranges)
    bounds = sorted({0, len(left), *(bound % (len(left) + 1) for bound in cuts)})
    amounts = [0, *(stop - start for start, stop in pairwise(bounds))]
    for amount, share in zip(amounts, deal(reversed(ranges), amounts), strict=True):
        assert atoms(*share) == left[:amount]
        assert merged(share) == share
        left = left[amount:]
    with pytest.raises(AssertionError, match="less than there was"):
        list(deal([*ranges, Range(90, 91)], amounts))


@PROPERTY
@given(st.lists(st.integers(1, 5), min_size=1, max_size=8), st.data())
def test_cut(sizes: list[int], data: st.DataObject) -> None:
    tiles = [Range(sum(sizes[:i]), sum(sizes[: i + 1])) for i in range(len(sizes))]
    start = data.draw(st.integers(0, sum(sizes) - 1))
    piece = Range(start, data.draw(st.integers(start + 1, sum(sizes))))
    pieces = cut(tiles, piece)
    assert atoms(*(part for _, part in pieces)) == atoms(piece)
    assert all(tiles[tile].contains(part) for tile, part in pieces)
    assert len({tile for tile, _ in pieces}) == len(pieces)


@PROPERTY
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 40))
def test_even_parts(length: int, parts: int, turn: int) -> None:
    even = EvenParts(length, parts, turn)
    bounds = [even.bound(part) for part in range(parts + 1)]
    assert (bounds[0], bounds[-1]) == (0, length)
    sizes = [stop - start for start, stop in pairwise(bounds)]
    assert max(sizes) - min(sizes) <= 1
    for atom in range(length):
        part = even.part_of(atom)
        assert bounds[part] <= atom < bounds[part + 1]


@PROPERTY
@given(st.integers(1, 40), st.integers(1, 12), st.integers(0, 20), st.integers(1, 30))
def test_turns_level_out(length: int, parts: int, first: int, turns: int) -> None:
    sums = [0] * parts
    for turn in range(first, first + turns):
        even = EvenParts(length, parts, turn)
        for part in range(parts):
            sums[part] += even.bound(part + 1) - even.bound(part)
    assert sum(sums) == length * turns
    assert max(sums) - min(sums) <= 1


def test_empty_ranges_are_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        Range(4, 4)
