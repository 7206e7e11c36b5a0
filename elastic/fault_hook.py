"""Injected faults, on the worker's side: strike when step, phase and place are right.

The worker says that a fault fires before it carries it out, so that the journal knows when the
failure really began. A fault strikes once: what a previous process of this device carried out is
not given to its replacement, and whoever else takes the target's place hears that it struck.

A fault in the rebuild or the reshard strikes in the first change of generation, among those that
its target lives through, that begins with its step or a later one: nobody can say beforehand at
which step a device will have returned, or a second failure will have been noticed.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Collection, Sequence

from elastic.faults import (
    RECOVERY_PHASES,
    ComponentTarget,
    Fault,
    FaultInjection,
    FaultPhase,
    NodeTarget,
    SlotTarget,
    without_struck,
)
from elastic.topology import Coordinate

SLOW_SECONDS = 1.0
"""How long a fault of kind ``slow`` holds a worker up, unless args.seconds says otherwise."""


class InjectedFault(RuntimeError):
    """What a fault of kind ``raise`` raises."""


class FaultHook:
    """Faults that concern one worker.

    `announce` is called with the fault, the step and the phase before anything is done.
    """

    def __init__(
        self,
        faults: Sequence[Fault],
        node: int,
        started_at: float,
        announce: Callable[[Fault, int, FaultPhase], None],
    ) -> None:
        self._faults = list(faults)
        self._node = node
        self._started_at = started_at
        self._announce = announce

    @property
    def is_empty(self) -> bool:
        """Whether no fault is left to carry out."""
        return not self._faults

    def forget(self, struck: Collection[int]) -> None:
        """These faults of the file struck somebody."""
        self._faults = without_struck(self._faults, struck)

    def due(self, coordinate: Coordinate, step: int, phase: FaultPhase, now: float) -> Fault | None:
        """The fault that strikes `coordinate` in this step and phase, if any.

        In a recovery `step` is the first one of the generation.
        """
        recovers = phase in RECOVERY_PHASES
        for fault in self._faults:
            at_step = step if fault.at_step is None else fault.at_step
            in_step = at_step <= step if recovers else at_step == step
            in_time = fault.at_seconds is None or now - self._started_at >= fault.at_seconds
            in_phase = fault.phase == phase or (fault.phase is None and not recovers)
            if in_step and in_time and in_phase and self._is_target(fault, coordinate):
                return fault
        return None

    def strike(self, coordinate: Coordinate, step: int, phase: FaultPhase, now: float) -> None:
        """Carry out the fault that is due, if any. Raises InjectedFault for kind ``raise``."""
        fault = self.due(coordinate, step, phase, now)
        if fault is not None:
            self._faults.remove(fault)
            self._announce(fault, step, phase)
            _carry_out(fault)

    def _is_target(self, fault: Fault, coordinate: Coordinate) -> bool:
        match fault.target:
            case SlotTarget(replica, slot, stage):
                return coordinate == Coordinate(replica, stage, slot)
            case NodeTarget(node):
                # Workers cannot cut themselves off: that is the launcher's business.
                return node == self._node and fault.kind is not FaultInjection.PARTITION
            case ComponentTarget():
                # The launcher's business.
                return False


def _carry_out(fault: Fault) -> None:
    match fault.kind:
        case FaultInjection.SLOW:
            seconds = fault.argument("seconds")
            time.sleep(SLOW_SECONDS if seconds is None else seconds)
        case FaultInjection.SIGSTOP:
            os.kill(os.getpid(), signal.SIGSTOP)
        case FaultInjection.EXIT:
            code = fault.argument("code")
            os._exit(1 if code is None else int(code))
        case FaultInjection.RAISE:
            raise InjectedFault(f"fault {fault.id} of the faults file")
        case _:
            assert fault.kind is FaultInjection.SIGKILL, f"{fault.kind} is refused when read"
            os.kill(os.getpid(), signal.SIGKILL)
