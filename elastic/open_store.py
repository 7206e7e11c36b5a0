"""The store of a run, from its configuration."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from elastic.memory_store import MemoryStore
from elastic.store import Store
from elastic.store_config import StoreConfig


@asynccontextmanager
async def open_store(config: StoreConfig, log: Path) -> AsyncIterator[Store]:
    """The store that `config` describes, closed at the end; a private etcd writes to `log`.

    Raises:
        ValueError: a certificate or password is missing, or there is no etcd to start.
        StoreUnavailable: etcd does not answer, or does not start.
        StoreRefused: etcd does not let this user in.
    """
    if config.kind == "memory":
        store = MemoryStore()
        try:
            yield store
        finally:
            await store.close()
        return
    # Imported here, as gRPC takes longer to import than all that a run without etcd needs.
    from elastic.etcd_access import read_access
    from elastic.etcd_store import EtcdStore
    from elastic.private_etcd import PrivateEtcd

    access = read_access(config)
    private = None if config.endpoints else PrivateEtcd(log)
    try:
        if private is not None:
            await private.start()
            access = replace(access, endpoints=(private.endpoint,))
        etcd = await EtcdStore.connect(access, config.prefix)
        try:
            yield etcd
        finally:
            await etcd.close()
    finally:
        if private is not None:
            await private.stop()
