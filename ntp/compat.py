"""Megatron's words for nonuniform tensor parallelism, turned into layouts and back.

Megatron-LM (branch dev, `megatron/core/distributed/nonuniform_tp.py`) says with a
`NonuniformTPConfig`, once and before the start, which tensor-parallel ranks of which data-parallel
replicas do no work. Its names are kept here, and a *slot* is what it calls a local TP rank. To move
over, give the config that you have to `layout_from_config`:

    config = NonuniformTPConfig(
        tp_base=8, tp_spares=2, num_reduced_tp_dp_ranks=1, non_active_ranks_per_dp={0: [2, 5]}
    )
    layout = layout_from_config(config, atom_counts(shape), replicas=16)

or, to keep more devices, the faults that it was made from to `layout_from_faults`:

    layout = layout_from_faults({0: [2, 5], 1: [1]}, atom_counts(shape), tp_base=8, replicas=16)

Theory of operation. A config names slots, a layout says who owns what, so a config becomes a layout
by vacating the slots it names. Layouts can say more, which is where the two differ:

- *One reduced degree.* Megatron knows full replicas and replicas with `tp_spares` slots less, so a
  replica that lost fewer must idle healthy devices until it matches the one that lost most (parity
  padding). Every layout replica has a degree of its own: nothing is padded.
- *The lowest replicas, their last slots.* Megatron rebuilds the TP groups of the lowest
  `num_reduced_tp_dp_ranks` replicas, but not the data-parallel groups, and these join equal ranks
  of all replicas: a gap in the middle leaves a healthy rank waiting for a missing one. Layouts
  have homes instead, and any slot of any replica may be vacant.
- *Divisible sizes.* Megatron cuts sizes that both degrees divide, and otherwise drops remainders or
  pairs shards of unlike size. Here shares differ by at most one atom, see `ntp_splits`.
- *Pipeline and context parallelism.* Megatron may list other slots for each stage (and reads the
  list of stage 0 for the groups of all). A layout has one set of slots for a whole replica, so a
  slot that is out anywhere in a replica is vacated in all its stages.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from ntp.atoms import AtomCounts
from ntp.geometry import ParallelLayout, full_layout, with_active

Stage = tuple[int, int, int]
"""(dp, cp, pp) ranks."""

RankKey = int | Stage
"""A replica, for all its stages, or one stage of a replica."""

# A mapping is invariant in its keys, so each kind of dict that a caller may hold is spelled out.
SlotsByRank = (
    Mapping[int, Collection[int]]
    | Mapping[Stage, Collection[int]]
    | Mapping[RankKey, Collection[int]]
)
"""TP slots by replica or stage."""


@dataclass(frozen=True, slots=True)
class NonuniformTPConfig:
    """Which slots of which replicas are out: Megatron's fields, defaults and meaning.

    ``tp_base``: TP degree of a full replica. ``tp_spares``: how many slots less a reduced one has.
    ``non_active_ranks_per_dp``: the slots that are out, by dp rank or by (dp, cp, pp); where both
    name a stage, the tuple counts. It is stored as a copy with sorted tuples, and it alone decides
    which replicas are reduced. Megatron wants ``num_reduced_tp_dp_ranks`` to agree with it, but its
    default of 1 seldom does. Without a map, or with an empty one, the last slots of the lowest
    ``num_reduced_tp_dp_ranks`` replicas are out.

    Raises ValueError if no slot would be left, a key or slot does not exist, or an entry does not
    name exactly ``tp_spares`` slots, which Megatron assumes without checking.
    """

    tp_base: int = 8
    tp_spares: int = 0
    num_reduced_tp_dp_ranks: int = 1
    non_active_ranks_per_dp: SlotsByRank | None = None

    def __post_init__(self) -> None:
        _check_degrees(self.tp_base, self.tp_spares)
        if self.num_reduced_tp_dp_ranks < 0:
            raise ValueError(
                f"num_reduced_tp_dp_ranks is {self.num_reduced_tp_dp_ranks}; use 0 for no replica"
            )
        if self.non_active_ranks_per_dp is None:
            return
        entries = _checked(self.non_active_ranks_per_dp, self.tp_base)
        for key, slots in entries.items():
            if len(slots) != self.tp_spares:
                raise ValueError(
                    f"non_active_ranks_per_dp[{key}] names {len(slots)} slots {slots} where "
                    f"tp_spares is {self.tp_spares}; pad it with "
                    "compute_uniform_tp_spares_with_parity, or use layout_from_faults, which keeps "
                    "every healthy device"
                )
        object.__setattr__(self, "non_active_ranks_per_dp", entries)


def compute_uniform_tp_spares_with_parity(
    faulty_gpu_map: SlotsByRank, tp_base: int
) -> tuple[int, dict[RankKey, list[int]]]:
    """Megatron's (tp_spares, non_active_ranks_per_dp) for the faulty slots by replica or stage.

    The entry with most faults sets `tp_spares`; the others give up healthy slots, the highest
    first, until they match. A slot listed twice is one fault; Megatron counts it twice. The padding
    is a limit of Megatron's, not of layouts: `layout_from_faults` takes the same map and pads
    nothing. Raises ValueError if a slot does not exist or an entry has no healthy slot.
    """
    faulty = _checked(faulty_gpu_map, tp_base)
    tp_spares = max(map(len, faulty.values()), default=0)
    _check_degrees(tp_base, tp_spares)
    non_active: dict[RankKey, list[int]] = {}
    for key, slots in faulty.items():
        healthy = [slot for slot in range(tp_base) if slot not in slots]
        kept = tp_base - tp_spares
        non_active[key] = sorted((*slots, *healthy[kept:]))
    return tp_spares, non_active


def get_active_ranks_for_dp(
    dp_rank: int, tp_base: int, config: NonuniformTPConfig, cp_rank: int = 0, pp_rank: int = 0
) -> list[int]:
    """Slots, ascending, that work in one stage of a replica.

    A replica or stage that the config does not reduce has all its slots; Megatron takes the last
    ones from it too, and must not be asked. Raises ValueError if `tp_base` is not the config's.
    """
    if tp_base != config.tp_base:
        raise ValueError(f"tp_base {tp_base} is not the config's {config.tp_base}; pass that one")
    entries = _entries(config)
    non_active = entries.get((dp_rank, cp_rank, pp_rank), entries.get(dp_rank, ()))
    return [slot for slot in range(tp_base) if slot not in non_active]


def ntp_splits(
    num_shards: int, local_extent: int, tp_base: int, tp_spares: int
) -> tuple[list[list[int]], list[list[int]]]:
    """(send_splits, recv_splits) that fold a full replica's gradients onto its first slots.

    ``send_splits[i][j]`` is the extent, along the partition dimension, that slot i sends to slot j;
    ``recv_splits[j][i]`` is the same number. Only the last `tp_spares` slots send, and only the
    others receive. ``num_shards`` is the global number of atoms, ``local_extent`` the extent of
    slot 0, which has ceil(num_shards / tp_base) of them. An atom's extent need not be contiguous:
    one column of a fused gate/up weight counts 2.

    Shares are as in our layouts: slots own atoms to within one of each other before, and again
    after, the lower slots having the bigger ones; every atom of a sending slot goes to one
    receiver. Sent atoms are dealt in turn, as in Megatron, so both agree on all sizes that the two
    degrees divide. On others Megatron drops the remainder, leaves totals unlike the shares of a
    reduced replica, or stops with an IndexError. Our own gradient sync has no use for splits: it
    reads the layouts, in which slots adopt whole runs of atoms, in fewer messages.

    Raises ValueError for fewer shards than slots, or a `local_extent` that cuts an atom, where
    Megatron would round and lose elements.
    """
    _check_degrees(tp_base, tp_spares)
    if num_shards < tp_base:
        raise ValueError(
            f"{num_shards} shards cannot fill {tp_base} slots; lower tp_base to {num_shards}"
        )
    share, bigger = divmod(num_shards, tp_base)
    largest = share + (bigger > 0)
    atom_extent, rest = divmod(local_extent, largest)
    if rest or atom_extent < 1:
        raise ValueError(
            f"local_extent {local_extent} is no positive multiple of the {largest} shards of slot "
            f"0 ({num_shards} shards over {tp_base} slots); pass the extent of whole shards"
        )
    cores = tp_base - tp_spares
    send = [[0] * tp_base for _ in range(tp_base)]
    # The bigger homes are as if one more atom had been dealt to the lowest slots; going on from
    # there keeps the totals within one of each other.
    turn = min(bigger, cores)
    for slot in range(cores, tp_base):
        atoms = share + (slot < bigger)
        rounds, extra = divmod(atoms, cores)
        for core in range(cores):
            send[slot][core] = (rounds + ((core - turn) % cores < extra)) * atom_extent
        turn += atoms
    return send, [list(column) for column in zip(*send, strict=True)]


def layout_from_config(
    config: NonuniformTPConfig, counts: AtomCounts, replicas: int
) -> ParallelLayout:
    """The layout of `replicas` replicas in which the slots that the config names are vacant.

    A replica vacates the union of what its entries name, so that its stages agree; with different
    slots in different stages its degree is below `tp_base - tp_spares`. Raises ValueError if the
    config reduces a replica that is not there, a replica has no slot left, or an axis has fewer
    atoms than slots.
    """
    vacant = _by_replica(_entries(config))
    for number, slots in vacant.items():
        if len(slots) == config.tp_base:
            raise ValueError(
                f"each of the {config.tp_base} slots of replica {number} is out in one of its "
                "stages; exchange devices until a slot is whole, or drop the replica"
            )
    return _layout(vacant, counts, config.tp_base, replicas)


def layout_from_faults(
    faulty_gpu_map: SlotsByRank, counts: AtomCounts, tp_base: int, replicas: int
) -> ParallelLayout:
    """The layout in which exactly the faulty slots are vacant, each replica at its own degree.

    Takes the map of `compute_uniform_tp_spares_with_parity` and does without its padding. A slot
    that is faulty in one stage is vacated in all stages of its replica. A replica without a healthy
    slot takes no part. Raises ValueError if a fault's slot or replica does not exist, no replica
    remains, or an axis has fewer atoms than slots.
    """
    return _layout(_by_replica(_checked(faulty_gpu_map, tp_base)), counts, tp_base, replicas)


def config_from_layout(layout: ParallelLayout) -> NonuniformTPConfig:
    """The config whose slots are out exactly where the layout's are vacant.

    The map has plain dp keys, since a slot is vacant in all stages. Which slot adopted which atoms
    has no place in a config. Raises ValueError for what Megatron cannot express: more than one
    reduced degree, reduced replicas that are not the lowest, missing replicas. Slots other than the
    last it can express, but its data-parallel groups do not follow (see the module).
    """
    base = layout.tp_base
    numbers = [replica.replica for replica in layout.replicas]
    if numbers != list(range(len(numbers))):
        raise ValueError(
            f"the layout has replicas {numbers}; Megatron cannot leave one out, so number them "
            f"0..{len(numbers) - 1}"
        )
    reduced = [replica for replica in layout.replicas if replica.degree < base]
    if not reduced:
        return NonuniformTPConfig(tp_base=base)
    degrees = sorted({replica.degree for replica in reduced})
    if len(degrees) > 1:
        raise ValueError(
            f"replicas are reduced to degrees {degrees} of {base}; Megatron has one reduced "
            f"degree, so vacate slots until all of them have {degrees[0]}"
        )
    places = [replica.replica for replica in reduced]
    if places != list(range(len(places))):
        raise ValueError(
            f"replicas {places} are reduced; Megatron reduces the lowest, so renumber the replicas "
            f"to make these 0..{len(places) - 1}"
        )
    return NonuniformTPConfig(
        tp_base=base,
        tp_spares=base - degrees[0],
        num_reduced_tp_dp_ranks=len(reduced),
        non_active_ranks_per_dp={
            replica.replica: [slot for slot in range(base) if slot not in replica.active]
            for replica in reduced
        },
    )


def _check_degrees(tp_base: int, tp_spares: int) -> None:
    if not 0 <= tp_spares < tp_base:
        raise ValueError(
            f"{tp_spares} spares of tp_base {tp_base} leave no slot or are negative; use 0 to "
            f"{max(tp_base, 1) - 1}, and drop a replica that has no healthy slot"
        )


def _checked(slots_by_rank: SlotsByRank, tp_base: int) -> dict[RankKey, tuple[int, ...]]:
    """A copy whose slots are distinct and ascending, and exist."""
    entries: dict[RankKey, tuple[int, ...]] = {}
    for key, slots in slots_by_rank.items():
        ranks = key if isinstance(key, tuple) else (key,)
        if len(ranks) not in (1, 3) or min(ranks) < 0:
            raise ValueError(f"key {key} must be a dp rank or (dp, cp, pp), each 0 or more")
        entries[key] = tuple(sorted(set(slots)))
        if unknown := set(slots) - set(range(tp_base)):
            raise ValueError(
                f"{key} names slots {sorted(unknown)}; with tp_base {tp_base} they are "
                f"0..{tp_base - 1}, counted within the TP group"
            )
    return entries


def _entries(config: NonuniformTPConfig) -> dict[RankKey, tuple[int, ...]]:
    """The config's map, written out where it is implied."""
    if config.non_active_ranks_per_dp:
        return _checked(config.non_active_ranks_per_dp, config.tp_base)
    if config.tp_spares == 0:
        return {}
    last = tuple(range(config.tp_base - config.tp_spares, config.tp_base))
    return dict.fromkeys(range(config.num_reduced_tp_dp_ranks), last)


def _by_replica(entries: Mapping[RankKey, tuple[int, ...]]) -> dict[int, set[int]]:
    """The slots that are out anywhere in a replica."""
    vacant: dict[int, set[int]] = {}
    for key, slots in entries.items():
        vacant.setdefault(key[0] if isinstance(key, tuple) else key, set()).update(slots)
    return vacant


def _layout(
    vacant: Mapping[int, set[int]], counts: AtomCounts, tp_base: int, replicas: int
) -> ParallelLayout:
    if unknown := sorted(number for number in vacant if number >= replicas):
        raise ValueError(
            f"replicas {unknown} are to lose slots, but there are {replicas}, counted from 0; "
            "raise replicas, or drop their entries"
        )
    full = full_layout(counts, tp_base, replicas)
    active = {
        number: tuple(slot for slot in range(tp_base) if slot not in vacant.get(number, ()))
        for number in range(replicas)
    }
    if not any(active.values()):
        raise ValueError(f"none of {replicas} replicas has a healthy slot; there is no layout")
    return replace(
        full,
        replicas=tuple(
            with_active(replica, active[replica.replica])
            for replica in full.replicas
            if active[replica.replica]
        ),
    )
