"""Every change of a plan has a reason in words."""

from __future__ import annotations

from elastic.plan import Action
from elastic.plan_reason import change
from elastic.topology import Assignment, Coordinate, DeviceId, Member

PLACES = (Coordinate(0, 0, 0), Coordinate(0, 0, 1))
HOMES = {place: DeviceId(0, place.slot) for place in PLACES}
ELSEWHERE = Member(DeviceId(1, 0), 1)


def test_a_device_that_takes_its_own_place_back_from_another_is_named() -> None:
    at_home = [Assignment(place, Member(HOMES[place], 1)) for place in PLACES]
    swapped = [at_home[0], Assignment(PLACES[1], ELSEWHERE)]
    for before, rows, device in (
        (swapped, at_home, HOMES[PLACES[1]]),
        (at_home, swapped, ELSEWHERE.device),
    ):
        told = change({0: tuple(before)}, {0: tuple(rows)}, (), HOMES, 1, 0)
        assert told == (Action.SWAP_SPARE, f"{device} takes {PLACES[1]}")
