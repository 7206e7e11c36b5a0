"""Parts of a flat buffer as contiguous messages, copied only where they are not contiguous.

A *bundle* is a list of views that travel as one message. If they lie one behind the other in
storage, the message is that run of storage itself: it is sent, reduced and received in place. All
others are packed into a buffer, which serves both directions; equal tensors of consecutive layers
are one view in that, as a few copies of many layers cost far less than many copies.

Both ends of a message see the same atoms, but not the same storage, so what forms a message must
not depend on what is contiguous locally. `bundles_of` goes by the tensor, whose dimensions before
the atoms give the number of runs of which a range consists on every slot: one where the atoms come
first, two for a gate and up, a great many for the columns of a row-parallel weight. Long runs
travel on their own. All the rest that goes between two slots is packed into one message, since a
short message costs more than a short copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from torch import Tensor

from ntp.atoms import Axis
from ntp.geometry import Range
from ntp.local_shards import LocalShards, Placement

OWN_MESSAGE_BYTES = 256 * 1024
"""A run of at least so many bytes travels on its own: about where copying it at both ends takes as
long as a message over gloo (some 0.1 ms of processor time)."""


class Bundle:
    """Views into one buffer, at least one, in an order on which both ends agree."""

    def __init__(self, views: Sequence[Tensor]) -> None:
        self._run = _as_run(views)
        self._views = _joined(views) if self._run is None else (self._run,)
        self.elements = sum(view.numel() for view in views)

    def packed(self, room: Tensor | None = None) -> Tensor:
        """The elements as a flat contiguous tensor: their own storage, or a copy (into `room`)."""
        if self._run is not None:
            return self._run
        packed = self.room() if room is None else room
        for view, part in self._parts(packed):
            part.copy_(view)
        return packed

    def room(self) -> Tensor:
        """A flat buffer for as many elements, uninitialised."""
        return self._views[0].new_empty(self.elements)

    def store(self, packed: Tensor) -> None:
        """Write `packed` to the views; nothing to do where it is their own storage."""
        if packed is not self._run:
            for view, part in self._parts(packed):
                view.copy_(part)

    def add(self, packed: Tensor) -> None:
        """Add `packed` to the views."""
        for view, part in self._parts(packed):
            view += part

    def clear(self) -> None:
        """Write zeros to the views."""
        for view in self._views:
            view.zero_()

    def _parts(self, packed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        assert packed.numel() == self.elements, (packed.numel(), self.elements)
        parts = packed.split([view.numel() for view in self._views])
        for view, part in zip(self._views, parts, strict=True):
            yield view, part.view(view.shape)


def bundles_of(
    shards: LocalShards,
    flat: Tensor,
    pieces: Sequence[tuple[Axis, Range]],
    tensors: Sequence[Placement],
) -> tuple[Bundle, ...]:
    """The messages that carry `pieces` of `tensors`, which are in `flat`, between two slots.

    Both ends list the same pieces, each a range of atoms inside one range that the slot owns.
    """
    alone: list[Bundle] = []
    together: list[Tensor] = []
    # Tensors of one shape one after another, so that those of consecutive layers can be joined.
    shapes = list(dict.fromkeys(placement.spec.shape for placement in tensors))
    alike = sorted(tensors, key=lambda placement: shapes.index(placement.spec.shape))
    for axis, atoms in pieces:
        for placement in alike:
            if placement.spec.axis is axis:
                view = shards.view(flat, placement, atoms)
                before = placement.spec.atom_dim
                runs = prod(view.shape[:before])
                if view.nbytes >= runs * OWN_MESSAGE_BYTES:
                    alone += [
                        Bundle([run]) for run in view.view(runs, *view.shape[before:]).unbind()
                    ]
                else:
                    together.append(view)
    return (*alone, Bundle(together)) if together else tuple(alone)


def _as_run(views: Sequence[Tensor]) -> Tensor | None:
    """`views` as one flat view, if they lie one behind the other in storage."""
    start = end = views[0].storage_offset()
    for view in views:
        if not view.is_contiguous() or view.storage_offset() != end:
            return None
        end += view.numel()
    return views[0].as_strided((end - start,), (1,), start)


def _joined(views: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """`views`, those made one that follow each other, are alike, and lie equally far apart.

    A model repeats its layers, so that leaves far fewer to copy one by one.
    """
    groups: list[list[Tensor]] = []
    for view in views:
        if groups and _continues(groups[-1], view):
            groups[-1].append(view)
        else:
            groups.append([view])
    return tuple(
        group[0].as_strided(
            (len(group), *group[0].shape), (_distance(*group[:2]), *group[0].stride())
        )
        if len(group) > 1
        else group[0]
        for group in groups
    )


def _continues(group: list[Tensor], view: Tensor) -> bool:
    distance = _distance(group[-1], view)
    return (
        view.shape == group[0].shape
        and view.stride() == group[0].stride()
        and distance > 0
        and (len(group) == 1 or distance == _distance(*group[:2]))
    )


def _distance(first: Tensor, second: Tensor) -> int:
    return int(second.storage_offset()) - int(first.storage_offset())
