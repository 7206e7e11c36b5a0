"""The watch over workers with the settings that a job has if it says nothing."""

from __future__ import annotations

import pytest

from elastic.health_config import HealthConfig
from health.classify import HeartbeatLost
from health.events import DeviceId
from health.heartbeat import Activity, Heartbeat, Span
from health.liveness import Liveness

HEALTH = HealthConfig()
POLICY = HEALTH.liveness
DEVICE = DeviceId(0, 0)
BEAT = Heartbeat(DEVICE, 1, Span(Activity.COMPUTING, 3, 1, False, 0.1, 0.0), None, ())


def heard_once() -> Liveness:
    """A worker has just sent its first heartbeat, at 0."""
    liveness = Liveness(POLICY, 0.0)
    liveness.started(DEVICE, 1, 0.0)
    liveness.observe(BEAT, 0.0)
    return liveness


@pytest.mark.parametrize("pause", [0.5, 2.0, 1000.0])
def test_a_host_that_stood_still_gives_its_workers_time_to_beat(pause: float) -> None:
    """Agent and workers stood still, when the next heartbeat was due; it comes a beat later."""
    liveness, now = heard_once(), 0.0
    while now < POLICY.heartbeat_seconds:
        now += POLICY.look_seconds
        assert liveness.expired(now, ()) == []
    now += pause
    goes_on = now
    while now < goes_on + POLICY.heartbeat_seconds:
        assert liveness.expired(now, ()) == []
        now += POLICY.look_seconds
    liveness.observe(BEAT, now)
    assert liveness.expired(now, ()) == []


def test_silence_is_noticed_at_the_next_look_behind_its_limit() -> None:
    liveness, now = heard_once(), 0.0
    while not (found := liveness.expired(now, ())):
        now += POLICY.look_seconds
    assert isinstance(found[0], HeartbeatLost)
    assert now == POLICY.heartbeat_timeout_seconds


@pytest.mark.parametrize(
    ("changes", "look"),
    [
        ({}, 0.25),
        ({"stopped_timeout_seconds": 0.2}, 0.1),
        ({"stopped_timeout_seconds": 300.0}, 1.0),
        ({"stopped_timeout_seconds": 300.0, "heartbeat_seconds": 0.5}, 0.5),
    ],
)
def test_looks_see_a_stop_in_time_and_come_no_less_often_than_heartbeats(
    changes: dict[str, float], look: float
) -> None:
    assert HEALTH.model_copy(update=changes).liveness.look_seconds == look
