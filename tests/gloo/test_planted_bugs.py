"""Bugs of published implementations, planted on purpose: a check of this folder must see each.

Run with ``-rP`` to see what was caught where.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from dense import SHAPE, layout_of
from harness import Cluster, Mismatch
from planted import TRAPS
from test_gradient_sync import LAYOUTS, check_sync
from test_reshard import LOST, check_stages, stages_of
from test_training_equivalence import check_training
from test_uneven_layers import ACTIVE, VARIANTS, check_layers

Check = Callable[[Cluster, str | None], None]


def sync(cluster: Cluster, trap: str | None) -> None:
    check_sync(cluster, layout_of(SHAPE, 4, *LAYOUTS["4+3"]), trap)


def even_sync(cluster: Cluster, trap: str | None) -> None:
    check_sync(cluster, layout_of(SHAPE, 4, *LAYOUTS["4+4"]), trap)


def reshard(cluster: Cluster, trap: str | None) -> None:
    check_stages(cluster, stages_of(LOST), trap)


def layers(cluster: Cluster, trap: str | None) -> None:
    check_layers(cluster, VARIANTS["gqa_swiglu_rms_untied"], ACTIVE["tp3"], trap)


def training(cluster: Cluster, trap: str | None) -> None:
    check_training(cluster, {}, (3, 1), trap)


PLANTED: list[tuple[str, Check]] = [
    ("row_parallel_flat_prefix", sync),
    ("row_parallel_flat_prefix", reshard),
    ("gate_up_flat_prefix", sync),
    ("gate_up_flat_prefix", reshard),
    ("group_cut", reshard),
    ("vocabulary_shifted", layers),
    ("seeded_per_rank", training),
    ("replicated_skipped", sync),
    ("replicated_skipped", training),
    ("averaged_per_replica", training),
    ("piece_added_twice", sync),
    ("added_before_arrival", sync),
    ("returned_to_another", sync),
    ("sent_after_one_pass", even_sync),
    ("buckets_out_of_order", even_sync),
]


@pytest.mark.parametrize(
    ("trap", "check"), PLANTED, ids=[f"{trap}-{check.__name__}" for trap, check in PLANTED]
)
def test_planted_bugs_are_caught(cluster: Cluster, trap: str, check: Check) -> None:
    with pytest.raises(Mismatch) as caught:
        check(cluster, trap)
    print(f"{trap}, by {check.__name__}: {str(caught.value)[:300]}")


def test_every_trap_is_planted() -> None:
    assert {trap for trap, _ in PLANTED} == set(TRAPS)
