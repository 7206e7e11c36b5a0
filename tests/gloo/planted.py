"""Bugs of published implementations (design, section 7), to be planted in a rank's process.

`plant` patches product code in the calling process, which ends with its test.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch.nn.functional as functional
from torch import Tensor, nn

import ntp.bucket_sync
import ntp.layers
import trainer.training
from elastic.plan import Plan
from ntp.atoms import Axis
from ntp.bucket_sync import TO_HOLDER_TAG, TO_PROXY_TAG
from ntp.buckets import Countdown
from ntp.bundles import Bundle
from ntp.exchange import Message
from ntp.geometry import ShardMap, SlotRef
from ntp.grad_sync import GradientSync
from ntp.groups import Coordinate
from ntp.local_shards import LocalShards, Placement
from ntp.marked_exchange import MarkedExchange
from ntp.pipeline import ForwardBackward, MicroBatch
from ntp.pipeline_link import Neighbours, Pair
from trainer.shard_state import ShardState, initialize
from trainer.training import Generation, Training


def _change_views(change: Callable[[LocalShards, Placement, Tensor, Tensor], Tensor]) -> None:
    """Pass every view of a range of atoms through `change(shards, placement, flat, view)`."""

    def changed(self: LocalShards, flat: Tensor, placement: Placement, atoms: Any) -> Tensor:
        view = original(self, flat, placement, atoms)
        return view if placement.spec.axis is None else change(self, placement, flat, view)

    original = LocalShards.view
    LocalShards.view = changed  # type: ignore[method-assign]


def _flat(names: tuple[str, ...]) -> None:
    """Take a range of atoms of these tensors as one run of the stored tensor."""

    def change(shards: LocalShards, placement: Placement, flat: Tensor, view: Tensor) -> Tensor:
        spec = placement.spec
        if not spec.name.endswith(names) or spec.atom_dim == 0:
            return view
        # The stride of the atom dimension tells which local atom the view begins with.
        inner = view.stride(spec.atom_dim)
        first = (view.storage_offset() - placement.offset) // inner * spec.atom_elements
        start = placement.offset + first
        return flat[start : start + view.numel()].view(view.shape)

    _change_views(change)


def row_parallel_flat_prefix() -> None:
    """The columns of down and of the output projection are taken as a run of stored elements."""
    _flat(("linear_proj.weight", "linear_fc2.weight"))


def gate_up_flat_prefix() -> None:
    """Gate and up are taken as a run of stored rows: only gates, for a small range."""
    _flat(("linear_fc1.weight", "linear_fc1.bias"))


def group_cut() -> None:
    """The query heads of a KV group change hands, its key and value rows do not."""

    def change(shards: LocalShards, placement: Placement, flat: Tensor, view: Tensor) -> Tensor:
        spec = placement.spec
        if not spec.name.endswith(("linear_qkv.weight", "linear_qkv.bias")):
            return view
        channels = next(p.spec for p in shards.placements if "linear_proj.weight" in p.spec.name)
        return view.narrow(1, 0, channels.shape[2])

    _change_views(change)


def vocabulary_shifted() -> None:
    """Rows of adopted ranges are looked up one row further on."""

    def local_rows(shards: ShardMap, slot: int, vocabulary: int) -> Tensor:
        rows = original(shards, slot, vocabulary)
        for atoms in shards.owned(Axis.VOCAB_ROW, slot)[1:]:
            part = rows[atoms.start : atoms.stop]
            part.copy_(part.roll(1))
        return rows

    original = ntp.layers.local_rows
    ntp.layers.local_rows = local_rows


def seeded_per_rank() -> None:
    """Every rank initialises with a seed of its own."""

    def seeded(state: ShardState, seed: int, *arguments: Any) -> None:
        initialize(state, seed + 10 * state.layout.replica + state.slot, *arguments)

    trainer.training.initialize = seeded


def replicated_skipped() -> None:
    """Replicated gradients are reduced among the first slots and never reach the others."""
    own: list[tuple[Bundle, Tensor]] = []

    def clear(self: Bundle) -> None:
        own.append((self, self.packed().clone()))
        original_clear(self)

    def finish(self: GradientSync, *arguments: Any, **named: Any) -> None:
        original_finish(self, *arguments, **named)
        while own:
            bundle, gradients = own.pop()
            bundle.packed().copy_(gradients)

    original_clear, original_finish = Bundle.clear, GradientSync.finish
    Bundle.clear = clear  # type: ignore[method-assign]
    GradientSync.finish = finish  # type: ignore[method-assign]


def averaged_per_replica() -> None:
    """Each replica averages over its own samples, and the averages are averaged."""

    def joined(self: Training, plan: Plan, place: Coordinate, *arguments: Any) -> Generation:
        generation = original(self, plan, place, *arguments)
        numbers = [replica.replica for replica in plan.layout.replicas]
        mine = plan.batch_split[numbers.index(place.replica)]
        weight = sum(plan.batch_split) / len(numbers) / mine
        forward = generation.passes._forward

        def weighted(model: nn.Module, batch: MicroBatch) -> Tensor:
            return forward(model, batch) * weight

        generation.passes._forward = weighted  # type: ignore[method-assign]
        return generation

    original = Training._joined
    Training._joined = joined  # type: ignore[method-assign]


def piece_added_twice() -> None:
    """A proxy adds each piece of a leaf twice."""

    def add(self: Bundle, packed: Tensor) -> None:
        original(self, packed)
        original(self, packed)

    original = Bundle.add
    Bundle.add = add  # type: ignore[method-assign]


def added_before_arrival() -> None:
    """A proxy adds what its buffer holds before the piece is in it."""

    class Hasty(MarkedExchange):
        def __init__(self, group: Any, sends: Any, receives: Any, tag: int) -> None:
            self.late = lambda: None
            if tag == TO_PROXY_TAG:
                pieces = receives
                receives = ()
                self.late = lambda: MarkedExchange(group, (), pieces, tag).receive()
            super().__init__(group, sends, receives, tag)

        def send(self) -> None:
            self.late()
            super().send()

    ntp.bucket_sync.MarkedExchange = Hasty  # type: ignore[misc]


def returned_to_another() -> None:
    """A proxy returns the sum of one holder's piece to another holder."""

    def swapped(group: Any, sends: Sequence[Message], receives: Any, tag: int) -> MarkedExchange:
        sends = list(sends)
        if tag == TO_HOLDER_TAG:
            for size in {message.tensor.numel() for message in sends}:
                alike = [i for i, message in enumerate(sends) if message.tensor.numel() == size]
                peers = [sends[i].peer for i in reversed(alike)]
                for i, peer in zip(alike, peers, strict=True):
                    sends[i] = replace(sends[i], peer=peer)
        return MarkedExchange(group, sends, receives, tag)

    ntp.bucket_sync.MarkedExchange = swapped  # type: ignore[misc, assignment]


def sent_after_one_pass() -> None:
    """Gradients go when the first backward pass has added to them."""

    def begin(self: Countdown, buckets: Any, passes: int) -> None:
        original(self, buckets, 1)

    def added(self: Countdown, name: str) -> range:
        return original_added(self, name) if self._passes_left[name] else range(0)

    original, original_added = Countdown.__init__, Countdown.added
    Countdown.__init__ = begin  # type: ignore[method-assign]
    Countdown.added = added  # type: ignore[method-assign]


def buckets_out_of_order() -> None:
    """One rank launches two buckets, alike in size, in the place of each other."""
    alike = [(f"decoder.layers.{layer}.mlp.linear_fc2.weight",) for layer in (0, 1)]

    def bind(self: GradientSync, gradients: Tensor) -> Any:
        bound = original(self, gradients)
        places = [i for i, bucket in enumerate(bound.buckets) if bucket.tensors in alike]
        if self._slot != SlotRef(1, 1) or len(places) != len(alike):
            return bound
        syncs = list(bound.syncs)
        for place, other in zip(places, reversed(places), strict=True):
            syncs[place] = bound.syncs[other]
        return replace(bound, syncs=tuple(syncs))

    original = GradientSync._bind
    GradientSync._bind = bind  # type: ignore[method-assign]


def pipeline_directions_mixed() -> None:
    """Both directions share a tag and are posted previous stage first, as megatron-core batches."""

    def swap(self: Neighbours, sends: Pair, receives: Pair) -> None:
        pending = []
        for rank, sent, received in (
            (self.previous, sends[1], receives[0]),
            (self.next, sends[0], receives[1]),
        ):
            if sent is not None:
                pending.append(self.group.send([sent.detach().contiguous()], rank, 1))
            if received is not None:
                pending.append(self.group.recv([received.detach()], rank, 1))
        for work in pending:
            work.wait()

    Neighbours._swap = swap  # type: ignore[method-assign]


def tied_gradients_apart() -> None:
    """The two stages that hold a tied weight keep each its own gradient of it."""
    ForwardBackward.sum_tied = lambda self, gradient: None  # type: ignore[method-assign]


def sequence_padding_counted() -> None:
    """The losses of padded positions count."""

    def forward(self: ForwardBackward, model: Any, batch: MicroBatch) -> Tensor:
        length = batch.inputs.shape[1]
        padded = self._padded(length)
        inputs = functional.pad(batch.inputs, (0, padded - length))
        labels = functional.pad(batch.labels, (0, padded - length))
        return original(self, model, MicroBatch(inputs, labels))

    original = ForwardBackward._forward
    ForwardBackward._forward = forward  # type: ignore[method-assign]


def salvaged_gradients_cleared() -> None:
    """A step that is taken up again begins with nothing, as if it were redone."""

    def clear(self: Training, step: int) -> None:
        self.current.state.clear_gradients()

    Training.begin_gradients = clear  # type: ignore[method-assign]


def salvaged_tied_gradient_counted_twice() -> None:
    """Both stages go on from the sum of a tied weight's gradients, and add them up again."""
    begin, tied_gradient = Training.begin_gradients, Training._tied_gradient

    def keep(self: Training, step: int) -> None:
        Training._tied_gradient = lambda training: None  # type: ignore[method-assign]
        begin(self, step)
        Training._tied_gradient = tied_gradient  # type: ignore[method-assign]

    Training.begin_gradients = keep  # type: ignore[method-assign]


TRAPS: dict[str, Callable[[], None]] = {
    trap.__name__: trap
    for trap in (
        row_parallel_flat_prefix,
        gate_up_flat_prefix,
        group_cut,
        vocabulary_shifted,
        seeded_per_rank,
        replicated_skipped,
        averaged_per_replica,
        piece_added_twice,
        added_before_arrival,
        returned_to_another,
        sent_after_one_pass,
        buckets_out_of_order,
        pipeline_directions_mixed,
        tied_gradients_apart,
        sequence_padding_counted,
        salvaged_gradients_cleared,
        salvaged_tied_gradient_counted_twice,
    )
}


def plant(trap: str | None) -> None:
    """Put a bug into this process; nothing for None."""
    if trap is not None:
        TRAPS[trap]()
