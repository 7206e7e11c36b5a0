"""Faults of the runtime's own parts strike somebody, and only then are they announced."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from elastic import component_strikes
from elastic.component_strikes import DOWN_SECONDS, ComponentStrikes
from elastic.faults import Component, ComponentTarget, Fault, FaultInjection, SlotTarget
from elastic.keys import decode, encode, job_prefix, key_of, leader_key
from elastic.memory_store import MemoryStore
from elastic.messages import AgentRecord, ComponentFault
from elastic.network import Loopback

KILL, STOP, GO_ON = signal.SIGKILL, signal.SIGSTOP, signal.SIGCONT
CONTROLLER = ComponentTarget(Component.CONTROLLER)
AGENT = ComponentTarget(Component.AGENT, 1)


class FakeKeeper:
    """Keeper of a process that notes what it is sent."""

    def __init__(self) -> None:
        self.is_up = True
        self.held_down = False
        self.sent: list[signal.Signals] = []

    def send(self, number: signal.Signals) -> None:
        assert self.is_up, "a signal hit nobody"
        self.sent.append(number)

    def hold_down(self) -> None:
        self.held_down = True

    def let_up(self) -> None:
        self.held_down = False


class Scene:
    """A run with two controllers, of which none leads at first, and an agent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *faults: Fault) -> None:
        self.now = 100.0
        monkeypatch.setattr(component_strikes.time, "time", lambda: self.now)
        self.store = MemoryStore()
        self.keepers = {name: FakeKeeper() for name in ("controller0", "controller1", "agent1")}
        keepers: Any = self.keepers
        self.strikes = ComponentStrikes(faults, "job", self.store, keepers, None, Loopback())

    async def lead(self, name: str | None) -> None:
        key = leader_key("job")
        if name is None:
            await self.store.delete(key)
        else:
            await self.store.put(key, name.encode())

    async def announced(self) -> list[ComponentFault]:
        snapshot = await self.store.get_prefix(job_prefix("job"))
        found = [decode("job", key, value) for key, value in snapshot.values.items()]
        return [message for message in found if isinstance(message, ComponentFault)]

    def sent(self) -> dict[str, list[signal.Signals]]:
        return {name: keeper.sent for name, keeper in self.keepers.items() if keeper.sent}


def fault(target: ComponentTarget, kind: FaultInjection, **changes: Any) -> Fault:
    fields: dict[str, Any] = {"at_step": 5, "at_seconds": None, "phase": None, "heal_at_step": None}
    return Fault(id=1, target=target, kind=kind, **(fields | changes))


def played(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(scenario())


def test_a_controller_is_struck_once_somebody_leads(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, fault(CONTROLLER, FaultInjection.SIGKILL))

    async def scenario() -> None:
        await scene.lead("controller0")
        await scene.strikes.look(3)
        assert await scene.announced() == [] and scene.sent() == {}
        await scene.lead(None)
        await scene.strikes.look(4)
        await scene.strikes.look(5)
        assert await scene.announced() == [] and scene.sent() == {}
        await scene.lead("controller1")
        await scene.strikes.look(6)
        (told,) = await scene.announced()
        assert (told.fault, told.component, told.node, told.step) == (1, "controller", None, 7)
        await scene.strikes.look(7)
        assert scene.sent() == {"controller1": [KILL]}

    played(scenario)


def test_a_leader_that_is_dead_but_not_yet_missed_is_not_struck(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    scene = Scene(monkeypatch, fault(CONTROLLER, FaultInjection.SIGKILL))

    async def scenario() -> None:
        await scene.lead("controller0")
        scene.keepers["controller0"].is_up = False
        await scene.strikes.look(4)
        assert await scene.announced() == [] and scene.sent() == {}
        await scene.lead("controller1")
        await scene.strikes.look(4)
        assert len(await scene.announced()) == 1 and scene.sent() == {"controller1": [KILL]}

    played(scenario)


@pytest.mark.parametrize(
    ("args", "seconds"), [((), DOWN_SECONDS), ((("seconds", 0.5),), 0.5), ((("seconds", 7),), 7)]
)
def test_a_stopped_process_goes_on_after_its_seconds(
    monkeypatch: pytest.MonkeyPatch, args: tuple[tuple[str, float], ...], seconds: float
) -> None:
    scene = Scene(monkeypatch, fault(CONTROLLER, FaultInjection.SIGSTOP, args=args))

    async def scenario() -> None:
        await scene.lead("controller0")
        await scene.strikes.look(4)
        # It leads no more, and is let go on all the same.
        await scene.lead("controller1")
        scene.now += seconds - 0.01
        await scene.strikes.look(4)
        assert scene.sent() == {"controller0": [STOP]}
        scene.now += 0.02
        await scene.strikes.look(4)
        assert scene.sent() == {"controller0": [STOP, GO_ON]}

    played(scenario)


def test_an_agent_that_is_down_is_struck_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene(monkeypatch, fault(AGENT, FaultInjection.SIGKILL, heal_at_step=9))
    agent = scene.keepers["agent1"]

    async def scenario() -> None:
        agent.is_up = False
        await scene.strikes.look(4)
        assert await scene.announced() == [] and not agent.held_down
        agent.is_up = True
        await scene.strikes.look(6)
        (told,) = await scene.announced()
        assert (told.component, told.node, told.step) == ("agent of node1", 1, 7)
        assert scene.sent() == {"agent1": [KILL]} and agent.held_down
        await scene.strikes.look(8)
        assert agent.held_down
        await scene.strikes.look(9)
        assert not agent.held_down

    played(scenario)


@pytest.mark.parametrize(("heal_at_step", "stays_down"), [(0, False), (None, True)])
def test_a_killed_agent_comes_back_at_once_or_never(
    monkeypatch: pytest.MonkeyPatch, heal_at_step: int | None, stays_down: bool
) -> None:
    scene = Scene(monkeypatch, fault(AGENT, FaultInjection.SIGKILL, heal_at_step=heal_at_step))

    async def scenario() -> None:
        await scene.strikes.look(10**6)
        assert scene.sent() == {"agent1": [KILL]}
        assert scene.keepers["agent1"].held_down is stays_down

    played(scenario)


@pytest.mark.parametrize("life", [None, 3])
def test_the_struck_life_of_an_agent_is_told(
    monkeypatch: pytest.MonkeyPatch, life: int | None
) -> None:
    scene = Scene(monkeypatch, fault(AGENT, FaultInjection.SIGKILL))

    async def scenario() -> None:
        if life is not None:
            record = AgentRecord(1, life, (), (), "node1:7")
            await scene.store.put(key_of("job", record), encode(record))
        await scene.strikes.look(4)
        (told,) = await scene.announced()
        assert told.life == life

    played(scenario)


def test_faults_of_workers_are_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Fault(1, 5, None, None, SlotTarget(0, 0), FaultInjection.SIGKILL, None)
    scene = Scene(monkeypatch, own)

    async def scenario() -> None:
        await scene.strikes.look(9)
        assert await scene.announced() == [] and scene.sent() == {}

    played(scenario)
