"""Which gradients travel together, and when they may go.

Theory of operation. Backward finishes gradients roughly in the reverse order of the tensors of the
model, so consecutive tensors, from the last to the first, form *buckets*. While the last backward
pass still computes the gradients of one bucket, those of the buckets before it travel. Replicated
tensors are reduced by other ranks than tensor-parallel ones, and their gradients are complete only
when backward is over; they form buckets of their own, behind all others.

All ranks must cut alike, whatever they hold. So a bucket is closed by what its tensors measure at
full degree, an even share of the global tensor, and never by the size of a local one. And buckets
go strictly in order, each when its own gradients and those of all buckets before it are complete:
ranks may complete gradients in different orders, but collectives must start in one.

A gradient is complete when all backward passes of the step (one per microbatch) have added to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from ntp.atoms import TensorSpec


@dataclass(frozen=True, slots=True)
class Bucket:
    """Names of tensors whose gradients travel together, in the order in which backward ends.

    `replicated`: whether all of them are replicated; otherwise none is. `turn`: the number by which
    the shares of its proxies are dealt (see `ntp.sync_exchange`).
    """

    tensors: tuple[str, ...]
    replicated: bool
    turn: int


def plan_buckets(
    specs: Sequence[TensorSpec],
    tp_base: int,
    element_bytes: int,
    bucket_bytes: int,
    apart: frozenset[str] = frozenset(),
) -> tuple[Bucket, ...]:
    """Cut tensors into buckets; each is closed once it has `bucket_bytes` at full degree.

    Tensors named in `apart` have a bucket each, in turn 0. Two stages that hold the same tensor so
    reduce it in the same way, whatever else they hold, and to the same bits.

    `specs` are in the order in which flat buffers have them, the tensor-parallel ones first, so
    that a bucket is one run of a buffer. Raises ValueError unless `bucket_bytes` is positive.
    """
    if bucket_bytes < 1:
        raise ValueError(f"bucket_bytes is {bucket_bytes}; give a positive number of bytes")
    buckets: list[Bucket] = []
    kinds = [
        (replicated, list(group))
        for replicated, group in groupby(specs, lambda spec: spec.axis is None)
    ]
    assert [replicated for replicated, _ in kinds] in ([], [False], [True], [False, True]), kinds
    for replicated, group in kinds:
        runs: list[list[str]] = [[]]
        size = 0
        for spec in reversed(group):
            alone = spec.name in apart
            if alone:
                runs.append([])
            runs[-1].append(spec.name)
            size += _share(spec, tp_base) * element_bytes
            if alone or size >= bucket_bytes:
                runs.append([])
                size = 0
        for run in filter(None, runs):
            turn = 0 if run[0] in apart else len(buckets)
            buckets.append(Bucket(tuple(run), replicated, turn))
    return tuple(buckets)


def _share(spec: TensorSpec, tp_base: int) -> int:
    """Elements that a slot has of a tensor at full degree, were atoms divisible."""
    if spec.axis is None:
        return spec.atom_elements
    return spec.elements(spec.shape[spec.atom_dim]) // tp_base


class Countdown:
    """The passes that each gradient still lacks in a step, and the buckets that have yet to go."""

    def __init__(self, buckets: Sequence[Bucket], passes: int) -> None:
        assert passes >= 0, passes
        self._bucket_of = {
            name: index for index, bucket in enumerate(buckets) for name in bucket.tensors
        }
        self._passes_left = dict.fromkeys(self._bucket_of, passes)
        self._tensors_left = [len(bucket.tensors) for bucket in buckets]
        self._next = 0

    def added(self, name: str) -> range:
        """A backward pass has added to `name`; returns the buckets that may go now, in order."""
        assert self._passes_left[name], f"{name} was added to after its last pass"
        self._passes_left[name] -= 1
        if not self._passes_left[name]:
            self._tensors_left[self._bucket_of[name]] -= 1
        ready = self._next
        while ready < len(self._tensors_left) and not self._tensors_left[ready]:
            ready += 1
        return self._go(ready)

    def put_back(self, going: range) -> None:
        """These buckets, which were to go last, did not: they are among those that may go next."""
        assert going.stop == self._next, f"{going} went before others"
        self._next = going.start

    def rest(self) -> range:
        """All buckets that did not go, in order: backward is over, and some tensors had no part."""
        return self._go(len(self._tensors_left))

    def _go(self, stop: int) -> range:
        going = range(self._next, stop)
        self._next = stop
        return going
