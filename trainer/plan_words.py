"""How the forecast of a failure names things, in text and in the drawing alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

from elastic.forecast import Alike, Forecast
from ntp.atoms import Axis
from ntp.geometry import SlotRef
from ntp.ranges import Range

UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def axis_name(axis: Axis) -> str:
    """An axis by its atoms."""
    match axis:
        case Axis.KV_GROUP:
            return "KV groups"
        case Axis.MLP_COLUMN:
            return "MLP columns"
        case Axis.VOCAB_ROW:
            return "vocabulary rows"
        case Axis.EXPERT:
            return "experts"


def amount(count: int) -> str:
    """A number of bytes with three digits: 1.58 MB, in powers of 1000."""
    value, unit = float(count), UNITS[0]
    for larger in UNITS[1:]:
        if value < 999.5:
            break
        value, unit = value / 1000, larger
    return f"{count} B" if unit == UNITS[0] else f"{value:#.3g}".rstrip(".") + f" {unit}"


def slot_name(ref: SlotRef) -> str:
    """A slot of a replica."""
    return f"replica {ref.replica} slot {ref.slot}"


def owned_ranges(pieces: Iterable[Range]) -> str:
    """First and last atom of each range, the home first: 0-1 + 4."""
    return " + ".join(
        f"{each.start}-{each.stop - 1}" if len(each) > 1 else f"{each.start}" for each in pieces
    )


def numbers(values: Sequence[int]) -> str:
    """Ascending whole numbers, runs joined: 0, 2-5."""
    runs: list[tuple[int, int]] = []
    for value in values:
        if runs and runs[-1][1] == value - 1:
            runs[-1] = (runs[-1][0], value)
        else:
            runs.append((value, value))
    return ", ".join(f"{first}-{last}" if first < last else f"{first}" for first, last in runs)


def counted(count: int, noun: str) -> str:
    """A number of things: 1 slot, 2 slots."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def failure_title(forecast: Forecast) -> str:
    """What fails: slots, and where only some stages of a slot fail, these."""
    devices = len(forecast.before.placement)
    if not forecast.failed:
        return f"all {counted(devices, 'device')} at work"
    names = list(_failures(forecast))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return (
        f"{', '.join(names[:3])}{more} lost "
        f"({len(forecast.failed)} of {counted(devices, 'device')})"
    )


def _failures(forecast: Forecast) -> Iterator[str]:
    by_slot = sorted(forecast.failed, key=lambda place: (place.slot_ref, place.stage))
    for ref, places in groupby(by_slot, key=lambda place: place.slot_ref):
        stages = [str(place) for place in places]
        yield from [slot_name(ref)] if len(stages) == forecast.shape.stages else stages


def alike_title(alike: Alike, batch: int) -> str:
    """The replicas that look so, at what degree, with which share of the batch."""
    who = "replica" if len(alike.replicas) == 1 else "replicas"
    name = f"{who} {numbers(alike.replicas)}"
    if not alike.active:
        return f"{name}: no slot left, dropped"
    fewest, most = min(alike.samples), max(alike.samples)
    share = f"{most}" if fewest == most else f"{fewest} to {most}"
    each = " each" if len(alike.replicas) > 1 else ""
    return f"{name}: TP{len(alike.active)}, {share} of {batch} samples{each}"
