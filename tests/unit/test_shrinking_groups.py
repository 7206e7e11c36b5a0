"""Groups that shrink where the backend can (NCCL's interface, played by a fake)."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from elastic.heart import Heart
from elastic.messages import Quiesce, Quiesced
from elastic.topology import DeviceId, Member
from elastic.worker import Worker
from ntp import process_groups
from ntp.groups import GroupAxis, GroupSpec
from ntp.process_groups import Link, ProcessGroups, is_connection_error
from ntp.stable_group import Communicator, GroupSevered

LINK = Link("nccl", "127.0.0.1", 1.0, 1.0)


class FakeNccl:
    """What of torch's ProcessGroupNCCL is used."""

    def __init__(self, size: int, supports_shrinking: bool = True, breaks: bool = False) -> None:
        self.size = size
        self.supports_shrinking = supports_shrinking
        self.breaks = breaks
        self.excluded: list[int] = []
        self.aborted = False

    def shrink(self, ranks_to_exclude: list[int], flags: int, options: object) -> FakeNccl:
        assert not self.aborted and flags == 0 and options is None
        if self.breaks:
            raise RuntimeError("a peer is gone")
        self.excluded = ranks_to_exclude
        return FakeNccl(self.size - len(ranks_to_exclude))

    def abort(self) -> None:
        self.aborted = True


class Built:
    """Plays the connecting of groups, and lists what was connected."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **settings: bool) -> None:
        self.connected: list[tuple[str, ...]] = []
        self.groups = ProcessGroups(LINK)
        self._settings = settings
        self._monkeypatch = monkeypatch

    def _connect(
        self, link: Link, store: dist.Store, rank: int, members: tuple[str, ...]
    ) -> Communicator:
        self.connected.append(members)
        backend = FakeNccl(len(members), **self._settings)
        return Communicator(backend, (), members, timedelta(seconds=1))

    def adopt(self, generation: int, *members: str, unbroken: bool = True) -> FakeNccl:
        """A world of `members`, seen from the last of them."""
        spec = GroupSpec(GroupAxis.WORLD, (), tuple(range(len(members))))
        store, rank = dist.HashStore(), len(members) - 1
        with self._monkeypatch.context() as patch:
            patch.setattr(process_groups, "_connect", self._connect)
            self.groups.adopt(
                [spec], members, rank, generation, store, frozenset(), unbroken=unbroken
            )
        backend = self.groups.world.inner
        assert isinstance(backend, FakeNccl) and backend.size == len(members)
        return backend


def test_a_group_that_only_lost_members_shrinks(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(monkeypatch)
    first = built.adopt(1, "a", "b", "c", "d")
    built.adopt(2, "a", "d")
    assert first.excluded == [1, 2] and first.aborted
    assert built.connected == [("a", "b", "c", "d")]
    built.adopt(3, "d")
    assert built.connected == [("a", "b", "c", "d")]


@pytest.mark.parametrize("members", [("a", "b", "new"), ("b", "a"), ("a", "b", "c"), ("x", "y")])
def test_other_members_or_another_order_need_a_new_group(
    monkeypatch: pytest.MonkeyPatch, members: tuple[str, ...]
) -> None:
    built = Built(monkeypatch)
    first = built.adopt(1, "a", "b", "c")
    built.adopt(2, *members)
    assert first.aborted and not first.excluded
    assert built.connected == [("a", "b", "c"), members]


@pytest.mark.parametrize("severed", [(), (0,), (1,), (0, 1)])
def test_all_ranks_build_a_group_anew_where_the_plan_does_not_say_that_it_works(
    monkeypatch: pytest.MonkeyPatch, severed: tuple[int, ...]
) -> None:
    """Two ranks, of which an urgent announcement may have reached one, both, or none."""
    ranks = [Built(monkeypatch) for _ in range(2)]
    for number, built in enumerate(ranks):
        first = built.adopt(1, "a", "b", "c")
        if number in severed:
            built.groups.sever()
        built.adopt(2, "a", "c", unbroken=False)
        assert first.aborted and not first.excluded
    assert [built.connected[1:] for built in ranks] == [[("a", "c")], [("a", "c")]]


def test_a_rank_whose_group_broke_although_the_plan_shrinks_it_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    severed, intact = Built(monkeypatch), Built(monkeypatch)
    first, other = (built.adopt(1, "a", "b", "c") for built in (severed, intact))
    severed.groups.sever()
    assert (severed.groups.unbroken, intact.groups.unbroken) == (False, True)
    with pytest.raises(GroupSevered, match="broke meanwhile") as caught:
        severed.adopt(2, "a", "c")
    assert is_connection_error(caught.value) and not first.excluded
    intact.adopt(2, "a", "c")
    assert other.excluded == [1]
    # Neither made a group anew, in which the other would not have been.
    assert severed.connected == intact.connected == [("a", "b", "c")]


def test_who_has_no_group_has_none_that_is_unbroken(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(monkeypatch)
    assert not built.groups.unbroken
    built.adopt(1, "a", "b")
    assert built.groups.unbroken
    built.groups.close()
    assert not built.groups.unbroken


def test_a_backend_that_cannot_shrink_is_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(monkeypatch, supports_shrinking=False)
    built.adopt(1, "a", "b", "c")
    built.adopt(2, "a", "c")
    assert built.connected == [("a", "b", "c"), ("a", "c")]


def test_a_shrink_that_fails_leaves_nothing_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    built = Built(monkeypatch, breaks=True)
    first = built.adopt(1, "a", "b", "c")
    with pytest.raises(RuntimeError, match="a peer is gone"):
        built.adopt(2, "a", "c")
    assert first.aborted
    built.adopt(3, "a", "c")
    assert built.connected == [("a", "b", "c"), ("a", "c")]


class Wire:
    """A link that keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.parametrize(("urgent", "unbroken"), [(False, True), (True, False)])
def test_a_worker_says_whether_it_stopped_with_all_of_its_groups(
    monkeypatch: pytest.MonkeyPatch, urgent: bool, unbroken: bool
) -> None:
    built, wire = Built(monkeypatch), Wire()
    built.adopt(1, "a", "b")
    member, quiesce = Member(DeviceId(0, 0), 1), Quiesce(2, urgent, (), "")
    heart = Heart(member, wire, 1.0)  # type: ignore[arg-type]
    worker = Worker(member, wire, heart, built.groups, torch.device("cpu"))  # type: ignore[arg-type]
    worker._hear(quiesce)
    worker._answer(quiesce)
    (answer,) = wire.sent
    assert isinstance(answer, Quiesced) and answer.unbroken is unbroken
