"""The forecast of a failure as text for a terminal.

Replicas that look alike are shown once, so that a job of thousands of slots fits a screen; of many
moves the largest are listed, and the totals count all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from elastic.forecast import Alike, ElementBytes, Forecast, imbalance
from elastic.workload import slot_work
from ntp.atoms import AtomSizes
from ntp.geometry import ShardMap, SlotRef
from trainer.plan_words import (
    alike_title,
    amount,
    axis_name,
    counted,
    failure_title,
    owned_ranges,
    slot_name,
)

TABLES_SHOWN = 6
"""Kinds of replicas whose slots are listed; of the others only the title is shown."""

PAIRS_SHOWN = 12
SHARES_SHOWN = 16

MODEL = (
    "Throughput is that of a model: a step takes as long as its slowest replica computes, samples x"
    " work of the most loaded slot. It leaves out communication, a pipeline's bubble and the"
    " rounding to whole microbatches, and takes all devices to be equally fast. Memory leaves out"
    " activations."
)


def render(job: str, forecast: Forecast, element: ElementBytes) -> Group:
    """Everything that there is to say, from top to bottom."""
    return Group(
        Text(f"{job}: {failure_title(forecast)}", style="bold"),
        Text(f"{forecast.after.action}: {forecast.after.reason}"),
        *_replicas(forecast, element),
        Text(),
        *_moves(forecast, element),
        Text(),
        _totals(forecast, element),
        Text(),
        Text(MODEL, style="dim"),
    )


def _replicas(forecast: Forecast, element: ElementBytes) -> Iterator[RenderableType]:
    for number, alike in enumerate(forecast.alike):
        yield Text()
        yield Text(alike_title(alike, forecast.shape.global_batch_size), style="bold")
        if alike.shards is not None and number < TABLES_SHOWN:
            yield _slots(forecast, element, alike, alike.shards)
            yield Padding(Text(_balance(forecast.shape.sizes, alike, alike.shards)), (0, 1))


def _slots(
    forecast: Forecast, element: ElementBytes, alike: Alike, shards: ShardMap
) -> RenderableType:
    """One row a slot: what it owns, first and last atom of each range, and what it moves."""
    sizes = forecast.shape.sizes
    whole = sum(each.of(axis.axis) * axis.atoms for each in sizes for axis in shards.axes)
    sent, received = forecast.sent(), forecast.received()
    table = Table()
    table.add_column("\nslot", justify="right")
    for axis in shards.axes:
        table.add_column(f"{axis_name(axis.axis)}\n({axis.atoms})")
    for heading in ("of the\nmodel", "\nmemory", "\nsends", "\nreceives"):
        table.add_column(heading, justify="right")
    for slot in range(shards.tp_base):
        refs = [SlotRef(replica, slot) for replica in alike.replicas]
        moved = _moved(sent, refs, element), _moved(received, refs, element)
        if slot not in alike.active:
            blank = [""] * (len(shards.axes) + 1)
            table.add_row(str(slot), Text("vacant", style="bold red"), *blank, *moved)
            continue
        work = [slot_work(shards, slot, each) for each in sizes]
        fullest = max(own + each.replicated for own, each in zip(work, sizes, strict=True))
        table.add_row(
            str(slot),
            *(owned_ranges(axis.owned[slot]) for axis in shards.axes),
            f"{sum(work) / whole:.1%}",
            amount(fullest * element.resident),
            *moved,
        )
    return table


def _moved(totals: Mapping[SlotRef, int], refs: Sequence[SlotRef], element: ElementBytes) -> str:
    amounts = {totals.get(ref, 0) * element.moved for ref in refs}
    if amounts == {0}:
        return "-"
    return ("up to " if len(amounts) > 1 else "") + amount(max(amounts))


def _balance(sizes: Sequence[AtomSizes], alike: Alike, shards: ShardMap) -> str:
    """Most loaded slot over the mean, of each axis and of all work of the worst stage."""
    parts = [
        f"{axis_name(axis.axis)} "
        f"{imbalance([sum(map(len, axis.owned[slot])) for slot in alike.active]):.3f}"
        for axis in shards.axes
    ]
    work = max(imbalance([slot_work(shards, slot, s) for slot in alike.active]) for s in sizes)
    return f"most loaded slot over the mean: {', '.join(parts)}; all work {work:.3f}"


def _moves(forecast: Forecast, element: ElementBytes) -> Iterator[RenderableType]:
    transfers = forecast.transfers
    if not transfers:
        yield Text("nothing moves")
        return
    table = Table(title="what moves", title_justify="left")
    for heading in ("from", "to"):
        table.add_column(heading)
    for heading in ("parameters", "optimizer state", "bytes"):
        table.add_column(heading, justify="right")
    for each in transfers[:PAIRS_SHOWN]:
        table.add_row(
            slot_name(each.source),
            slot_name(each.target),
            amount(each.elements * element.parameter),
            amount(each.elements * element.optimizer),
            amount(each.elements * element.moved),
        )
    yield table
    if hidden := transfers[PAIRS_SHOWN:]:
        most = amount(hidden[0].elements * element.moved)
        total = amount(sum(each.elements for each in hidden) * element.moved)
        yield Text(f"and {counted(len(hidden), 'more pair')} of at most {most}, {total} in all")


def _totals(forecast: Forecast, element: ElementBytes) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in _figures(forecast, element):
        table.add_row(Text(name, style="dim"), value)
    return table


def _figures(forecast: Forecast, element: ElementBytes) -> Iterator[tuple[str, str]]:
    moved = amount(forecast.moved * element.moved)
    if forecast.least:
        ratio = forecast.moved / forecast.least
        least = amount(forecast.least * element.moved)
        yield "bytes moved", f"{moved}, {ratio:.2f} x the lower bound of {least}"
    else:
        yield "bytes moved", moved
    for name, totals in (("sender", forecast.sent()), ("receiver", forecast.received())):
        if totals:
            busiest = max(totals, key=totals.__getitem__)
            bytes_ = amount(totals[busiest] * element.moved)
            others = f", of {len(totals)} {name}s" if len(totals) > 1 else ""
            yield f"busiest {name}", f"{slot_name(busiest)}, {bytes_}{others}"
    memory = forecast.memory
    yield (
        "memory of the fullest slot",
        f"{amount(memory.before * element.resident)} at full strength, "
        f"{amount(memory.after * element.resident)} after, "
        f"{amount(memory.switching * element.resident)} while switching",
    )
    split = forecast.after.batch_split
    few = len(split) <= SHARES_SHOWN
    yield "batch split", " + ".join(map(str, split)) if few else f"{min(split)} to {max(split)}"
    throughput = forecast.throughput
    yield "throughput", f"{throughput.planned:.1%} of full strength"
    yield "  with an equal split", f"{throughput.equal_split:.1%}"
    left = "" if throughput.without_wounded else " (none is whole)"
    yield "  without the wounded replicas", f"{throughput.without_wounded:.1%}{left}"
    for other in forecast.after.alternatives:
        yield f"  {other.action} instead", f"{other.throughput:.1%}: {other.why_not}"
