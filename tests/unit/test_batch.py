"""Samples are a pure function of seed and step, splits lose none, digests add up exactly."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.batch import (
    BatchSplit,
    combine,
    even_split,
    format_digest,
    micro_batches,
    replica_samples,
    sample_digest,
    sample_offsets,
)

digests = st.integers(0, 2**64 - 1)


def test_offsets_are_the_same_in_every_version() -> None:
    # Written down once: a change here would change every run's data.
    assert sample_offsets(1234, 0, 4, 1_000_000, 64).tolist() == [13968, 958082, 391958, 59483]


@given(
    seed=st.integers(0, 2**63 - 1),
    step=st.integers(0, 10**9),
    batch=st.integers(1, 64),
    seq_length=st.integers(1, 500),
    spare=st.integers(1, 5000),
)
def test_windows_lie_within_the_corpus(
    seed: int, step: int, batch: int, seq_length: int, spare: int
) -> None:
    corpus_bytes = seq_length + spare
    offsets = sample_offsets(seed, step, batch, corpus_bytes, seq_length)
    assert offsets.dtype == np.int64
    assert offsets.shape == (batch,)
    assert offsets.min() >= 0
    assert offsets.max() + seq_length + 1 <= corpus_bytes


def test_offsets_ignore_global_randomness_and_batch_size() -> None:
    before = sample_offsets(1, 2, 8, 10_000, 16).tolist()
    np.random.seed(0)
    random.seed(0)
    state = np.random.get_state(legacy=True)
    assert sample_offsets(1, 2, 8, 10_000, 16).tolist() == before
    assert str(np.random.get_state(legacy=True)) == str(state)
    assert sample_offsets(1, 2, 3, 10_000, 16).tolist() == before[:3]


def test_every_step_and_seed_has_samples_of_its_own() -> None:
    drawn = {
        tuple(sample_offsets(seed, step, 4, 2**40, 16)) for seed in range(20) for step in range(20)
    }
    assert len(drawn) == 400


def test_the_only_place_in_a_corpus_of_one_sample_is_its_start() -> None:
    assert sample_offsets(1, 2, 5, 17, 16).tolist() == [0] * 5


def test_every_place_is_reached_evenly() -> None:
    counts = np.bincount(sample_offsets(3, 0, 50_000, 20, 10), minlength=10)
    assert len(counts) == 10
    # The standard deviation of a count is 67.
    assert abs(counts - 5000).max() < 400


def test_unusable_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="has 16 bytes, but a sample has seq_length \\+ 1 = 17"):
        sample_offsets(1, 0, 1, 16, 16)
    with pytest.raises(ValueError, match="step -1"):
        sample_offsets(1, -1, 1, 100, 16)


@given(samples=st.lists(st.integers(0, 9), min_size=1, max_size=8).filter(any))
def test_replicas_take_every_sample_once_and_in_order(samples: list[int]) -> None:
    split = BatchSplit(tuple(samples))
    taken = [i for replica in range(len(samples)) for i in replica_samples(split, replica)]
    assert taken == list(range(split.global_batch_size))
    assert [len(replica_samples(split, r)) for r in range(len(samples))] == samples


@given(start=st.integers(0, 9), samples=st.integers(0, 40), size=st.integers(1, 12))
def test_microbatches_are_full_but_for_the_last(start: int, samples: int, size: int) -> None:
    taken = range(start, start + samples)
    cut = micro_batches(taken, size)
    assert [index for each in cut for index in each] == list(taken)
    assert all(len(each) == size for each in cut[:-1])
    assert not cut or 1 <= len(cut[-1]) <= size


def test_a_microbatch_without_samples_is_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size is 0"):
        micro_batches(range(4), 0)


@given(batch=st.integers(1, 500), data=st.data())
def test_even_split_is_even(batch: int, data: st.DataObject) -> None:
    replicas = data.draw(st.integers(1, batch))
    split = even_split(batch, replicas)
    assert split.global_batch_size == batch
    assert len(split.samples) == replicas
    assert max(split.samples) - min(split.samples) <= 1
    assert all(type(count) is int for count in split.samples)


def test_impossible_splits_are_refused() -> None:
    with pytest.raises(ValueError, match="2 samples cannot be split over 3 replicas"):
        even_split(2, 3)
    with pytest.raises(ValueError, match="over 0 replicas"):
        even_split(2, 0)
    for samples in ((), (0, 0), (3, -1)):
        with pytest.raises(ValueError, match="batch split"):
            BatchSplit(samples)
    with pytest.raises(ValueError, match=r"replica 2 is outside 0\.\.1"):
        replica_samples(BatchSplit((1, 1)), 2)


@given(index=st.integers(0, 2**40), tokens=st.binary(max_size=64))
def test_sample_digest_covers_index_and_bytes(index: int, tokens: bytes) -> None:
    digest = sample_digest(index, tokens)
    assert 0 <= digest < 2**64
    assert digest == sample_digest(index, tokens)
    assert digest != sample_digest(index + 1, tokens)
    assert digest != sample_digest(index, tokens + b"\0")


@given(values=st.lists(digests, max_size=40), data=st.data())
def test_combining_is_exact_in_float64_and_free_of_order(
    values: list[int], data: st.DataObject
) -> None:
    upper, lower = combine(values)
    assert (upper << 32) + lower == sum(values)
    assert combine(data.draw(st.permutations(values))) == (upper, lower)
    # As replicas do it: each combines its own, and an all-reduce adds the pairs as float64.
    cut = data.draw(st.integers(0, len(values)))
    parts = np.array([combine(values[:cut]), combine(values[cut:])], dtype=np.float64)
    total = parts.sum(axis=0)
    assert (int(total[0]), int(total[1])) == (upper, lower)


def test_the_largest_combination_still_fits_float64() -> None:
    upper, lower = combine([2**64 - 1] * 1000)
    assert float(upper) == upper == lower
    assert (2**32 - 1) * 2**21 < 2**53


def test_only_64_bit_digests_combine() -> None:
    for wrong in (-1, 2**64):
        with pytest.raises(ValueError, match="digest number 2"):
            combine([0, wrong])


def test_digests_are_written_at_full_width() -> None:
    assert format_digest(1, 2) == "0000000000000100000000000002"
    assert len(format_digest(2**53 - 1, 2**53 - 1)) == 28
