"""Random models and layouts, for tests by property; and who owns what in them, atom by atom."""

from hypothesis import strategies as st

from ntp.atoms import AtomCounts, Axis
from ntp.geometry import (
    ParallelLayout,
    ReplicaLayout,
    SlotRef,
    full_layout,
    heal,
    vacate,
    with_active,
)


@st.composite
def atom_counts(draw: st.DrawFn, base: int, most: int = 64) -> AtomCounts:
    """A model with attention, a vocabulary, and MLP columns or experts or both."""
    some = st.integers(base, max(base, most))
    columns, experts = draw(st.sampled_from([(True, False), (False, True), (True, True)]))
    return AtomCounts(
        kv_groups=draw(some),
        mlp_columns=draw(some) if columns else 0,
        vocab_rows=draw(some),
        experts=draw(some) if experts else 0,
    )


@st.composite
def full_layouts(draw: st.DrawFn, bases: tuple[int, int] = (1, 8)) -> ParallelLayout:
    """Every slot of one to four replicas active."""
    base = draw(st.integers(*bases))
    return full_layout(draw(atom_counts(base)), base, draw(st.integers(1, 4)))


@st.composite
def some_of(draw: st.DrawFn, full: ParallelLayout) -> ParallelLayout:
    """Some of the replicas, each with some of its slots, degrees independent."""
    # Half of the time one slot is vacant everywhere, which random sets rarely give.
    slots = set(range(full.tp_base))
    if full.tp_base > 1 and draw(st.booleans()):
        slots.remove(draw(st.sampled_from(sorted(slots))))
    active = st.sets(st.sampled_from(sorted(slots)), min_size=1).map(lambda s: tuple(sorted(s)))
    chosen = draw(st.sets(st.sampled_from(full.replicas), min_size=1))
    return ParallelLayout(
        full.tp_base,
        tuple(with_active(r, draw(active)) for r in full.replicas if r in chosen),
    )


@st.composite
def histories(draw: st.DrawFn) -> list[ParallelLayout]:
    """A full layout and what a random sequence of losses and returns makes of it."""
    history = [draw(full_layouts())]
    replicas, base = len(history[0].replicas), history[0].tp_base
    refs = st.builds(SlotRef, st.integers(0, replicas - 1), st.integers(0, base - 1))
    for ref in draw(st.lists(refs, max_size=12)):
        active = history[-1].replica(ref.replica).active
        if ref.slot not in active:
            history.append(heal(history[-1], ref))
        elif len(active) > 1:
            history.append(vacate(history[-1], ref))
    return history


def axes(layout: ParallelLayout) -> tuple[Axis, ...]:
    """The axes of the model."""
    return tuple(axis for axis, _ in layout.homes)


def atoms_of(replica: ReplicaLayout, axis: Axis, slot: int) -> list[int]:
    """The atoms of a slot in storage order."""
    return [
        atom
        for piece in replica.shards.owned(axis, slot)
        for atom in range(piece.start, piece.stop)
    ]


def owners(replica: ReplicaLayout, axis: Axis) -> list[int]:
    """Owner of each atom; fails where an atom has none or two."""
    dense = [-1] * replica.shards.axis(axis).atoms
    for slot in range(replica.shards.tp_base):
        for atom in atoms_of(replica, axis, slot):
            assert dense[atom] == -1
            dense[atom] = slot
    assert -1 not in dense
    return dense
