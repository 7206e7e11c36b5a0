"""Random sequences of faults, each a pure function of its seed, that a job must survive.

The job has a replica on each node. A sequence always leaves one replica that nobody struck for a
while, so every atom has a holder: a slot that was struck counts as gone for `REST` steps (it is
long back by then, and may be struck again), and the replica on a node whose agent is killed for the
rest of the job, as a new agent takes seconds to import torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import Any

STEPS = 200
FAULTS = 20
REPLICAS, SLOTS = 3, 2
FIRST, SPACING, REST = 5, 9, 25
STEP_PHASES = ("forward", "backward", "grad_sync", "vote", "optimizer")
RECOVERY_PHASES = ("rebuild", "reshard")
KINDS = ("sigkill", "sigkill", "exit", "raise", "sigstop")

Slot = tuple[int, int]
Fault = dict[str, Any]


@dataclass
class Losses:
    """What counts as gone: when each slot was struck last, and whole replicas."""

    struck: dict[Slot, int] = field(default_factory=dict)
    dropped: set[int] = field(default_factory=set)

    def gone(self, slot: Slot, step: int) -> bool:
        """Whether `slot` may be without a worker at `step`."""
        return slot[0] in self.dropped or step - self.struck.get(slot, -REST) < REST

    def intact(self, step: int) -> set[int]:
        """Replicas that surely have all of their workers."""
        return {
            replica
            for replica in range(REPLICAS)
            if not any(self.gone((replica, slot), step) for slot in range(SLOTS))
        }

    def targets(self, step: int) -> list[Slot]:
        """Slots that may be struck, so that an intact replica is left."""
        intact = self.intact(step)
        return [
            (replica, slot)
            for replica in range(REPLICAS)
            for slot in range(SLOTS)
            if not self.gone((replica, slot), step) and intact - {replica}
        ]


def random_faults(seed: int) -> list[Fault]:
    """A faults file of `FAULTS` entries for a job of `STEPS` steps."""
    rng = Random(seed)
    losses = Losses()
    # Late, as little can be struck once a replica is gone for good.
    agent_is = rng.randrange(FAULTS * 3 // 5, FAULTS * 4 // 5)
    faults: list[Fault] = []
    while len(faults) < FAULTS:
        step = FIRST + SPACING * len(faults) + rng.randrange(SPACING // 2)
        kind = rng.choice(("worker",) * 8 + ("double",) * 3 + ("slow", "controller", "store"))
        if len(faults) >= agent_is and not losses.dropped:
            kind = "agent"
        elif len(faults) == FAULTS - 1 and kind == "double":
            kind = "worker"
        faults += _made(kind, step, losses, rng) or _slowed(step, losses, rng)
    return faults


def _made(kind: str, step: int, losses: Losses, rng: Random) -> list[Fault]:
    """The faults of `kind` at `step`; none if that is not safe."""
    match kind:
        case "worker":
            return _failures(step, losses, rng, recovers=())
        case "double":
            return _failures(step, losses, rng, recovers=(rng.choice(RECOVERY_PHASES),))
        case "slow":
            return _slowed(step, losses, rng)
        case "controller":
            return [_component(step, {"component": "controller"})]
        case "store":
            return [_component(step, {"component": "store"}) | {"args": {"seconds": 3}}]
        case _:
            assert kind == "agent", kind
            nodes = [replica for replica, _ in losses.targets(step)]
            if not nodes:
                return []
            node = rng.choice(nodes)
            losses.dropped.add(node)
            return [_component(step, {"component": "agent", "node": node}) | {"heal_at_step": 0}]


def _failures(step: int, losses: Losses, rng: Random, recovers: tuple[str, ...]) -> list[Fault]:
    """A worker's failure in the step, and one in each phase named of the recovery from it."""
    before = dict(losses.struck)
    faults = []
    for phase in (rng.choice(STEP_PHASES), *recovers):
        targets = losses.targets(step)
        if not targets:
            losses.struck = before
            return []
        replica, slot = rng.choice(targets)
        losses.struck[replica, slot] = step
        faults.append(
            {
                "at_step": step,
                "phase": phase,
                "target": {"replica": replica, "slot": slot},
                "kind": rng.choice(KINDS),
                "heal_at_step": rng.choice((0, 0, step + 1, step + 4)),
            }
        )
    return faults


def _slowed(step: int, losses: Losses, rng: Random) -> list[Fault]:
    present = [
        (replica, slot)
        for replica in range(REPLICAS)
        for slot in range(SLOTS)
        if not losses.gone((replica, slot), step)
    ]
    replica, slot = rng.choice(present)
    return [
        {
            "at_step": step,
            "phase": rng.choice(STEP_PHASES),
            "target": {"replica": replica, "slot": slot},
            "kind": "slow",
            "args": {"seconds": 0.5},
        }
    ]


def _component(step: int, target: dict[str, Any]) -> Fault:
    return {"at_step": step, "target": target, "kind": "sigkill"}
