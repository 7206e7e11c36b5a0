"""Whole steps of two replicas at TP2 against one in one piece, on the same global batches."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
from harness import Cluster, Mismatch
from story import Chapter, members_of, story, story_rank

from elastic.messages import StepDone
from elastic.topology import Coordinate
from trainer.config import RunConfig

STEPS = 5
TOLERANCE = 1e-12


def configuration(
    tensor: int,
    replicas: int,
    pipeline: int = 1,
    *,
    chunks: int = 1,
    batch: int = 4,
    **model: int | bool | str,
) -> RunConfig:
    """A run in float64 with a large learning rate, weight decay and clipping that bites."""
    return RunConfig.model_validate(
        {
            "cluster": {"devices_per_node": tensor * replicas * pipeline},
            "parallel": {
                "tensor": tensor,
                "replicas": replicas,
                "pipeline": pipeline,
                "virtual_pipeline": chunks,
            },
            "model": {
                "num_layers": 2,
                "hidden_size": 32,
                "num_attention_heads": 6,
                "num_query_groups": 3,
                "kv_channels": 4,
                "ffn_hidden_size": 53,
                "vocab_size": 257,
                "add_bias_linear": True,
                **model,
            },
            "data": {"kind": "text", "path": __file__},
            "train": {
                "steps": STEPS,
                "global_batch_size": batch,
                "micro_batch_size": 1,
                "seq_length": 16,
                "learning_rate": 1e-2,
                "warmup_steps": 2,
                "weight_decay": 0.1,
                "clip_grad": 0.3,
                "dtype": "float64",
            },
        }
    )


def run_story(
    cluster: Cluster, config: RunConfig, chapters: list[Chapter], trap: str | None = None
) -> list[StepDone]:
    """The steps' reports, after checking that all ranks say the same and replicas are equal."""
    told = cluster.run(story_rank, len(members_of(chapters)), config, chapters, trap)
    reports = [rank.steps for rank in told]
    steps = []
    for step in range(config.train.steps):
        said = [done for rank in reports for done in rank if done.step == step]
        figures = {(d.loss, d.grad_norm, d.tokens, d.sample_digest) for d in said}
        if len(figures) != 1:
            raise Mismatch(f"step {step}: ranks report {figures}")
        digests: dict[int, list[StepDone]] = {}
        for done in said:
            digests.setdefault(done.replica, []).append(done)
        wholes = {
            (sum(d.sharded_digest or 0 for d in mine) % 2**64, *{d.replicated_digest for d in mine})
            for mine in digests.values()
        }
        if len(wholes) != 1:
            raise Mismatch(f"step {step}: replicas differ, digests {wholes}")
        steps.append(said[0])
    return steps


def check_training(
    cluster: Cluster,
    absent: Mapping[int, tuple[Coordinate, ...]],
    split: tuple[int, ...] | None = None,
    trap: str | None = None,
) -> None:
    """Raise Mismatch unless the run's steps are those of one replica in one piece."""
    whole = configuration(1, 1)
    wanted = run_story(cluster, whole, story(whole, {}))
    config = configuration(2, 2)
    got = run_story(cluster, config, story(config, absent, split), trap)
    check_like(got, wanted)


def check_like(got: list[StepDone], wanted: list[StepDone]) -> None:
    """Raise Mismatch unless steps consumed the samples of those wanted, and came to the same."""
    assert wanted[0].loss - wanted[-1].loss > 0.05, "nothing is learned: the check would be blind"
    for ours, theirs in zip(got, wanted, strict=True):
        if ours.sample_digest != theirs.sample_digest or ours.tokens != theirs.tokens:
            raise Mismatch(f"step {ours.step} consumed other samples")
        for what in ("loss", "grad_norm"):
            value, reference = getattr(ours, what), getattr(theirs, what)
            if not abs(value - reference) <= TOLERANCE * abs(reference):
                raise Mismatch(f"step {ours.step}: {what} {value!r} instead of {reference!r}")


SLOT = Coordinate(1, 0, 0)


@pytest.mark.parametrize("split", [(2, 2), (3, 1)])
def test_two_replicas_are_one(cluster: Cluster, split: tuple[int, ...]) -> None:
    check_training(cluster, {}, split)


def test_a_reduced_replica_changes_nothing(cluster: Cluster) -> None:
    check_training(cluster, {2: (SLOT,), 4: ()})


def test_a_dropped_replica_changes_nothing(cluster: Cluster) -> None:
    check_training(cluster, {1: (SLOT, Coordinate(1, 0, 1)), 3: (SLOT,), 4: ()})


def moving_story(config: RunConfig, absent: Mapping[int, tuple[Coordinate, ...]]) -> list[Chapter]:
    """A story in which a survivor takes another place."""
    chapters = story(config, absent)
    assert any(chapter.plan.movers for chapter in chapters), [c.plan.reason for c in chapters]
    return chapters


@pytest.mark.parametrize(
    ("tensor", "pipeline", "absent"),
    [
        # TP3 + TP3 become TP4 + TP2.
        (4, 1, (Coordinate(0, 0, 3), Coordinate(1, 0, 2))),
        # A slot that lost a stage in either replica: the idle stage of one heals the other.
        (2, 2, (Coordinate(0, 0, 1), Coordinate(1, 1, 0))),
        (2, 2, (Coordinate(0, 0, 1), Coordinate(1, 0, 0))),
    ],
)
def test_workers_that_change_their_place_change_nothing(
    cluster: Cluster, tensor: int, pipeline: int, absent: tuple[Coordinate, ...]
) -> None:
    # So that two slots of four are half as fast as all, and three no faster than two.
    heads = {"num_attention_heads": 4, "num_query_groups": 4, "kv_channels": 40}
    whole = configuration(1, 1, **heads)
    config = configuration(tensor, 2, pipeline, **heads)
    wanted = run_story(cluster, whole, story(whole, {}))
    got = run_story(cluster, config, moving_story(config, {2: absent, 4: ()}))
    for ours, theirs in zip(got, wanted, strict=True):
        assert ours.sample_digest == theirs.sample_digest
        assert ours.loss == pytest.approx(theirs.loss, rel=TOLERANCE)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=TOLERANCE)
