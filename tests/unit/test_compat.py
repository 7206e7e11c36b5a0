"""Megatron's vocabulary: numbers frozen from its own algorithms, and properties where it has none.

The frozen numbers come from Megatron-LM's branch dev, run once; they are facts about it, so a
change here must not be answered by changing them.
"""

from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.atoms import AtomCounts
from ntp.compat import (
    NonuniformTPConfig,
    RankKey,
    SlotsByRank,
    compute_uniform_tp_spares_with_parity,
    config_from_layout,
    get_active_ranks_for_dp,
    layout_from_config,
    layout_from_faults,
)
from ntp.geometry import ParallelLayout, SlotRef, full_layout, vacate

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)
COUNTS = AtomCounts(kv_groups=16, mlp_columns=171, vocab_rows=257)


def active_slots(layout: ParallelLayout) -> dict[int, tuple[int, ...]]:
    return {replica.replica: replica.active for replica in layout.replicas}


# --- parity padding and active ranks --------------------------------------------------------------

# faulty_gpu_map, tp_base, tp_spares, non_active as Megatron computes them.
MEGATRON_PARITY: list[tuple[dict[Any, list[int]], int, int, dict[Any, list[int]]]] = [
    ({}, 8, 0, {}),
    ({0: []}, 8, 0, {0: []}),
    ({0: [2, 5], 1: [1, 3]}, 8, 2, {0: [2, 5], 1: [1, 3]}),
    ({0: [2, 5], 1: [1]}, 8, 2, {0: [2, 5], 1: [1, 7]}),
    ({3: [7], 1: [6, 7, 0]}, 8, 3, {3: [5, 6, 7], 1: [0, 6, 7]}),
    ({0: [3], 1: []}, 4, 1, {0: [3], 1: [3]}),
    ({0: [5, 1]}, 8, 2, {0: [1, 5]}),
    ({(0, 0, 0): [0, 3], (0, 1, 0): [1]}, 8, 2, {(0, 0, 0): [0, 3], (0, 1, 0): [1, 7]}),
]


@pytest.mark.parametrize(("faulty", "base", "spares", "non_active"), MEGATRON_PARITY)
def test_parity_padding_is_megatrons(
    faulty: dict[Any, list[int]], base: int, spares: int, non_active: dict[Any, list[int]]
) -> None:
    assert compute_uniform_tp_spares_with_parity(faulty, base) == (spares, non_active)


def test_parity_padding_counts_a_fault_once() -> None:
    assert compute_uniform_tp_spares_with_parity({0: [2, 2]}, 8) == (1, {0: [2]})


@pytest.mark.parametrize(
    ("faulty", "message"),
    [
        ({0: [4]}, r"0 names slots \[4\]; with tp_base 4 they are 0..3"),
        ({0: [-1]}, r"0 names slots \[-1\]"),
        ({0: [0, 1, 2, 3]}, "4 spares of tp_base 4"),
        ({-1: [0]}, "key -1 must be"),
        ({(0, 1): [0]}, r"key \(0, 1\) must be a dp rank or \(dp, cp, pp\)"),
        ({(0, 0, -2): [0]}, r"key \(0, 0, -2\) must be"),
        ({(): [0]}, r"key \(\) must be"),
    ],
)
def test_parity_padding_refuses_what_does_not_exist(
    faulty: dict[Any, list[int]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compute_uniform_tp_spares_with_parity(faulty, 4)


BY_PREFIX = NonuniformTPConfig(tp_base=8, tp_spares=2, num_reduced_tp_dp_ranks=2)
BY_REPLICA = NonuniformTPConfig(8, 2, non_active_ranks_per_dp={0: [5, 2]})
BY_STAGE = NonuniformTPConfig(8, 2, non_active_ranks_per_dp={(1, 2, 0): [0, 7], 1: [3, 4]})
ALL = list(range(8))


@pytest.mark.parametrize(
    ("config", "stage", "expected"),
    [
        # As Megatron has it.
        (BY_PREFIX, (0, 0, 0), [0, 1, 2, 3, 4, 5]),
        (BY_PREFIX, (1, 1, 3), [0, 1, 2, 3, 4, 5]),
        (BY_REPLICA, (0, 0, 0), [0, 1, 3, 4, 6, 7]),
        (BY_REPLICA, (0, 3, 1), [0, 1, 3, 4, 6, 7]),
        (BY_STAGE, (1, 2, 0), [1, 2, 3, 4, 5, 6]),
        (BY_STAGE, (1, 2, 1), [0, 1, 2, 5, 6, 7]),
        # It has 0..5 for these, all of which are full.
        (BY_PREFIX, (2, 0, 0), ALL),
        (BY_REPLICA, (1, 0, 0), ALL),
        (BY_STAGE, (0, 2, 0), ALL),
    ],
)
def test_active_ranks(
    config: NonuniformTPConfig, stage: tuple[int, int, int], expected: list[int]
) -> None:
    dp, cp, pp = stage
    assert get_active_ranks_for_dp(dp, 8, config, cp_rank=cp, pp_rank=pp) == expected


def test_active_ranks_need_the_configs_degree() -> None:
    with pytest.raises(ValueError, match="tp_base 4 is not the config's 8"):
        get_active_ranks_for_dp(0, 4, BY_PREFIX)


# --- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_base": 0}, "0 spares of tp_base 0"),
        ({"tp_base": 4, "tp_spares": 4}, "4 spares of tp_base 4 .* use 0 to 3"),
        ({"tp_spares": -1}, "-1 spares of tp_base 8"),
        ({"num_reduced_tp_dp_ranks": -1}, "num_reduced_tp_dp_ranks is -1; use 0"),
        (
            {"tp_spares": 2, "non_active_ranks_per_dp": {0: [2, 5], 1: [1]}},
            r"\[1\] names 1 slots \(1,\) where tp_spares is 2.*layout_from_faults",
        ),
        ({"tp_spares": 2, "non_active_ranks_per_dp": {0: [2, 2]}}, "names 1 slots"),
        ({"tp_spares": 0, "non_active_ranks_per_dp": {0: [2]}}, "names 1 slots .* tp_spares is 0"),
        ({"tp_spares": 1, "non_active_ranks_per_dp": {0: [8]}}, r"slots \[8\]; with tp_base 8"),
        ({"tp_spares": 1, "non_active_ranks_per_dp": {(0, 0): [1]}}, r"key \(0, 0\) must be"),
    ],
)
def test_config_refuses(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        NonuniformTPConfig(**fields)


def test_config_is_frozen_and_keeps_its_own_map() -> None:
    slots = {0: [5, 2]}
    config = NonuniformTPConfig(8, 2, 1, slots)
    slots[0].append(7)
    slots[1] = [0, 1]
    assert config.non_active_ranks_per_dp == {0: (2, 5)}
    with pytest.raises(FrozenInstanceError):
        config.tp_base = 4  # type: ignore[misc]


def test_config_defaults_are_megatrons() -> None:
    assert NonuniformTPConfig() == NonuniformTPConfig(8, 0, 1, None)


# --- layouts --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (NonuniformTPConfig(4), {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}),
        (NonuniformTPConfig(4, 1, 2), {0: (0, 1, 2), 1: (0, 1, 2), 2: (0, 1, 2, 3)}),
        (NonuniformTPConfig(4, 1, 2, {}), {0: (0, 1, 2), 1: (0, 1, 2), 2: (0, 1, 2, 3)}),
        (NonuniformTPConfig(4, 1, 0), {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}),
        (NonuniformTPConfig(4, 0, 9), {0: (0, 1, 2, 3), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3)}),
        # The map decides, whatever num_reduced_tp_dp_ranks says.
        (
            NonuniformTPConfig(4, 2, 1, {1: [0, 2], 2: [3, 1]}),
            {0: (0, 1, 2, 3), 1: (1, 3), 2: (0, 2)},
        ),
        # Out in any stage is out in all.
        (
            NonuniformTPConfig(4, 1, 1, {(0, 0, 0): [1], (0, 1, 3): [2], (2, 0, 1): [0]}),
            {0: (0, 3), 1: (0, 1, 2, 3), 2: (1, 2, 3)},
        ),
        (
            NonuniformTPConfig(4, 1, 1, {0: [1], (0, 1, 3): [2]}),
            {0: (0, 3), 1: (0, 1, 2, 3), 2: (0, 1, 2, 3)},
        ),
    ],
)
def test_config_becomes_a_layout(
    config: NonuniformTPConfig, expected: dict[int, tuple[int, ...]]
) -> None:
    layout = layout_from_config(config, COUNTS, replicas=3)
    assert active_slots(layout) == expected
    assert layout.tp_base == 4


def test_a_layout_from_a_config_is_what_losing_the_slot_makes() -> None:
    config = NonuniformTPConfig(8, 1, non_active_ranks_per_dp={1: [2]})
    lost = vacate(full_layout(COUNTS, 8, 2), SlotRef(1, 2))
    assert layout_from_config(config, COUNTS, replicas=2) == lost
    assert layout_from_faults({1: [2]}, COUNTS, 8, replicas=2) == lost


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (NonuniformTPConfig(4, 1, 4), r"replicas \[3\] are to lose slots, but there are 3"),
        (NonuniformTPConfig(4, 1, 1, {5: [0], (3, 0, 0): [1]}), r"replicas \[3, 5\]"),
        (
            NonuniformTPConfig(4, 2, 1, {(1, 0, 0): [0, 3], (1, 1, 0): [1, 2]}),
            "each of the 4 slots of replica 1 is out in one of its stages; exchange devices",
        ),
        (NonuniformTPConfig(17), "16 kv_group atoms cannot fill 17 slots"),
    ],
)
def test_config_without_a_layout(config: NonuniformTPConfig, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layout_from_config(config, COUNTS, replicas=3)


def test_faults_cost_only_the_faulty_devices() -> None:
    faults = {0: [2, 5], 1: [1], 3: []}
    layout = layout_from_faults(faults, COUNTS, tp_base=8, replicas=4)
    assert active_slots(layout) == {
        0: (0, 1, 3, 4, 6, 7),
        1: (0, 2, 3, 4, 5, 6, 7),
        2: tuple(ALL),
        3: tuple(ALL),
    }
    spares, non_active = compute_uniform_tp_spares_with_parity(faults, 8)
    padded = layout_from_config(NonuniformTPConfig(8, spares, 3, non_active), COUNTS, replicas=4)
    assert [replica.degree for replica in padded.replicas] == [6, 6, 8, 6]


def test_a_replica_without_a_healthy_slot_takes_no_part() -> None:
    faults: SlotsByRank = {0: [1, 0], (2, 0, 0): [0], (2, 0, 1): [1]}
    assert active_slots(layout_from_faults(faults, COUNTS, 2, replicas=3)) == {1: (0, 1)}
    with pytest.raises(ValueError, match="none of 1 replicas has a healthy slot"):
        layout_from_faults({0: [0, 1]}, COUNTS, 2, replicas=1)
    with pytest.raises(ValueError, match=r"replicas \[3\] are to lose slots, but there are 3"):
        layout_from_faults({3: [0]}, COUNTS, 2, replicas=3)


@st.composite
def fault_maps(draw: st.DrawFn) -> tuple[dict[RankKey, list[int]], int, int]:
    """(faults by replica or stage, tp_base, replicas); a stage keeps at least one slot."""
    base, replicas = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    dp = st.integers(0, replicas - 1)
    keys = dp | st.tuples(dp, st.integers(0, 1), st.integers(0, 2))
    slots = st.lists(st.integers(0, base - 1), max_size=base - 1, unique=True)
    return draw(st.dictionaries(keys, slots, max_size=6)), base, replicas


@PROPERTY
@given(fault_maps())
def test_every_whole_slot_stays_active(case: tuple[dict[RankKey, list[int]], int, int]) -> None:
    faults, base, replicas = case
    faulty = {
        (key[0] if isinstance(key, tuple) else key, slot)
        for key, slots in faults.items()
        for slot in slots
    }
    expected: dict[int, tuple[int, ...]] = {}
    for dp in range(replicas):
        if healthy := tuple(slot for slot in range(base) if (dp, slot) not in faulty):
            expected[dp] = healthy
    if not expected:
        with pytest.raises(ValueError, match="healthy slot"):
            layout_from_faults(faults, COUNTS, base, replicas)
        return
    assert active_slots(layout_from_faults(faults, COUNTS, base, replicas)) == expected


@PROPERTY
@given(fault_maps())
def test_padding_reaches_parity_and_loses_no_fault(
    case: tuple[dict[RankKey, list[int]], int, int],
) -> None:
    faults, base, _ = case
    spares, non_active = compute_uniform_tp_spares_with_parity(faults, base)
    config = NonuniformTPConfig(base, spares, non_active_ranks_per_dp=non_active)
    assert spares == max(map(len, faults.values()), default=0)
    assert list(non_active) == list(faults)
    for key, slots in faults.items():
        assert set(slots) <= set(non_active[key])
        stage = key if isinstance(key, tuple) else (key, 9, 9)
        dp, cp, pp = stage
        active = get_active_ranks_for_dp(dp, base, config, cp, pp)
        assert active == [slot for slot in range(base) if slot not in non_active[key]]


# --- and back -------------------------------------------------------------------------------------


@st.composite
def configs(draw: st.DrawFn) -> tuple[NonuniformTPConfig, int]:
    """(config that Megatron can run by its groups, replicas), with and without a map."""
    base, replicas = draw(st.integers(1, 8)), draw(st.integers(1, 5))
    spares, reduced = draw(st.integers(0, base - 1)), draw(st.integers(0, replicas))
    slots = st.permutations(range(base)).map(lambda order: order[:spares])
    listed = {dp: draw(slots) for dp in range(reduced)} if draw(st.booleans()) else None
    return NonuniformTPConfig(base, spares, reduced, listed), replicas


@PROPERTY
@given(configs())
def test_configs_survive_the_round_trip(case: tuple[NonuniformTPConfig, int]) -> None:
    config, replicas = case
    layout = layout_from_config(config, COUNTS, replicas)
    returned = config_from_layout(layout)
    assert layout_from_config(returned, COUNTS, replicas) == layout
    for dp in range(replicas):
        before = get_active_ranks_for_dp(dp, config.tp_base, config)
        assert get_active_ranks_for_dp(dp, config.tp_base, returned) == before
    if config.non_active_ranks_per_dp and config.tp_spares:
        assert returned == config
    assert config_from_layout(layout_from_config(returned, COUNTS, replicas)) == returned


@PROPERTY
@given(fault_maps())
def test_a_layout_has_a_config_exactly_if_one_degree_and_the_lowest_replicas_are_reduced(
    case: tuple[dict[RankKey, list[int]], int, int],
) -> None:
    faults, base, replicas = case
    try:
        layout = layout_from_faults(faults, COUNTS, base, replicas)
    except ValueError:
        return
    degrees = [replica.degree for replica in layout.replicas]
    first = degrees[0]
    reduced = degrees.count(first)
    prefix = degrees == [first] * reduced + [base] * (len(degrees) - reduced)
    if prefix and list(active_slots(layout)) == list(range(len(degrees))):
        again = layout_from_config(config_from_layout(layout), COUNTS, len(degrees))
        assert active_slots(again) == active_slots(layout)
    else:
        with pytest.raises(ValueError, match="Megatron"):
            config_from_layout(layout)


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ({0: [0], 1: [0, 1]}, r"degrees \[2, 3\] of 4; .* until all of them have 2"),
        ({2: [1]}, r"replicas \[2\] are reduced; .* make these 0..0"),
        ({0: [1], 2: [1]}, r"replicas \[0, 2\] are reduced; .* make these 0..1"),
        ({1: [0, 1, 2, 3]}, r"has replicas \[0, 2\]; .* number them 0..1"),
    ],
)
def test_what_megatron_cannot_express(faults: dict[int, list[int]], message: str) -> None:
    layout = layout_from_faults(faults, COUNTS, 4, replicas=3)
    with pytest.raises(ValueError, match=message):
        config_from_layout(layout)


def test_a_config_from_a_layout_has_megatrons_fields() -> None:
    layout = layout_from_faults({0: [2, 5], 1: [1, 7]}, COUNTS, 8, replicas=3)
    assert config_from_layout(layout) == NonuniformTPConfig(
        tp_base=8,
        tp_spares=2,
        num_reduced_tp_dp_ranks=2,
        non_active_ranks_per_dp={0: (2, 5), 1: (1, 7)},
    )
    assert config_from_layout(full_layout(COUNTS, 8, 3)) == NonuniformTPConfig(tp_base=8)
