"""Buckets against what they promise: every tensor once, in order, about the right size."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.atoms import Axis, TensorSpec
from ntp.buckets import Bucket, Countdown, plan_buckets
from ntp.model_shape import ModelShape, tensor_specs
from ntp.stages import stage_chunks, stage_specs

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)


@st.composite
def specs(draw: st.DrawFn) -> list[TensorSpec]:
    """Tensors in the order of a flat buffer: tensor-parallel ones first."""
    sharded = draw(st.lists(st.tuples(st.sampled_from(Axis), st.integers(1, 40)), max_size=12))
    replicated = draw(st.lists(st.integers(1, 40), max_size=12))
    return [
        TensorSpec(f"sharded.{i}", axis, (8, size), 0) for i, (axis, size) in enumerate(sharded)
    ] + [TensorSpec(f"replicated.{i}", None, (size,), -1) for i, size in enumerate(replicated)]


@PROPERTY
@given(specs(), st.integers(1, 1000))
def test_every_tensor_is_in_one_bucket_from_last_to_first(
    tensors: list[TensorSpec], bucket_bytes: int
) -> None:
    buckets = plan_buckets(tensors, 4, 8, bucket_bytes)
    kinds = [bucket.replicated for bucket in buckets]
    assert kinds == sorted(kinds), "replicated tensors come last"
    for replicated in (False, True):
        names = [name for b in buckets if b.replicated is replicated for name in b.tensors]
        of_kind = [spec.name for spec in tensors if (spec.axis is None) is replicated]
        assert names == of_kind[::-1]


@PROPERTY
@given(specs(), st.integers(1, 1000))
def test_a_bucket_is_closed_as_soon_as_it_is_full(
    tensors: list[TensorSpec], bucket_bytes: int
) -> None:
    # 8 atoms over 4 slots: a quarter of a tensor. Elements of 8 bytes.
    size = {s.name: (s.shape[0] if s.axis is None else 2 * s.shape[1]) * 8 for s in tensors}
    buckets = plan_buckets(tensors, 4, 8, bucket_bytes)
    for bucket in buckets:
        assert sum(size[name] for name in bucket.tensors[:-1]) < bucket_bytes
    for bucket, behind in pairwise(buckets):
        if bucket.replicated is behind.replicated:
            assert sum(size[name] for name in bucket.tensors) >= bucket_bytes


def test_buckets_of_a_model() -> None:
    shape = ModelShape(1, 16, 4, 4, 4, 32, 64, gated=True, bias=False, tied=False)
    # At degree 2 in float32: embedding and output 2048 bytes each, fc1 2048, fc2 1024, qkv 1536,
    # proj 512; each norm 64.
    assert plan_buckets(_buffer_order(shape), 2, 4, 2500) == (
        Bucket(("output_layer.weight", "decoder.layers.0.mlp.linear_fc2.weight"), False, 0),
        Bucket(
            (
                "decoder.layers.0.mlp.linear_fc1.weight",
                "decoder.layers.0.self_attention.linear_qkv.weight",
            ),
            False,
            1,
        ),
        Bucket(
            (
                "decoder.layers.0.self_attention.linear_proj.weight",
                "embedding.word_embeddings.weight",
            ),
            False,
            2,
        ),
        Bucket(
            (
                "decoder.final_layernorm.weight",
                "decoder.layers.0.pre_mlp_layernorm.weight",
                "decoder.layers.0.input_layernorm.weight",
            ),
            True,
            3,
        ),
    )


def test_a_tensor_of_two_stages_is_alone_and_has_the_same_turn_in_both() -> None:
    shape = ModelShape(2, 16, 4, 4, 4, 32, 64, gated=True, bias=False, tied=True)
    shared = frozenset({"embedding.word_embeddings.weight"})
    found = []
    for stage in range(2):
        chunks = stage_chunks(2, 2, stage, 1)
        specs = sorted(stage_specs(shape, chunks, False), key=lambda spec: spec.axis is None)
        buckets = plan_buckets(specs, 2, 4, 1 << 20, shared)
        found.append([bucket for bucket in buckets if shared & set(bucket.tensors)])
        assert [name for b in buckets for name in b.tensors if not b.replicated] == [
            spec.name for spec in reversed(specs) if spec.axis is not None
        ]
    assert found[0] == found[1] == [Bucket(tuple(shared), False, 0)]


def _buffer_order(shape: ModelShape) -> list[TensorSpec]:
    return sorted(tensor_specs(shape), key=lambda spec: spec.axis is None)


def test_a_size_that_is_not_positive_is_refused() -> None:
    with pytest.raises(ValueError, match="bucket_bytes is 0"):
        plan_buckets([], 4, 8, 0)


@st.composite
def reports(draw: st.DrawFn) -> tuple[list[Bucket], int, list[str]]:
    """Buckets, passes, and the reports of all passes, each pass in any order."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=6))
    buckets = [
        Bucket(tuple(f"{index}.{i}" for i in range(size)), False, index)
        for index, size in enumerate(sizes)
    ]
    names = [name for bucket in buckets for name in bucket.tensors]
    passes = draw(st.integers(1, 3))
    return buckets, passes, [n for _ in range(passes) for n in draw(st.permutations(names))]


@PROPERTY
@given(reports(), st.data())
def test_a_bucket_goes_once_it_and_all_before_it_are_complete(
    case: tuple[list[Bucket], int, list[str]], data: st.DataObject
) -> None:
    buckets, passes, names = case
    countdown = Countdown(buckets, passes)
    kept = data.draw(st.integers(0, len(names)))
    gone: list[int] = []
    for count, name in enumerate(names[:kept], start=1):
        gone += countdown.added(name)
        lacking = [
            index
            for index, bucket in enumerate(buckets)
            if any(names[:count].count(tensor) < passes for tensor in bucket.tensors)
        ]
        assert gone == list(range(min(lacking, default=len(buckets))))
    gone += countdown.rest()
    assert gone == list(range(len(buckets)))
    assert not countdown.rest()


def test_a_gradient_that_changes_after_its_last_pass_is_a_bug() -> None:
    countdown = Countdown([Bucket(("a", "b"), False, 0)], 2)
    for _ in range(2):
        assert not countdown.added("a")
    with pytest.raises(AssertionError, match="a was added to after its last pass"):
        countdown.added("a")


def test_a_bucket_that_is_put_back_goes_before_those_after_it() -> None:
    countdown = Countdown([Bucket((name,), False, 0) for name in "abc"], 1)
    countdown.put_back(countdown.added("a"))
    going = countdown.added("b")
    assert list(going) == [0, 1]
    countdown.put_back(going)
    assert list(countdown.rest()) == [0, 1, 2]
