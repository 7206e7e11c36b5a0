"""Bugs of published implementations, planted on purpose: a check of this folder must see each.

The list of what was caught, and by what, is printed at the end of the run. Traps of planning are
planted in tests/unit, next to the checks that find them.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
from dense import SHAPE, layout_of
from harness import Cluster, Mismatch
from planted import TRAPS
from test_dense_reference import CASES, check_case
from test_gradient_sync import LAYOUTS, check_sync
from test_reshard import LOST, check_stages, stages_of
from test_salvage_equivalence import check_salvage
from test_training_equivalence import check_training
from test_uneven_layers import ACTIVE, STAGED, VARIANTS, check_layers

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


def staged(name: str, active: tuple[int, ...]) -> Check:
    def stages(cluster: Cluster, trap: str | None) -> None:
        check_layers(cluster, STAGED[name], active, trap)

    return stages


def tied(cluster: Cluster, trap: str | None) -> None:
    check_case(cluster, CASES["pp2_tied_sequence_parallel_recompute"], trap)


def salvaged(cluster: Cluster, trap: str | None) -> None:
    check_salvage(cluster, "second_failure", trap)


def salvaged_tied(cluster: Cluster, trap: str | None) -> None:
    check_salvage(cluster, "tied_across_stages", trap)


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
    ("pipeline_directions_mixed", staged("pp2_interleaved", (0, 1))),
    ("tied_gradients_apart", tied),
    ("sequence_padding_counted", staged("sequence_parallel", (0, 2, 3))),
    ("salvaged_gradients_cleared", salvaged),
    ("salvaged_tied_gradient_counted_twice", salvaged_tied),
]


@pytest.mark.parametrize(
    ("trap", "check"), PLANTED, ids=[f"{trap}-{check.__name__}" for trap, check in PLANTED]
)
def test_planted_bugs_are_caught(
    cluster: Cluster,
    trap: str,
    check: Check,
    record_property: Callable[[str, str], None],
) -> None:
    with pytest.raises(Mismatch) as caught:
        check(cluster, trap)
    record_property("planted bug", f"{trap}, by {check.__name__}: {str(caught.value)[:120]}")


def test_every_trap_is_planted() -> None:
    assert {trap for trap, _ in PLANTED} == set(TRAPS)
