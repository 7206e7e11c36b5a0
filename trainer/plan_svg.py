"""The forecast of a failure as a drawing (SVG), readable on light and on dark grounds.

A card for each kind of replica, as in the text; in it a column for each slot, with one bar an axis.
The height of a bar is what the slot owns, its share at full strength being the dashed line; the
colours say from whose homes the atoms are. Arrows between slots are what moves; where they would be
too many, the amounts beside the slots have to do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from textwrap import wrap

from elastic.forecast import Alike, ElementBytes, Forecast, stage_moves
from ntp.geometry import AxisShards, ShardMap, SlotRef
from ntp.ranges import Range, intersect
from trainer.plan_words import (
    alike_title,
    amount,
    axis_name,
    counted,
    failure_title,
    owned_ranges,
)
from trainer.svg import document, home_colour, rect, text

CARDS_SHOWN = 12
ARROWS_SHOWN = 60
LEGEND_SHOWN = 16

MARGIN = 28.0
HEADER = 128.0
BARS = 104.0
"""Height of the tallest bar."""
CARD = BARS + 96.0


@dataclass(frozen=True, slots=True)
class _Sheet:
    """Where things are, in pixels. `scale`: height of a bar that holds a share of full strength."""

    slots: int
    cards: int
    gap: float
    scale: float

    @property
    def column(self) -> float:
        return max(46.0, min(180.0, 1060.0 / self.slots))

    @property
    def bars(self) -> float:
        """Width of the bars of a slot together."""
        return min(0.72 * self.column, 100.0)

    @property
    def wide(self) -> bool:
        """Whether a column has room for words."""
        return self.column >= 100

    @property
    def width(self) -> float:
        return max(800.0, 2 * MARGIN + 24 + self.slots * self.column)

    def left(self, slot: int) -> float:
        return MARGIN + 12 + slot * self.column

    def middle(self, slot: int) -> float:
        return self.left(slot) + self.column / 2

    def top(self, card: int) -> float:
        return HEADER + card * (CARD + self.gap)

    def floor(self, card: int) -> float:
        """Where the bars of a card stand."""
        return self.top(card) + 56 + BARS

    @property
    def bottom(self) -> float:
        """Where the cards end."""
        return self.top(self.cards - 1) + CARD


def draw(job: str, forecast: Forecast, element: ElementBytes) -> str:
    """The whole drawing, as the text of an SVG file."""
    shown = forecast.alike[:CARDS_SHOWN]
    arrows = _arrows(forecast)
    traced = 0 < len(arrows) <= ARROWS_SHOWN and len(shown) == len(forecast.alike)
    sheet = _Sheet(
        slots=forecast.shape.tensor,
        cards=len(shown),
        gap=64.0 if traced else 22.0,
        scale=BARS / max(_tallest(alike) for alike in shown),
    )
    figures = _figures(forecast, element)
    body = [
        text(MARGIN, 42, job, "ink title"),
        text(MARGIN, 66, failure_title(forecast), "ink heading"),
        *(text(MARGIN, 89 + 19 * line, words, "dim") for line, words in enumerate(figures)),
    ]
    if traced:
        body += _curves(sheet, arrows)
    for card, alike in enumerate(shown):
        body += _card(sheet, card, forecast, alike, element)
    y = bottom = sheet.bottom + (48 if traced else 34)
    for x, line, swatch, label in _legend(sheet, forecast):
        y = bottom + line * 22
        body.append(rect(x, y - 11, 12, 12, f'rx="2" {swatch}'))
        body.append(text(x + 18, y, label, "ink small"))
    y += 12
    for note in _notes(forecast, traced):
        for words in wrap(note, int((sheet.width - 2 * MARGIN) / 6.3)):
            y += 17
            body.append(text(MARGIN, y, words, "dim small"))
    title = f"{job}: {failure_title(forecast)}"
    return document(title, sheet.width, y + 22, body)


def _figures(forecast: Forecast, element: ElementBytes) -> tuple[str, str]:
    memory, throughput = forecast.memory, forecast.throughput
    least = f" ({forecast.moved / forecast.least:.2f} x the lower bound)" if forecast.least else ""
    return (
        f"moves {amount(forecast.moved * element.moved)}{least}; fullest slot "
        f"{amount(memory.before * element.resident)} → {amount(memory.after * element.resident)}",
        f"throughput {throughput.planned:.1%} of full strength; with an equal split "
        f"{throughput.equal_split:.1%}, without the wounded replicas "
        f"{throughput.without_wounded:.1%}",
    )


def _card(
    sheet: _Sheet, card: int, forecast: Forecast, alike: Alike, element: ElementBytes
) -> Iterator[str]:
    floor = sheet.floor(card)
    yield rect(MARGIN, sheet.top(card), sheet.width - 2 * MARGIN, CARD, 'class="card" rx="8"')
    title = alike_title(alike, forecast.shape.global_batch_size)
    yield text(MARGIN + 14, sheet.top(card) + 25, title, "ink heading")
    level = floor - sheet.scale
    yield (
        f'<line class="level" x1="{sheet.left(0):.1f}" x2="{sheet.left(sheet.slots):.1f}" '
        f'y1="{level:.1f}" y2="{level:.1f}"/>'
    )
    received, sent = forecast.received(), forecast.sent()
    small = "small" if sheet.column >= 60 else "tiny"
    for slot in range(sheet.slots):
        middle = sheet.middle(slot)
        shards = alike.shards if slot in alike.active else None
        yield f'<g class="slot{"" if shards else " vacant"}">'
        yield from _bars(sheet, slot, floor, shards) if shards else _vacant(sheet, slot, floor)
        name = f"slot {slot}" if sheet.wide else f"{slot}"
        yield text(middle, floor + 16, name, "ink small middle")
        refs = [SlotRef(replica, slot) for replica in alike.replicas]
        for totals, word, y in (
            (received, "receives", floor - BARS - 9),
            (sent, "sends", floor + 32),
        ):
            if most := max(totals.get(ref, 0) for ref in refs):
                label = amount(most * element.moved)
                label = f"{word} {label}" if sheet.wide else label
                yield text(middle, y, label, f"dim {small} middle")
        yield "</g>"


def _bars(sheet: _Sheet, slot: int, floor: float, shards: ShardMap) -> Iterator[str]:
    """One bar an axis: home atoms below, adopted ones above, each in the colour of their home."""
    owned = (f"{axis_name(axis.axis)} {owned_ranges(axis.owned[slot])}" for axis in shards.axes)
    yield f"<title>slot {slot}: {', '.join(owned)}</title>"
    pitch = sheet.bars / len(shards.axes)
    for position, axis in enumerate(shards.axes):
        x = sheet.middle(slot) + (position - len(shards.axes) / 2) * pitch + pitch * 0.08
        y = floor
        for home, atoms in _by_home(axis, slot):
            height = len(atoms) * shards.tp_base / axis.atoms * sheet.scale
            y -= height
            fill = f'fill="{home_colour(home)}" rx="1.5"'
            # A pixel less, so that pieces can be told apart.
            yield rect(x, y, pitch * 0.84, max(height - 1, 0.5), fill)


def _vacant(sheet: _Sheet, slot: int, floor: float) -> Iterator[str]:
    x, y = sheet.middle(slot) - sheet.bars / 2, floor - sheet.scale
    yield f"<title>slot {slot}: vacant</title>"
    yield rect(x, y, sheet.bars, sheet.scale, 'class="empty" rx="3"')


def _by_home(axis: AxisShards, slot: int) -> Iterator[tuple[int, Range]]:
    """What a slot owns, in storage order, cut where another slot's home begins."""
    for piece in axis.owned[slot]:
        for home, atoms in enumerate(axis.home):
            if common := intersect(piece, atoms):
                yield home, common


def _tallest(alike: Alike) -> float:
    """The tallest bar of a card, 1 being a share at full strength."""
    if alike.shards is None:
        return 1.0
    base = alike.shards.tp_base
    return max(
        sum(map(len, axis.owned[slot])) * base / axis.atoms
        for axis in alike.shards.axes
        for slot in alike.active
    )


@dataclass(frozen=True, slots=True)
class _Arrow:
    """From a slot of a card to another, for atoms of one home."""

    card: int
    slot: int
    to_card: int
    to_slot: int
    home: int


def _arrows(forecast: Forecast) -> dict[_Arrow, int]:
    """Elements that move between places of the drawing, which stand for all replicas alike."""
    cards = {
        replica: card for card, alike in enumerate(forecast.alike) for replica in alike.replicas
    }
    homes = dict(forecast.before.layout.homes)
    arrows: defaultdict[_Arrow, int] = defaultdict(int)
    for sizes, moves in zip(forecast.shape.sizes, stage_moves(forecast.after), strict=True):
        for move in moves:
            ends = cards[move.source.replica], move.source.slot
            to_ends = cards[move.target.replica], move.target.slot
            if move.axis is None or move.atoms is None:
                continue  # It belongs to no home; the amounts beside the slots count it.
            for home, atoms in enumerate(homes[move.axis]):
                if common := intersect(atoms, move.atoms):
                    arrows[_Arrow(*ends, *to_ends, home)] += sizes.of(move.axis) * len(common)
    return dict(arrows)


def _curves(sheet: _Sheet, arrows: Mapping[_Arrow, int]) -> Iterator[str]:
    """Arrows between the edges of the cards; the cards hide what passes behind them."""
    most = max(arrows.values())
    for arrow, elements in arrows.items():
        card, to_card = arrow.card, arrow.to_card
        x, to_x = sheet.middle(arrow.slot), sheet.middle(arrow.to_slot)
        up = card > to_card
        y = sheet.top(card) - 2 if up else sheet.top(card) + CARD + 2
        to_y = sheet.top(to_card) - 2 if card < to_card else sheet.top(to_card) + CARD + 2
        bend, to_bend = (-44, 44) if up else (44, -44 if card < to_card else 44)
        stroke = f'stroke="{home_colour(arrow.home)}" stroke-width="{1 + 4 * elements / most:.1f}"'
        yield (
            f'<path class="arrow" {stroke} marker-end="url(#head)" d="M{x:.1f} {y:.1f} '
            f'C{x:.1f} {y + bend:.1f} {to_x:.1f} {to_y + to_bend:.1f} {to_x:.1f} {to_y:.1f}"/>'
        )


def _legend(sheet: _Sheet, forecast: Forecast) -> Iterator[tuple[float, int, str, str]]:
    """Place and line, attributes of the swatch, and words of each entry."""
    active = set(forecast.after.layout.slots())
    lost = {ref.slot for ref in forecast.before.layout.slots() if ref not in active}
    slots = range(sheet.slots) if sheet.slots <= LEGEND_SHOWN else sorted(lost)[:LEGEND_SHOWN]
    entries = [(f'fill="{home_colour(slot)}"', f"home of slot {slot}") for slot in slots]
    if lost:
        entries.append(('class="empty"', "vacant"))
    entry = 118.0
    row = int((sheet.width - 2 * MARGIN) // entry)
    for number, (swatch, words) in enumerate(entries):
        yield MARGIN + number % row * entry, number // row, swatch, words


def _notes(forecast: Forecast, traced: bool) -> Iterator[str]:
    names = ", ".join(axis_name(axis) for axis, _ in forecast.before.layout.homes)
    yield (
        f"Bars of a slot, left to right: {names}. Their height is what it owns; the dashed line is "
        "its share at full strength."
    )
    if forecast.shape.tensor > LEGEND_SHOWN:
        yield "At the foot of each bar is the slot's own home, in a colour of its own."
    if forecast.transfers:
        yield (
            "Above a slot is what it receives, below what it sends, parameters and optimizer state"
            " together; of replicas drawn as one, the most."
        )
        if not traced:
            pairs = counted(len(forecast.transfers), "pair")
            yield f"{pairs} of slots exchange something: too many arrows to draw."
    if hidden := forecast.alike[CARDS_SHOWN:]:
        replicas = sum(len(alike.replicas) for alike in hidden)
        yield f"Not drawn: {counted(replicas, 'more replica')} in {counted(len(hidden), 'kind')}."
    yield (
        "Throughput is that of a model: samples x work of the most loaded slot, without "
        "communication, a pipeline's bubble and the rounding to whole microbatches, all devices "
        "equally fast."
    )
