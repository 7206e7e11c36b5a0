"""Which bytes each replica trains on in each step, and a digest that proves it.

Theory of operation. The samples of a global batch are a pure function of (seed, step): sample i of
step s starts at a place that is drawn from a counter-based generator keyed with the two numbers.
There is no iterator, hence no position to save, and a redone step gets the same samples. A
`BatchSplit` says how many of these samples each replica takes; changing it moves samples between
replicas and never changes the batch.

Every sample has a 64-bit digest of its index and bytes. The digest of a batch is the sum of its
samples' digests, which does not depend on who computed which. It is summed in two 32-bit halves,
because the sum travels in an all-reduce of float64: halves below 2**32 add up exactly for up to
2**21 samples, whatever the order, as every partial sum stays below 2**53; the sum of 64-bit values
would round.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

MAXIMUM_COMBINED: Final = 2**21
"""Digests that can be combined exactly: 2**21 values below 2**32 stay below 2**53."""


@dataclass(frozen=True, slots=True)
class BatchSplit:
    """Samples of the global batch that each replica takes, in the order of the replicas.

    Attributes:
        samples: number of samples of each replica; 0 for one that takes no part.

    Raises:
        ValueError: there is no replica or no sample, or a number is negative.
    """

    samples: tuple[int, ...]

    def __post_init__(self) -> None:
        if min(self.samples, default=0) < 0 or sum(self.samples) == 0:
            raise ValueError(
                f"batch split {self.samples} must give each replica 0 or more samples, and at"
                " least one sample in all"
            )

    @property
    def global_batch_size(self) -> int:
        """Samples of all replicas together."""
        return sum(self.samples)


def even_split(global_batch_size: int, replicas: int) -> BatchSplit:
    """Split a batch as evenly as whole samples allow; the first replicas take what is left over.

    Raises:
        ValueError: there are no replicas, or fewer samples than replicas.
    """
    if not 1 <= replicas <= global_batch_size:
        raise ValueError(
            f"{global_batch_size} samples cannot be split over {replicas} replicas; use 1 to"
            f" {global_batch_size} replicas, or raise train.global_batch_size"
        )
    share, left_over = divmod(global_batch_size, replicas)
    return BatchSplit(tuple(share + (index < left_over) for index in range(replicas)))


def replica_samples(split: BatchSplit, replica: int) -> range:
    """Indices into the global batch of the samples that a replica takes.

    Raises:
        ValueError: the split has no such replica.
    """
    if not 0 <= replica < len(split.samples):
        raise ValueError(f"replica {replica} is outside 0..{len(split.samples) - 1}")
    start = sum(split.samples[:replica])
    return range(start, start + split.samples[replica])


def micro_batches(samples: Sequence[int], micro_batch_size: int) -> list[Sequence[int]]:
    """Cut the samples of a replica into microbatches, in order; the last one may be smaller.

    Raises:
        ValueError: the size of a microbatch is not positive.
    """
    if micro_batch_size < 1:
        raise ValueError(f"micro_batch_size is {micro_batch_size}; it must be at least 1")
    return [
        samples[start : start + micro_batch_size]
        for start in range(0, len(samples), micro_batch_size)
    ]


def sample_offsets(
    seed: int, step: int, global_batch_size: int, corpus_bytes: int, seq_length: int
) -> npt.NDArray[np.int64]:
    """Places in the corpus, in bytes, where the samples of a step start.

    A sample is seq_length + 1 bytes long (inputs, and the labels one byte later) and lies within
    the corpus. Sample i does not depend on the size of the batch.

    Raises:
        ValueError: the corpus is shorter than one sample, or seed or step is outside 0..2**64-1.
    """
    places = corpus_bytes - seq_length
    if places < 1:
        raise ValueError(
            f"the corpus has {corpus_bytes} bytes, but a sample has seq_length + 1 ="
            f" {seq_length + 1}; use more data, or set train.seq_length to {corpus_bytes - 1} or"
            " less"
        )
    if not (0 <= seed < 2**64 and 0 <= step < 2**64):
        raise ValueError(f"seed {seed} and step {step} must be within 0..2**64-1")
    # The two numbers are the key itself, so no two steps can share a stream. Raw words and a
    # remainder, rather than Generator.integers: numpy promises that the former never change. The
    # remainder favours small offsets by less than places / 2**64, which no run can notice.
    key = np.array([seed, step], dtype=np.uint64)
    words = np.random.Philox(key=key).random_raw(global_batch_size)
    offsets: npt.NDArray[np.int64] = (words % np.uint64(places)).astype(np.int64)
    return offsets


def sample_digest(index: int, tokens: bytes) -> int:
    """64-bit digest of one sample: its index in the global batch, and its bytes."""
    hashed = hashlib.blake2b(index.to_bytes(8, "little"), digest_size=8)
    hashed.update(tokens)
    return int.from_bytes(hashed.digest(), "little")


def combine(digests: Iterable[int]) -> tuple[int, int]:
    """Sums of the upper and of the lower 32-bit halves of 64-bit digests, in any order.

    Both sums are exact as float64, and so is the sum of such pairs over replicas, as long as at
    most 2**21 digests go into the whole.

    Raises:
        ValueError: there are more than 2**21 digests, or one of them is not a 64-bit number.
    """
    upper = lower = 0
    for count, digest in enumerate(digests, start=1):
        if count > MAXIMUM_COMBINED or not 0 <= digest < 2**64:
            raise ValueError(
                f"digest number {count} is {digest}; at most {MAXIMUM_COMBINED} digests within"
                " 0..2**64-1 can be combined exactly"
            )
        upper += digest >> 32
        lower += digest & 0xFFFF_FFFF
    return upper, lower


def format_digest(upper: int, lower: int) -> str:
    """Write combined sums as 28 hexadecimal digits.

    A string, as many JSON readers round whole numbers above 2**53.
    """
    return f"{upper:014x}{lower:014x}"
