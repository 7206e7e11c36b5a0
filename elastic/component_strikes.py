"""Injected faults that strike the runtime itself: its leading controller, an agent, or the store.

The launcher carries them out, as it is nobody's peer: it sees from the run's files which step is
committed, tells the store that the fault strikes, and then strikes. A stopped process goes on after
a while (`args.seconds`), a killed store comes back after as long; a killed agent stays down until
the step at which its node heals.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Mapping

from elastic.faults import Component, ComponentTarget, Fault, FaultInjection
from elastic.keeper import Keeper
from elastic.keys import encode, key_of, leader_key
from elastic.messages import ComponentFault
from elastic.private_etcd import PrivateEtcd
from elastic.store import Store

DOWN_SECONDS = 2.0
"""How long a struck store or a stopped process is out, unless args.seconds says otherwise."""


class ComponentStrikes:
    """Carries out the faults of one run. `keepers` are those of its processes, by name."""

    def __init__(
        self,
        faults: tuple[Fault, ...],
        job: str,
        store: Store,
        keepers: Mapping[str, Keeper],
        etcd: PrivateEtcd | None,
    ) -> None:
        self._due = [fault for fault in faults if isinstance(fault.target, ComponentTarget)]
        self._job = job
        self._store = store
        self._keepers = keepers
        self._etcd = etcd
        self._began = time.time()
        self._down: list[tuple[Keeper, int]] = []

    async def look(self, committed: int) -> None:
        """Step `committed` is: strike what is due, and let up what has healed."""
        for fault in list(self._due):
            in_step = fault.at_step is not None and committed >= fault.at_step - 1
            elapsed = time.time() - self._began
            if in_step or (fault.at_seconds is not None and elapsed >= fault.at_seconds):
                self._due.remove(fault)
                await self._strike(fault, committed + 1)
        for keeper, heals_at in list(self._down):
            if committed >= heals_at:
                self._down.remove((keeper, heals_at))
                keeper.let_up()

    async def _strike(self, fault: Fault, step: int) -> None:
        target = fault.target
        assert isinstance(target, ComponentTarget)
        told = ComponentFault(fault.id, str(target), target.node, step, time.time())
        await self._store.put(key_of(self._job, told), encode(told))
        number = signal.SIGKILL if fault.kind is FaultInjection.SIGKILL else signal.SIGSTOP
        seconds = float(dict(fault.args).get("seconds") or DOWN_SECONDS)
        match target.component:
            case Component.STORE:
                assert self._etcd is not None, "refused when read"
                if number is signal.SIGKILL:
                    self._etcd.kill()
                    await asyncio.sleep(seconds)
                    await self._etcd.start()
                else:
                    await _stop_for(self._etcd.send, seconds)
            case Component.CONTROLLER:
                leader = await self._store.get(leader_key(self._job))
                if leader is not None:
                    await _hit(self._keepers[leader.decode()], number, seconds)
            case Component.AGENT:
                keeper = self._keepers[f"agent{target.node}"]
                if fault.heal_at_step != 0 and number is signal.SIGKILL:
                    keeper.hold_down()
                if fault.heal_at_step:
                    self._down.append((keeper, fault.heal_at_step))
                await _hit(keeper, number, seconds)


async def _hit(keeper: Keeper, number: signal.Signals, seconds: float) -> None:
    if number is signal.SIGSTOP:
        await _stop_for(keeper.send, seconds)
    else:
        keeper.send(number)


async def _stop_for(send: Callable[[signal.Signals], None], seconds: float) -> None:
    send(signal.SIGSTOP)
    await asyncio.sleep(seconds)
    send(signal.SIGCONT)
