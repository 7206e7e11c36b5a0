"""The splits by which spares send to core slots: Megatron's where those are defined and right.

The frozen numbers come from Megatron-LM's branch dev, run once; they are facts about it, so a
change here must not be answered by changing them.
"""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ntp.atoms import AtomCounts, Axis
from ntp.compat import NonuniformTPConfig, layout_from_config, ntp_splits

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)

# (num_shards, local_extent, tp_base, tp_spares) -> what each spare sends to each core, as Megatron
# computes it. Both degrees divide num_shards.
MEGATRON_SPLITS = {
    (12, 3, 4, 1): [[1, 1, 1]],
    (24, 48, 8, 2): [[16, 16, 16, 0, 0, 0], [0, 0, 0, 16, 16, 16]],
    (24, 384, 8, 2): [[128, 128, 128, 0, 0, 0], [0, 0, 0, 128, 128, 128]],
    (12, 6, 4, 2): [[4, 2], [2, 4]],
    (8, 2, 4, 2): [[1, 1], [1, 1]],
    (56, 14, 8, 1): [[2, 2, 2, 2, 2, 2, 2]],
    (40, 5, 8, 3): [[1, 1, 1, 1, 1]] * 3,
    (6, 6, 2, 1): [[6]],
    (30, 10, 6, 4): [[6, 4], [4, 6], [6, 4], [4, 6]],
    (24, 3, 8, 4): [[1, 1, 1, 0], [1, 1, 0, 1], [1, 0, 1, 1], [0, 1, 1, 1]],
    (24, 12, 4, 3): [[12]] * 3,
}


@pytest.mark.parametrize(("sizes", "sent"), MEGATRON_SPLITS.items())
def test_splits_are_megatrons_where_both_degrees_divide(
    sizes: tuple[int, int, int, int], sent: list[list[int]]
) -> None:
    send, recv = ntp_splits(*sizes)
    _, _, base, spares = sizes
    idle = [[0] * base] * (base - spares)
    assert send == idle + [row + [0] * spares for row in sent]
    assert recv == [[send[source][target] for source in range(base)] for target in range(base)]


@pytest.mark.parametrize(
    ("sizes", "sent", "megatron"),
    [
        # It chunks 8 heads into 4 pairs for 7 ranks, and finds no fifth.
        ((8, 1, 8, 1), [[1, 0, 0, 0, 0, 0, 0]], "IndexError"),
        # It fills 4, 4, 2 where a reduced replica holds 4, 3, 3.
        ((10, 3, 4, 1), [[1, 0, 1]], "[[1, 1, 0]]"),
        # It leaves one of slot 2's three shards out.
        ((11, 3, 4, 2), [[2, 1], [1, 1]], "[[1, 1], [1, 1]]"),
    ],
)
def test_splits_where_megatron_is_wrong(
    sizes: tuple[int, int, int, int], sent: list[list[int]], megatron: str
) -> None:
    _, _, base, spares = sizes
    send, _ = ntp_splits(*sizes)
    assert [row[: base - spares] for row in send[base - spares :]] == sent
    assert str(sent) != megatron


@st.composite
def split_sizes(draw: st.DrawFn) -> tuple[int, int, int, int]:
    """(num_shards, extent of one shard, tp_base, tp_spares), any remainder."""
    base = draw(st.integers(1, 16))
    return (
        draw(st.integers(base, 300)),
        draw(st.integers(1, 5)),
        base,
        draw(st.integers(0, base - 1)),
    )


@PROPERTY
@given(split_sizes())
def test_every_shard_sent_arrives_once_and_totals_balance(sizes: tuple[int, int, int, int]) -> None:
    shards, extent, base, spares = sizes
    home = [shards // base + (slot < shards % base) for slot in range(base)]
    send, recv = ntp_splits(shards, home[0] * extent, base, spares)
    cores = base - spares

    assert [[row[slot] for row in send] for slot in range(base)] == recv
    assert all(length % extent == 0 and length >= 0 for row in send for length in row)
    assert [sum(row) for row in send] == [0] * cores + [size * extent for size in home[cores:]]
    assert all(not any(row) for row in recv[cores:])
    totals = [home[core] + sum(recv[core]) // extent for core in range(cores)]
    assert sum(totals) == shards
    assert max(totals) - min(totals) <= 1


@PROPERTY
@given(split_sizes())
def test_splits_deal_one_shard_at_a_time(sizes: tuple[int, int, int, int]) -> None:
    shards, extent, base, spares = sizes
    home = [shards // base + (slot < shards % base) for slot in range(base)]
    held = home[: base - spares]
    dealt = [[0] * base for _ in range(base)]
    turn = 0
    for slot in range(base - spares, base):
        for _ in range(home[slot]):
            while held[turn] > min(held):
                turn = (turn + 1) % len(held)
            held[turn] += 1
            dealt[slot][turn] += extent
            turn = (turn + 1) % len(held)
    assert ntp_splits(shards, home[0] * extent, base, spares)[0] == dealt


@PROPERTY
@given(split_sizes())
def test_splits_end_in_the_shares_of_the_reduced_layout(sizes: tuple[int, int, int, int]) -> None:
    shards, _, base, spares = sizes
    counts = AtomCounts(kv_groups=base, mlp_columns=shards, vocab_rows=base)
    layout = layout_from_config(NonuniformTPConfig(base, spares), counts, replicas=2)
    reduced, full = (layout.replica(number).shards for number in (0, 1))
    local = full.local_atoms(Axis.MLP_COLUMN, 0)
    _, recv = ntp_splits(shards, local, base, spares)
    for core in range(base - spares):
        home = full.local_atoms(Axis.MLP_COLUMN, core)
        assert home + sum(recv[core]) == reduced.local_atoms(Axis.MLP_COLUMN, core)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((7, 1, 8, 1), "7 shards cannot fill 8 slots; lower tp_base to 7"),
        ((24, 7, 8, 2), "local_extent 7 is no positive multiple of the 3 shards"),
        ((24, 0, 8, 2), "local_extent 0 is no positive multiple"),
        ((257, 64, 4, 1), "local_extent 64 is no positive multiple of the 65 shards"),
        ((24, 3, 8, 8), "8 spares of tp_base 8"),
        ((24, 3, 8, -1), "-1 spares of tp_base 8"),
        ((24, 3, 0, 0), "0 spares of tp_base 0"),
    ],
)
def test_splits_refuse_sizes_that_cut_atoms(sizes: tuple[int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ntp_splits(*sizes)
