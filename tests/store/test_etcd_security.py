"""Users and certificates: who may, may, also when tokens end; who may not is told why."""

from __future__ import annotations

import asyncio
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path

import grpc.aio
import pytest
from backends import first, run
from etcd3aio import PermissionType, prefix_range_end
from etcd3aio.auth import AuthService

from elastic.etcd_access import EtcdAccess, read_access
from elastic.etcd_store import EtcdStore
from elastic.private_etcd import PrivateEtcd, find_etcd
from elastic.store import Guard, Store, StoreRefused, StoreUnavailable
from elastic.store_config import StoreConfig

PREFIX = "/team-a"


@asynccontextmanager
async def connect(access: EtcdAccess, prefix: str = PREFIX) -> AsyncIterator[Store]:
    store = await EtcdStore.connect(access, prefix)
    try:
        yield store
    finally:
        await store.close()


async def forget_token(etcd: PrivateEtcd) -> None:
    """A new password, though it is the old one, ends the user's tokens."""
    async with grpc.aio.insecure_channel(etcd.endpoint) as channel:
        auth = AuthService(channel)
        auth.set_token((await auth.authenticate("root", "root's word")).token)
        await auth.user_change_password("trainer", "trainer's word")


async def enable_users(etcd: PrivateEtcd) -> None:
    """A root, and a user whose role covers the keys under PREFIX."""
    async with grpc.aio.insecure_channel(etcd.endpoint) as channel:
        auth = AuthService(channel)
        await auth.role_add("root")
        await auth.user_add("root", "root's word")
        await auth.user_grant_role("root", "root")
        await auth.role_add("everstep")
        await auth.role_grant_permission(
            "everstep",
            f"{PREFIX}/",
            prefix_range_end(f"{PREFIX}/"),
            perm_type=PermissionType.READWRITE,
        )
        await auth.user_add("trainer", "trainer's word")
        await auth.user_grant_role("trainer", "everstep")
        await auth.auth_enable()


@asynccontextmanager
async def etcd_with_users(logs: Path) -> AsyncIterator[PrivateEtcd]:
    etcd = PrivateEtcd(logs / "etcd.log")
    try:
        await etcd.start()
        await enable_users(etcd)
        yield etcd
    finally:
        await etcd.stop()


def test_a_user_whose_token_etcd_does_not_know_any_more_gets_another(tmp_path: Path) -> None:
    async def main() -> None:
        async with etcd_with_users(tmp_path) as etcd:
            access = EtcdAccess((etcd.endpoint,), "trainer", "trainer's word")
            async with connect(access) as store:
                lease = await store.lease(5.0)
                guard = Guard("/leader", await store.create("/leader", b"me", lease))
                changes = store.watch("/w/")
                await store.put("/w/a", b"1")
                await first(changes, 1)
                await forget_token(etcd)
                waiting = asyncio.create_task(first(changes, 2))
                etcd.kill()
                await etcd.start()
                await store.put("/w/a", b"2", guard=guard)
                await store.put("/w/a", b"3", guard=guard)
                assert [change.value for change in await waiting] == [b"2", b"3"]

            with pytest.raises(StoreRefused, match="permission denied"):
                async with connect(access, "/team-b"):
                    pass
            with pytest.raises(StoreRefused, match=r"store\.user and its password"):
                async with connect(replace(access, password="guess")):
                    pass
            with pytest.raises(StoreRefused, match=r"set store\.user"):
                async with connect(EtcdAccess((etcd.endpoint,))):
                    pass

    run(main())


def openssl(where: Path, *arguments: str) -> None:
    subprocess.run(["openssl", *arguments], cwd=where, check=True, capture_output=True)


def make_certificates(where: Path) -> None:
    """An authority, a server's certificate for 127.0.0.1, and a client's."""
    new_key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl(
        where, "req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=ca"
    )
    for name, extension in (("server", "subjectAltName=IP:127.0.0.1"), ("client", "")):
        request = ("-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        openssl(where, "req", *new_key, *request)
        (where / f"{name}.ext").write_text(extension)
        signing = ("-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        files = ("-in", f"{name}.csr", "-out", f"{name}.pem", "-extfile", f"{name}.ext")
        openssl(where, "x509", "-req", *files, *signing)


@contextmanager
def etcd_with_tls(where: Path) -> Iterator[str]:
    """host:port of an etcd that talks only to clients with a certificate."""
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
    ):
        ports = [each.getsockname()[1] for each in (one, two)]
    endpoint = f"127.0.0.1:{ports[0]}"
    command = [
        str(find_etcd()),
        f"--data-dir={where / 'data'}",
        f"--listen-client-urls=https://{endpoint}",
        f"--advertise-client-urls=https://{endpoint}",
        f"--listen-peer-urls=http://127.0.0.1:{ports[1]}",
        f"--cert-file={where / 'server.pem'}",
        f"--key-file={where / 'server.key'}",
        f"--trusted-ca-file={where / 'ca.pem'}",
        "--client-cert-auth",
    ]
    with (where / "etcd.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield endpoint
    finally:
        process.kill()
        process.wait()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificates")
def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    async def main() -> None:
        make_certificates(tmp_path)
        with etcd_with_tls(tmp_path) as endpoint:
            access = read_access(
                StoreConfig(
                    kind="etcd",
                    endpoints=(endpoint,),
                    ca=tmp_path / "ca.pem",
                    cert=tmp_path / "client.pem",
                    key=tmp_path / "client.key",
                )
            )
            async with connect(access) as store:
                changes = store.watch("/")
                lease = await store.lease(2.0)
                await store.put("/a", b"x", lease)
                assert [change.value for change in await first(changes, 1)] == [b"x"]
                await lease.revoke()
                assert [change.value for change in await first(changes, 1)] == [None]
            for wrong in (
                replace(access, certificate=None, key=None),
                replace(access, authority=None),
                replace(access, server_name="somebody.else"),
            ):
                with pytest.raises(StoreUnavailable):
                    await EtcdStore.connect(wrong, timeout_seconds=0.5)

    run(main())
