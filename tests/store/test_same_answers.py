"""Any sequence of operations has the same outcomes, changes and end on every store."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from enum import Enum, auto
from itertools import count

from backends import Backend, EtcdBackend, MemoryBackend, until
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic.etcd_access import EtcdAccess
from elastic.private_etcd import PrivateEtcd
from elastic.store import AlreadyExists, Guard, GuardFailed, Lease, LeaseLost

KEYS = ("/k/a", "/k/b", "/k/a/c")
NUMBERS = count()


class Kind(Enum):
    PUT = auto()
    CREATE = auto()
    DELETE = auto()
    REVOKE = auto()


@dataclass(frozen=True, slots=True)
class Step:
    """One operation. `guard` counts back over the creations so far; None: without a guard."""

    kind: Kind
    key: str
    value: bytes
    leased: bool
    guard: int | None


STEPS = st.builds(
    Step,
    kind=st.sampled_from(Kind),
    key=st.sampled_from(KEYS),
    value=st.binary(max_size=2),
    leased=st.booleans(),
    guard=st.none() | st.integers(0, 2),
)


async def story(backend: Backend, steps: list[Step]) -> list[object]:
    """What came of each step, what a watch told, and what there was at the end."""
    outcomes: list[object] = []
    async with backend.client() as store:
        changes = store.watch("/k/")
        lease: Lease = await store.lease(60.0)
        guards: list[Guard] = []
        for step in steps:
            under = lease if step.leased else None
            guard = None
            if step.guard is not None and step.guard < len(guards):
                guard = guards[-1 - step.guard]
            try:
                match step.kind:
                    case Kind.PUT:
                        await store.put(step.key, step.value, under, guard)
                        outcomes.append("written")
                    case Kind.CREATE:
                        created = await store.create(step.key, step.value, under, guard)
                        guards.append(Guard(step.key, created))
                        outcomes.append("created")
                    case Kind.DELETE:
                        outcomes.append(await store.delete(step.key, guard))
                    case Kind.REVOKE:
                        await lease.revoke()
            except (AlreadyExists, GuardFailed, LeaseLost) as error:
                outcomes.append(type(error))
        await store.put("/k/end", b"")
        outcomes += [(change.key, change.value) for change in await until(changes, "/k/end")]
        outcomes.append((await store.get_prefix("/k/")).values)
        await lease.revoke()
    return outcomes


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(steps=st.lists(STEPS, max_size=12))
def test_memory_and_etcd_agree(etcd: PrivateEtcd, steps: list[Step]) -> None:
    async def main() -> None:
        backend = EtcdBackend(EtcdAccess((etcd.endpoint,)), f"/same-{next(NUMBERS)}")
        assert await story(backend, steps) == await story(MemoryBackend(), steps)

    asyncio.run(main())
