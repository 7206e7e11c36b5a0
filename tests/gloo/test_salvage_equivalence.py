"""Steps that are interrupted in their middle, and taken up again from the gradients that are left.

Workers are lost while all compute the same step; the others stop behind its backward pass, and the
plan keeps what healthy replicas have. What comes of it is held against one process in one piece on
the same batches.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import pytest
from harness import Cluster
from story import Chapter, Turn, story, story_of
from test_training_equivalence import check_like, configuration, run_story

from elastic.topology import Coordinate
from trainer.config import RunConfig

STEP = 2


@dataclass(frozen=True, slots=True)
class Case:
    """Losses within step 2, one after the other, and how many samples each plan keeps and splits.

    `lost` are the places (replica, stage, slot) that have no worker any more.
    """

    tensor: int
    replicas: int
    lost: tuple[tuple[tuple[int, int, int], ...], ...]
    kept: tuple[int, ...]
    shares: tuple[tuple[int, ...], ...]
    pipeline: int = 1
    chunks: int = 1
    batch: int = 4
    model: Mapping[str, int | bool | str] = field(default_factory=dict)


CASES = {
    "slot_lost": Case(2, 2, (((1, 0, 0),),), (2,), ((1, 1),)),
    "replica_lost": Case(1, 3, (((0, 0, 0),),), (2,), ((1, 0),), batch=3),
    "second_failure": Case(
        2, 3, (((0, 0, 1),), ((0, 0, 1), (1, 0, 0))), (6, 5), ((1, 1, 1), (1, 1, 2)), batch=9
    ),
    "tied_across_stages": Case(
        1,
        2,
        (((1, 1, 0), (1, 0, 0)),),
        (3,),
        ((3,),),
        pipeline=2,
        batch=6,
        model={"untie_embeddings_and_output_weights": False},
    ),
    "nothing_to_compute_in_a_pipeline": Case(
        2,
        2,
        (((1, 0, 0),),),
        (4,),
        ((4, 0),),
        pipeline=2,
        chunks=2,
        batch=8,
        model={"num_layers": 4},
    ),
}


def chapters_of(config: RunConfig, case: Case) -> list[Chapter]:
    turns = [Turn(0, ())]
    for places in case.lost:
        turns.append(Turn(STEP, tuple(Coordinate(*place) for place in places), inside=True))
    return story_of(config, [*turns, Turn(STEP + 2, ())])


def check_salvage(cluster: Cluster, name: str, trap: str | None = None) -> None:
    """Raise Mismatch unless the run of a case has the steps of one replica in one piece."""
    case = CASES[name]
    whole = configuration(1, 1, batch=case.batch, **case.model)
    config = configuration(
        case.tensor,
        case.replicas,
        case.pipeline,
        chunks=case.chunks,
        batch=case.batch,
        **case.model,
    )
    chapters = chapters_of(config, case)
    plans = [chapter.plan for chapter in chapters]
    salvages = [plan.salvage for plan in plans if plan.salvage is not None]
    assert tuple(s.kept_samples for s in salvages) == case.kept
    assert tuple(s.shares for s in salvages) == case.shares
    wanted = run_story(cluster, whole, story(whole, {}))
    got = run_story(cluster, config, chapters, trap)
    check_like(got, wanted)


@pytest.mark.parametrize("name", CASES)
def test_a_step_that_is_taken_up_again_is_the_step_of_a_calm_run(
    cluster: Cluster, name: str
) -> None:
    check_salvage(cluster, name)
