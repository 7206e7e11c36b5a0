from __future__ import annotations

import asyncio
from collections.abc import Iterator
from itertools import count

import pytest
from backends import Backend, EtcdBackend, MemoryBackend

from elastic.etcd_access import EtcdAccess
from elastic.private_etcd import PrivateEtcd

PREFIXES = (f"/test-{number}" for number in count())


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateEtcd]:
    """The etcd of all tests; whoever kills it starts it again."""
    running = PrivateEtcd(tmp_path_factory.mktemp("etcd") / "etcd.log")
    try:
        asyncio.run(running.start())
        yield running
    finally:
        asyncio.run(running.stop())


@pytest.fixture
def prefix() -> str:
    """A prefix of keys that no other test uses."""
    return next(PREFIXES)


@pytest.fixture
def etcd_backend(etcd: PrivateEtcd, prefix: str) -> EtcdBackend:
    return EtcdBackend(EtcdAccess((etcd.endpoint,)), prefix)


@pytest.fixture(params=["memory", "etcd"])
def backend(request: pytest.FixtureRequest) -> Backend:
    if request.param == "memory":
        return MemoryBackend()
    found: Backend = request.getfixturevalue("etcd_backend")
    return found
