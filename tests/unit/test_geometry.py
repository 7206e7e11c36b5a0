"""Layouts against dense oracles: one owner per atom, written out as lists."""

from dataclasses import replace
from itertools import combinations, pairwise

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import axes, histories, owners

from ntp.atoms import AtomCounts, Axis
from ntp.geometry import (
    AxisShards,
    ParallelLayout,
    Range,
    ReplicaLayout,
    SlotRef,
    full_layout,
    heal,
    merged,
    vacate,
    with_active,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100)


def toggled(before: ParallelLayout, after: ParallelLayout) -> tuple[SlotRef, bool]:
    """The slot that differs, and whether it was lost."""
    (slot,) = set(before.slots()) ^ set(after.slots())
    return slot, slot in before.slots()


@PROPERTY
@given(histories())
def test_owned_once_balanced_and_anchored(history: list[ParallelLayout]) -> None:
    for layout in history:
        for replica in layout.replicas:
            for axis in axes(layout):
                dense = owners(replica, axis)
                sizes = [dense.count(slot) for slot in replica.active]
                assert sorted(set(dense)) == list(replica.active)
                assert max(sizes) - min(sizes) <= 1
                assert sizes == [replica.shards.local_atoms(axis, slot) for slot in replica.active]
                for slot in replica.active:
                    home = history[0].replicas[0].shards.owned(axis, slot)[0]
                    assert replica.shards.owned(axis, slot)[0] == home


@PROPERTY
@given(histories())
def test_only_lost_atoms_move_and_only_there(history: list[ParallelLayout]) -> None:
    for before, after in pairwise(history):
        changed, lost = toggled(before, after)
        for replica in before.replicas:
            if replica.replica != changed.replica:
                assert after.replica(replica.replica) is replica
            elif lost:
                for axis in axes(before):
                    for old, new in zip(
                        owners(replica, axis),
                        owners(after.replica(replica.replica), axis),
                        strict=True,
                    ):
                        assert old == new or old == changed.slot


def fewest_moves(replica: ReplicaLayout, axis: Axis, active: tuple[int, ...]) -> int:
    """Fewest atoms that change owner, over all balanced ways to place the orphans."""
    shards = replica.shards.axis(axis)
    dense = owners(replica, axis)
    home_of = [slot for slot, home in enumerate(shards.home) for _ in range(len(home))]
    orphans = [atom for atom, home in enumerate(home_of) if home not in active]
    anchored = sum(dense[a] != h for a, h in enumerate(home_of) if h in active)
    share, bigger = divmod(shards.atoms, len(active))
    kept = []
    for favoured in combinations(active, bigger):
        room = {s: share + (s in favoured) - len(shards.home[s]) for s in active}
        if min(room.values()) >= 0:
            held = {s: sum(dense[atom] == s for atom in orphans) for s in active}
            kept.append(sum(min(room[s], held[s]) for s in active))
    return anchored + len(orphans) - max(kept)


@PROPERTY
@given(histories(), st.data())
def test_any_change_of_active_slots_moves_least(
    history: list[ParallelLayout], data: st.DataObject
) -> None:
    replica = history[-1].replicas[0]
    slots = st.sets(st.integers(0, history[0].tp_base - 1), min_size=1)
    active = tuple(sorted(data.draw(slots)))
    changed = with_active(replica, active)
    for axis in axes(history[0]):
        before, after = owners(replica, axis), owners(changed, axis)
        sizes = [after.count(slot) for slot in active]
        assert sum(sizes) == len(after)
        assert max(sizes) - min(sizes) <= 1
        moved = sum(old != new for old, new in zip(before, after, strict=True))
        assert moved == fewest_moves(replica, axis, active)
    assert with_active(changed, active) is changed


@PROPERTY
@given(histories())
def test_healing_everything_restores_the_full_layout(history: list[ParallelLayout]) -> None:
    full, layout = history[0], history[-1]
    for slot in sorted(set(full.slots()) - set(layout.slots()), reverse=True):
        layout = heal(layout, slot)
    assert layout == full


@PROPERTY
@given(histories())
def test_offsets_and_holders(history: list[ParallelLayout]) -> None:
    for replica in history[-1].replicas:
        for axis in axes(history[0]):
            shards = replica.shards.axis(axis)
            dense = owners(replica, axis)
            for slot in replica.active:
                local = [a for p in shards.owned[slot] for a in range(p.start, p.stop)]
                for atom in local:
                    offset = replica.shards.offset_of(axis, slot, Range(atom, atom + 1))
                    assert local[offset] == atom
            for home in shards.home:
                pieces = shards.holders(home)
                assert merged(piece for _, piece in pieces) == (home,)
                for slot, piece in pieces:
                    assert set(dense[piece.start : piece.stop]) == {slot}
                    assert any(own.contains(piece) for own in shards.owned[slot])


@PROPERTY
@given(histories())
def test_layouts_survive_json(history: list[ParallelLayout]) -> None:
    encoded = msgspec.json.encode(history[-1])
    assert msgspec.json.decode(encoded, type=ParallelLayout) == history[-1]


def test_homes_and_first_loss() -> None:
    layout = full_layout(AtomCounts(4, 10, 11), 4, 2)
    homes = layout.replicas[0].shards.axis(Axis.MLP_COLUMN).home
    assert homes == (Range(0, 3), Range(3, 6), Range(6, 8), Range(8, 10))
    shards = vacate(layout, SlotRef(1, 1)).replica(1).shards
    assert shards.owned(Axis.MLP_COLUMN, 0) == (Range(0, 3), Range(3, 4))
    assert shards.owned(Axis.MLP_COLUMN, 1) == ()
    assert shards.offset_of(Axis.MLP_COLUMN, 2, Range(4, 5)) == 2
    with pytest.raises(ValueError, match="not inside one range of slot 0"):
        shards.offset_of(Axis.MLP_COLUMN, 0, Range(2, 4))


def test_user_mistakes_are_named() -> None:
    with pytest.raises(ValueError, match="3 kv_group atoms cannot fill 4 slots"):
        full_layout(AtomCounts(3, 10, 10), 4, 1)
    with pytest.raises(ValueError, match="at least 1"):
        full_layout(AtomCounts(3, 10, 10), 2, 0)
    layout = full_layout(AtomCounts(2, 10, 10), 2, 1)
    with pytest.raises(ValueError, match="active already"):
        heal(layout, SlotRef(0, 1))
    with pytest.raises(ValueError, match="no replica 3"):
        vacate(layout, SlotRef(3, 0))
    layout = vacate(layout, SlotRef(0, 0))
    with pytest.raises(ValueError, match="is not active"):
        vacate(layout, SlotRef(0, 0))
    with pytest.raises(ValueError, match="drop the replica"):
        vacate(layout, SlotRef(0, 1))
    with pytest.raises(ValueError, match="ascending"):
        heal(layout, SlotRef(0, 2))
    with pytest.raises(ValueError, match="5 expert atoms cannot fill 6 slots"):
        full_layout(AtomCounts(6, 6, 6, 5), 6, 1)
    with pytest.raises(ValueError, match="one or more of"):
        full_layout(AtomCounts(0, 0, 0), 1, 1)


def test_a_model_has_the_axes_on_which_it_has_atoms() -> None:
    dense = full_layout(AtomCounts(4, 10, 11), 4, 2).replicas[0].shards
    sparse = full_layout(AtomCounts(4, 0, 11, 8), 4, 2).replicas[0].shards
    assert [shards.axis for shards in dense.axes] == [*Axis][:3]
    assert [shards.axis for shards in sparse.axes] == [Axis.KV_GROUP, Axis.VOCAB_ROW, Axis.EXPERT]
    assert sparse.homes[2] == (Axis.EXPERT, tuple(Range(i, i + 2) for i in (0, 2, 4, 6)))
    assert sparse.owned(Axis.MLP_COLUMN, 3) == ()
    assert sparse.local_atoms(Axis.MLP_COLUMN, 3) == 0
    with pytest.raises(ValueError, match="has no mlp_column atoms"):
        sparse.axis(Axis.MLP_COLUMN)
    with pytest.raises(ValueError, match="not inside one range"):
        sparse.offset_of(Axis.MLP_COLUMN, 3, Range(0, 1))


def test_replicas_are_found_by_number() -> None:
    full = full_layout(AtomCounts(2, 2, 2), 2, 9)
    some = replace(full, replicas=full.replicas[1:8:3])
    assert [some.replica(number).replica for number in (1, 4, 7)] == [1, 4, 7]
    for number in (0, 2, 8):
        with pytest.raises(ValueError, match=f"no replica {number}"):
            some.replica(number)


@PROPERTY
@given(histories())
def test_unchanged_slots_keep_their_ranges(history: list[ParallelLayout]) -> None:
    for before, after in pairwise(history):
        for old, new in zip(before.replicas, after.replicas, strict=True):
            for was, now in zip(old.shards.axes, new.shards.axes, strict=True):
                assert was.home is now.home
                for one, two in zip(was.owned, now.owned, strict=True):
                    assert one is two or one != two


@pytest.mark.parametrize(
    "owned",
    [
        ((Range(0, 2),), (Range(2, 4),), ()),  # atoms 4, 5 lost
        ((Range(0, 2), Range(2, 3)), (), (Range(4, 6),)),  # atom 3 lost
        ((Range(0, 2), Range(3, 4)), (), (Range(4, 6), Range(2, 4))),  # atom 3 twice
        ((Range(0, 2), Range(4, 6)), (Range(2, 4), Range(4, 5)), ()),  # atom 4 twice
        ((Range(4, 6), Range(0, 2)), (Range(2, 4),), ()),  # home not first
        ((Range(0, 2), Range(4, 5), Range(5, 6)), (Range(2, 4),), ()),  # not merged
        ((Range(0, 2), Range(2, 4)), (), (Range(4, 6), Range(6, 7))),  # beyond the axis
        ((Range(0, 2),), (Range(2, 4), Range(4, 6))),  # a slot is missing
    ],
)
def test_planted_faults_in_ownership_are_rejected(owned: tuple[tuple[Range, ...], ...]) -> None:
    home = (Range(0, 2), Range(2, 4), Range(4, 6))
    with pytest.raises(ValueError, match=r"must own|must come|give one a slot"):
        AxisShards(Axis.KV_GROUP, home, owned)


@pytest.mark.parametrize(
    "home",
    [
        (Range(1, 2), Range(2, 4)),  # atom 0 has no home
        (Range(0, 2), Range(3, 4)),  # atom 2 has none
        (Range(2, 4), Range(0, 2)),  # not in order
        (Range(0, 3), Range(2, 4)),  # atom 2 has two
    ],
)
def test_homes_are_contiguous(home: tuple[Range, ...]) -> None:
    with pytest.raises(ValueError, match="contiguous from atom 0"):
        AxisShards(Axis.KV_GROUP, home, tuple((piece,) for piece in home))


def test_planted_faults_in_layouts_are_rejected() -> None:
    layout = full_layout(AtomCounts(6, 6, 6), 3, 2)
    replica = layout.replicas[0]
    other = full_layout(AtomCounts(6, 7, 6), 3, 1).replicas[0]
    with pytest.raises(ValueError, match="active slots are"):
        replace(replica, active=(0, 1))
    with pytest.raises(ValueError, match="in this order"):
        replace(replica.shards, axes=replica.shards.axes[::-1])
    with pytest.raises(ValueError, match="tp_base"):
        replace(replica.shards, tp_base=4)
    with pytest.raises(ValueError, match="ascending"):
        replace(layout, replicas=layout.replicas[::-1])
    with pytest.raises(ValueError, match="same home"):
        replace(layout, replicas=(replica, replace(other, replica=1)))
