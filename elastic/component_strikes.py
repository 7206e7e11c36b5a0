"""Injected faults that strike the runtime itself: leader, agent, store, a node's network.

The launcher carries them out, as it is nobody's peer: it sees from the run's files which step is
committed, tells the store that the fault strikes, and then strikes. Where there is nobody to
strike, because nobody leads or a killed process is being started again, it says nothing and tries
again.

A stopped process goes on after a while (`args.seconds`), a killed store comes back after as long; a
killed agent stays down until the step at which its node heals, and a node stays cut off until such
a step or for such a while.
"""

from __future__ import annotations

import asyncio
import math
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from elastic.faults import Component, ComponentTarget, Fault, FaultInjection, NodeTarget
from elastic.keeper import Keeper
from elastic.keys import agent_key, decode, encode, key_of, leader_key
from elastic.messages import AgentRecord, ComponentFault
from elastic.network import Network, PrivateNetwork
from elastic.private_etcd import PrivateEtcd
from elastic.store import Store

DOWN_SECONDS = 2.0
"""How long a struck store or a stopped process is out, unless args.seconds says otherwise."""


@dataclass(frozen=True, slots=True)
class _End:
    """What ends a fault, once a step is committed or a time has come."""

    end: Callable[[], None]
    at_step: float = math.inf
    at: float = math.inf


class ComponentStrikes:
    """Carries out the faults of one run. `keepers` are those of its processes, by name."""

    def __init__(
        self,
        faults: tuple[Fault, ...],
        job: str,
        store: Store,
        keepers: Mapping[str, Keeper],
        etcd: PrivateEtcd | None,
        network: Network,
    ) -> None:
        self._due = [
            fault
            for fault in faults
            if isinstance(fault.target, ComponentTarget) or fault.kind is FaultInjection.PARTITION
        ]
        self._job = job
        self._store = store
        self._keepers = keepers
        self._etcd = etcd
        self._network = network
        self._began = time.time()
        self._ends: list[_End] = []

    async def look(self, committed: int) -> None:
        """Step `committed` is: strike what is due, and let up what has healed."""
        for fault in list(self._due):
            in_step = fault.at_step is not None and committed >= fault.at_step - 1
            elapsed = time.time() - self._began
            in_time = fault.at_seconds is not None and elapsed >= fault.at_seconds
            if (in_step or in_time) and await self._strike(fault, committed + 1):
                self._due.remove(fault)
        for end in list(self._ends):
            if committed >= end.at_step or time.time() >= end.at:
                self._ends.remove(end)
                end.end()

    def release(self) -> None:
        """Let up whatever has not healed: the job is over, and everybody is to hear of it."""
        for end in self._ends:
            end.end()
        self._ends.clear()

    async def _strike(self, fault: Fault, step: int) -> bool:
        """Strike in `step`; returns whether there was somebody to strike."""
        match fault.target:
            case ComponentTarget(Component.STORE):
                await self._announce(fault, str(fault.target), None, step)
                await self._hit_store(fault)
            case ComponentTarget(component, node):
                keeper = await self._keeper(component, node)
                if keeper is None or not keeper.is_up:
                    return False
                await self._announce(fault, str(fault.target), node, step)
                if component is Component.AGENT:
                    self._keep_down(fault, keeper)
                self._hit_process(fault, keeper)
            case NodeTarget(node):
                await self._announce(fault, f"network of node{node}", node, step)
                self._cut(fault, node)
            case _:
                raise AssertionError(f"fault {fault.id} is the workers' own")
        return True

    async def _announce(self, fault: Fault, name: str, node: int | None, step: int) -> None:
        life = None
        if node is not None and (found := await self._store.get(agent_key(self._job, node))):
            record = decode(self._job, agent_key(self._job, node), found)
            assert isinstance(record, AgentRecord), record
            life = record.life
        told = ComponentFault(fault.id, name, node, step, time.time(), life)
        await self._store.put(key_of(self._job, told), encode(told))

    async def _keeper(self, component: Component, node: int | None) -> Keeper | None:
        """That of the agent of `node` or of the leading controller; None if nobody leads."""
        if component is Component.AGENT:
            return self._keepers[f"agent{node}"]
        leader = await self._store.get(leader_key(self._job))
        return None if leader is None else self._keepers[leader.decode()]

    async def _hit_store(self, fault: Fault) -> None:
        assert self._etcd is not None, "refused before the run"
        kills = fault.kind is FaultInjection.SIGKILL
        if kills:
            self._etcd.kill()
        else:
            self._etcd.send(signal.SIGSTOP)
        # Nobody could be told of another fault meanwhile.
        await asyncio.sleep(_down_seconds(fault))
        if kills:
            await self._etcd.start()
        else:
            self._etcd.send(signal.SIGCONT)

    def _keep_down(self, fault: Fault, keeper: Keeper) -> None:
        """See to it that a killed agent comes back when its node heals, and not before."""
        if fault.kind is FaultInjection.SIGKILL and fault.heal_at_step != 0:
            keeper.hold_down()
        if fault.heal_at_step:
            self._ends.append(_End(keeper.let_up, at_step=fault.heal_at_step))

    def _hit_process(self, fault: Fault, keeper: Keeper) -> None:
        if fault.kind is FaultInjection.SIGKILL:
            keeper.send(signal.SIGKILL)
            return
        keeper.send(signal.SIGSTOP)
        go_on = _End(lambda: keeper.send(signal.SIGCONT), at=time.time() + _down_seconds(fault))
        self._ends.append(go_on)

    def _cut(self, fault: Fault, node: int) -> None:
        network = self._network
        assert isinstance(network, PrivateNetwork), "a run with such a fault has its own network"
        network.cut(node)
        seconds = fault.argument("seconds")
        at_step = math.inf if fault.heal_at_step is None else fault.heal_at_step
        at = math.inf if seconds is None else time.time() + seconds
        self._ends.append(_End(lambda: network.join(node), at_step, at))


def _down_seconds(fault: Fault) -> float:
    seconds = fault.argument("seconds")
    return DOWN_SECONDS if seconds is None else seconds
