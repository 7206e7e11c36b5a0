"""Communicators that are ended, replaced and kept under the feet of whoever uses them."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from hashlib import sha256
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from dense import SHAPE, layout_of
from harness import LINK, TIMEOUT_SECONDS, Cluster, Rank

from elastic.rendezvous_client import RendezvousStore
from ntp import stable_group
from ntp.geometry import SlotRef
from ntp.groups import GroupAxis, GroupSpec, groups_of, places
from ntp.process_groups import ProcessGroups, is_connection_error
from ntp.stable_group import STAR_LIMIT_BYTES, GroupSevered, StableGroup
from ntp.star import STAR_TAG
from ntp.sync_plan import plan_sync

SMALL = 7
LARGE = STAR_LIMIT_BYTES // 8
"""Elements of float64 that do and do not take the star, in a group of three."""
PROMPT_SECONDS = TIMEOUT_SECONDS / 4
"""Far longer than a severed operation takes, far shorter than the timeout of one."""


def world_of(rank: Rank, groups: ProcessGroups, generation: int, size: int) -> None:
    """Build a world of the first `size` ranks."""
    groups.adopt(
        [GroupSpec(GroupAxis.WORLD, (), tuple(range(size)))],
        [f"member{other}" for other in range(size)],
        rank.rank,
        generation,
        rank.store(),
        frozenset(),
    )
    assert sum_of_ones(groups.world) == size  # Everybody is there.


def ends_promptly(operation: Callable[[], object]) -> str:
    """The error that `operation` ends with; it must be a connection's, and come soon."""
    started = time.monotonic()
    try:
        operation()
    except RuntimeError as error:
        waited = time.monotonic() - started
        assert is_connection_error(error), f"not recognised: {type(error).__name__}: {error}"
        assert waited < PROMPT_SECONDS, f"only after {waited:.1f} s: {error}"
        return str(error)
    raise AssertionError("the operation succeeded without one of its members")


def sum_of_ones(group: dist.ProcessGroup, elements: int = SMALL) -> float:
    """What every element of an all-reduced tensor of ones is."""
    ones = torch.ones(elements, dtype=torch.float64)
    dist.all_reduce(ones, group=group)
    assert torch.equal(ones, ones[0].expand(elements))
    return ones[0].item()


def severed_rank(rank: Rank, elements: int) -> str | None:
    """Ranks 0 and 1 block, as rank 2 does not take part; then somebody severs.

    In the star rank 1 waits for rank 0, which alone severs. In gloo's ring it may wait for rank 2,
    so both do, as all survivors of a failure do.
    """
    groups = rank.groups()
    world_of(rank, groups, 1, 3)
    store = rank.store()
    if rank.rank == 2:
        store.wait(["ended/0", "ended/1"], timedelta(seconds=TIMEOUT_SECONDS))
        return None

    def sever() -> None:
        store.wait(["begun/0", "begun/1"], timedelta(seconds=TIMEOUT_SECONDS))
        groups.sever()

    ones = torch.ones(elements, dtype=torch.float64)
    if elements == LARGE:
        # The ring: posted before anybody is told, so the operation is surely under way.
        work = groups.world.inner.allreduce([ones], dist.AllreduceOptions())
        wait = work.wait
    else:

        def wait() -> None:
            dist.all_reduce(ones, group=groups.world)

    other_store = rank.store()
    other_store.set(f"begun/{rank.rank}", "")
    severs = rank.rank == 0 or elements == LARGE
    thread = threading.Thread(target=sever if severs else bool)
    thread.start()
    text = ends_promptly(wait)
    thread.join()
    other_store.set(f"ended/{rank.rank}", "")
    # Nothing that is asked of a severed communicator later may block either.
    ends_promptly(lambda: sum_of_ones(groups.world))
    return text


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_sever_ends_blocked_operations_on_both_ends(cluster: Cluster, elements: int) -> None:
    texts = cluster.run(severed_rank, 3, elements)
    assert all(texts[:2])
    assert not any("imed out" in text for text in texts[:2])


def killed_rank(rank: Rank, elements: int) -> tuple[str, float]:
    """Rank 2 is killed while 0 and 1 wait for it; they sever, rebuild and go on."""
    groups = rank.groups()
    world_of(rank, groups, 1, 3)
    store = rank.store()
    if rank.rank == 2:
        store.wait(["begun/0", "begun/1"], timedelta(seconds=TIMEOUT_SECONDS))
        store.set("dying", "")
        os.kill(os.getpid(), signal.SIGKILL)

    def sever() -> None:
        store.wait(["dying"], timedelta(seconds=TIMEOUT_SECONDS))
        groups.sever()

    thread = threading.Thread(target=sever)
    rank.store().set(f"begun/{rank.rank}", "")
    thread.start()
    text = ends_promptly(lambda: sum_of_ones(groups.world, elements))
    thread.join()
    world_of(rank, groups, 2, 2)
    return text, sum_of_ones(groups.world, elements)


@pytest.mark.parametrize("elements", [SMALL, LARGE])
def test_survivors_of_a_killed_member_go_on(cluster: Cluster, elements: int) -> None:
    results = cluster.run(killed_rank, 3, elements, dies={2})
    assert [result[1] for result in results[:2]] == [2.0, 2.0]


LAYOUTS = [
    layout_of(SHAPE, 2, (0, 1), (0, 1)),
    layout_of(SHAPE, 2, (0, 1), (0,)),
]


def generations_rank(rank: Rank) -> list[tuple[int, int]]:
    """Threads and descriptors in each second of 50 generations, between which the last rank fails.

    It lets all its connections go, as a death would, while the others wait for it. These go on
    without it in the next generation; in the one after that it is back.
    """
    slot = LAYOUTS[0].slots()[rank.rank]
    groups = rank.groups()
    counts = []
    for generation in range(50):
        layout = LAYOUTS[generation % 2]
        if slot not in layout.slots():
            continue
        store = RendezvousStore(rank.address, TIMEOUT_SECONDS)
        rank.adopt(groups, layout, slot, rank.generation + generation, store)
        store.close()
        assert sum_of_ones(groups.tensor) == layout.replica(slot.replica).degree
        members = [r for r in layout.replicas if slot.slot in r.active]
        assert (groups.home is not None) == (len(members) > 1)
        if groups.home is not None:
            assert sum_of_ones(groups.home) == len(members)
        assert sum_of_ones(groups.world) == len(layout.slots())
        for live in groups._live.values():
            assert len(live._sockets) == live.group.size() - 1, "a connection cannot be severed"
        if layout is LAYOUTS[1]:
            continue
        # Nobody may have left for the next generation, and so closed a connection, meanwhile.
        descriptors = len(list(Path("/proc/self/fd").iterdir()))
        counts.append((len(list(Path("/proc/self/task").iterdir())), descriptors))
        sum_of_ones(groups.world)
        if slot not in LAYOUTS[1].slots():
            groups.close()
        else:
            ends_promptly(lambda: sum_of_ones(groups.world))
            groups.sever()
    return counts


def test_generations_leave_nothing_behind(cluster: Cluster) -> None:
    for counts in cluster.run(generations_rank, 4):
        assert len(counts) == 25
        assert counts[2:] == counts[2:3] * 23


def kept_rank(rank: Rank) -> list[float]:
    """Replica 1 loses slot 1; replica 0 keeps its tensor group while all else is severed."""
    slot = LAYOUTS[0].slots()[rank.rank]
    groups, store = rank.groups(), rank.store()
    rank.adopt(groups, LAYOUTS[0], slot, 1, store)
    if slot == SlotRef(1, 1):
        return []
    names = [f"{place}@1" for place in places(LAYOUTS[1], 1)]
    key = (GroupAxis.TENSOR, (0, 0))
    kept = frozenset({key}) if slot.replica == 0 else frozenset()
    served = groups._live[GroupAxis.TENSOR, (slot.replica, 0)]
    groups.sever(keep=kept)
    sums = [sum_of_ones(groups.tensor)] if kept else []
    ends_promptly(lambda: sum_of_ones(groups.world))
    if kept:
        assert groups.intact(key, served.members)
    after = LAYOUTS[1].slots().index(slot)
    specs = groups_of(after, LAYOUTS[1], plan_sync(LAYOUTS[1]), 1)
    groups.adopt(specs, names, after, 2, store, kept)
    assert (groups._live[GroupAxis.TENSOR, (slot.replica, 0)] is served) == bool(kept)
    sums += [sum_of_ones(groups.tensor), sum_of_ones(groups.world)]
    return sums


def test_a_kept_communicator_works_on(cluster: Cluster) -> None:
    assert cluster.run(kept_rank, 4) == [[2, 2, 3], [2, 2, 3], [1, 3], []]


def star_rank(rank: Rank) -> list[tuple[bool, str]]:
    """For sizes on both sides of the limit: whether the proxy's sum is that of gloo itself, and
    its digest."""
    groups = rank.groups()
    world_of(rank, groups, 1, rank.size)
    outcomes = []
    limit = STAR_LIMIT_BYTES // (8 * (rank.size - 1))
    for elements in (1, 1000, limit, limit + 1, 3 * limit):
        for dtype in (torch.float64, torch.float32, torch.int64):
            for operation in (dist.ReduceOp.SUM, dist.ReduceOp.MAX):
                generator = torch.Generator().manual_seed(rank.rank)
                mine = torch.randint(-999, 999, (elements,), generator=generator).to(dtype)
                ours, theirs = mine.clone(), mine.clone()
                dist.all_reduce(ours, op=operation, group=groups.world)
                options = dist.AllreduceOptions()
                options.reduceOp = operation
                groups.world.inner.allreduce([theirs], options).wait()
                outcomes.append((torch.equal(ours, theirs), sha256(ours.numpy()).hexdigest()))
    return outcomes


@pytest.mark.parametrize("size", [1, 2, 3])
def test_star_equals_ring(cluster: Cluster, size: int) -> None:
    if size == 1:
        assert cluster.run(lonely_rank, 1) == [1.0]
        return
    results = cluster.run(star_rank, size)
    for outcomes in results:
        assert all(equal for equal, _ in outcomes)
        assert outcomes == results[0]


def lonely_rank(rank: Rank) -> float:
    groups = rank.groups()
    world_of(rank, groups, 1, 1)
    return sum_of_ones(groups.world)


def rank_order_rank(rank: Rank) -> tuple[torch.Tensor, torch.Tensor]:
    """(own contribution, sum); the sum is over a view of a larger tensor."""
    groups = rank.groups()
    world_of(rank, groups, 1, rank.size)
    generator = torch.Generator().manual_seed(rank.rank)
    mine = torch.randn(100, generator=generator)
    total = mine.clone()
    # Two parts, cut anywhere, must give the bits of the whole.
    for part in (total[:33], total[33:]):
        dist.all_reduce(part, group=groups.world)
    return mine, total


def test_star_adds_in_rank_order(cluster: Cluster) -> None:
    results = cluster.run(rank_order_rank, 4)
    expected = results[0][0].clone()
    for mine, _ in results[1:]:
        expected += mine
    for _, total in results:
        assert torch.equal(total, expected)


def reused_rank(rank: Rank) -> list[list[float]]:
    """The sums of large tensors, which are overwritten at once when they are there."""
    groups = rank.groups()
    world_of(rank, groups, 1, rank.size)
    tensor = torch.empty(STAR_LIMIT_BYTES // 4 // (rank.size - 1))
    sums = []
    for turn in range(5):
        tensor.fill_(turn + rank.rank)
        dist.all_reduce(tensor, group=groups.world)
        sums.append(tensor.unique().tolist())
        tensor.fill_(torch.nan)
    return sums


def test_a_sum_may_be_overwritten_while_it_is_on_its_way_to_others(cluster: Cluster) -> None:
    assert cluster.run(reused_rank, 3) == [[[3.0 * turn + 3.0] for turn in range(5)]] * 3


def star_with_one_that_dies(rank: Rank, dies: int) -> tuple[bool, str]:
    """Whether what is told of an all-reduce is a lost connection, and its words.

    Who dies has just posted its part of it: to the first rank, or the sum to another.
    """
    groups = rank.groups()
    world_of(rank, groups, 1, rank.size)
    # It takes far longer to leave than a process takes to kill itself.
    tensor = torch.zeros(64 * 1024 * 1024)
    if rank.rank == dies:
        inner = groups.world.inner
        inner.send([tensor], 1 - dies, STAR_TAG + (dies == 0))
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(RuntimeError) as caught:
        patch.setattr(stable_group, "STAR_LIMIT_BYTES", tensor.nbytes)
        dist.all_reduce(tensor, group=groups.world)
    return is_connection_error(caught.value), str(caught.value)


@pytest.mark.parametrize("dies", [0, 1])
def test_a_rank_lost_in_the_middle_of_its_part_of_a_star_is_noticed(
    cluster: Cluster, dies: int
) -> None:
    results = cluster.run(star_with_one_that_dies, 2, dies, dies={dies})
    lost_connection, words = results[1 - dies]
    assert lost_connection, words
    assert "imed out" not in words


class Told:
    """Keeps what is said of waits."""

    def __init__(self) -> None:
        self.words: list[str] = []

    def wait(self, now: float) -> None:
        """A wait begins."""
        self.words.append("wait")

    def resume(self, now: float) -> None:
        """It is over."""
        self.words.append("resume")


def told_rank(rank: Rank) -> list[str]:
    told = Told()
    groups = rank.groups(waits=told)
    world_of(rank, groups, 1, rank.size)
    told.words.clear()
    sum_of_ones(groups.world)

    def breaks(*_: object) -> None:
        raise RuntimeError("a peer is gone")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stable_group, "star_all_reduce", breaks)
        with pytest.raises(RuntimeError, match="a peer is gone"):
            sum_of_ones(groups.world)
    return told.words


def test_a_small_all_reduce_is_one_wait_also_if_it_fails(cluster: Cluster) -> None:
    assert cluster.run(told_rank, 3) == [["wait", "resume"] * 2] * 3


def unbound_rank(rank: Rank) -> list[bool]:
    groups = rank.groups()
    never = StableGroup(GroupAxis.HOME)
    world_of(rank, groups, 1, 1)
    world = groups.world
    groups.close()
    recognised = []
    for group in (never, world):
        for operation in (group.rank, group.size, lambda group=group: sum_of_ones(group)):
            with pytest.raises(GroupSevered) as caught:
                operation()
            recognised.append(is_connection_error(caught.value))
    return recognised


def test_unbound_groups_say_so(cluster: Cluster) -> None:
    assert cluster.run(unbound_rank, 1) == [[True] * 6]


def test_programming_errors_are_not_connection_errors() -> None:
    assert not is_connection_error(ValueError("gloo"))
    assert not is_connection_error(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def impatient_rank(rank: Rank) -> str:
    """Wait for a message that nobody sends; returns what the wait says."""
    groups = rank.groups(replace(LINK, operation_timeout_seconds=0.3))
    world = GroupSpec(GroupAxis.WORLD, (), tuple(range(rank.size)))
    groups.adopt([world], ["a", "b"], rank.rank, 1, rank.store(), frozenset())
    waited = ""
    if rank.rank == 0:
        with pytest.raises(RuntimeError) as caught:
            groups.world.recv([torch.zeros(1)], 1, 5).wait()
        assert is_connection_error(caught.value)
        waited = str(caught.value)
    return waited


def test_a_message_is_awaited_as_long_as_an_operation_not_as_long_as_a_build(
    cluster: Cluster,
) -> None:
    assert "300ms" in cluster.run(impatient_rank, 2)[0]
