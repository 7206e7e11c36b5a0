"""How an etcd is reached: addresses, certificates, a user, and the connections made from them.

gRPC's defaults suit a browser more than a control plane. Its pause between two attempts to connect
grows to two minutes, longer than any lease, so it is bounded here to half a second. A connection
that fell silent is noticed by pings; etcd closes connections that ping more often than every 5 s,
or without a call under way. Answers may be of any length: a prefix of a large cluster has
megabytes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from ipaddress import ip_address
from pathlib import Path

import grpc
import grpc.aio

from elastic.store_config import StoreConfig

CHANNEL_OPTIONS: tuple[tuple[str, str | int], ...] = (
    ("grpc.lb_policy_name", "round_robin"),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2_000),  # how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 500),
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.max_receive_message_length", -1),
)


@dataclass(frozen=True, slots=True)
class EtcdAccess:
    """Everything that a client must know of an etcd.

    `endpoints` are host:port. `authority`, `certificate` and `key` are PEM; with an authority the
    connections use TLS. `server_name` is expected in the servers' certificates instead of the host.
    """

    endpoints: tuple[str, ...]
    user: str | None = None
    password: str = field(default="", repr=False)
    authority: bytes | None = field(default=None, repr=False)
    certificate: bytes | None = field(default=None, repr=False)
    key: bytes | None = field(default=None, repr=False)
    server_name: str | None = None

    def __str__(self) -> str:
        return f"etcd at {', '.join(self.endpoints)}"

    def channel(self) -> grpc.aio.Channel:
        """A connection of the running event loop."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.aio.insecure_channel(self._target(), self._options())
        return grpc.aio.secure_channel(self._target(), credentials, self._options())

    def blocking_channel(self) -> grpc.Channel:
        """A connection for a thread without an event loop."""
        credentials = self._credentials()
        if credentials is None:
            return grpc.insecure_channel(self._target(), self._options())
        return grpc.secure_channel(self._target(), credentials, self._options())

    def _target(self) -> str:
        """The endpoints as gRPC spells them: several addresses, or one name to resolve."""
        hosts = [endpoint.rpartition(":")[0].strip("[]") for endpoint in self.endpoints]
        try:
            versions = {ip_address(host).version for host in hosts}
        except ValueError:
            assert len(self.endpoints) == 1, self.endpoints
            return f"dns:///{self.endpoints[0]}"
        assert len(versions) == 1, self.endpoints
        return f"ipv{versions.pop()}:{','.join(self.endpoints)}"

    def _options(self) -> list[tuple[str, str | int]]:
        options = list(CHANNEL_OPTIONS)
        if self.server_name is not None:
            options.append(("grpc.ssl_target_name_override", self.server_name))
        return options

    def _credentials(self) -> grpc.ChannelCredentials | None:
        if self.authority is None:
            return None
        return grpc.ssl_channel_credentials(self.authority, self.key, self.certificate)


def read_access(config: StoreConfig) -> EtcdAccess:
    """Access as configured: reads the certificates' files and the password's environment variable.

    Raises:
        ValueError: a file cannot be read, or the variable is not set.
    """
    return EtcdAccess(
        endpoints=config.endpoints,
        user=config.user,
        password=_password(config),
        authority=_read("store.ca", config.ca),
        certificate=_read("store.cert", config.cert),
        key=_read("store.key", config.key),
        server_name=config.server_name,
    )


def _password(config: StoreConfig) -> str:
    if config.password_env is None:
        return config.password.get_secret_value() if config.password is not None else ""
    password = os.environ.get(config.password_env)
    if password is None:
        raise ValueError(
            f"store.password_env: the environment variable {config.password_env} is not set; "
            f"export {config.password_env}=... on every host that runs an agent or a controller"
        )
    return password


def _read(setting: str, path: Path | None) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{setting}: cannot read {path}: {error.strerror}") from error
