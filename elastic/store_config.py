"""The `store` section of the configuration: where coordination state is kept."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, field_validator, model_validator

from elastic.settings import Settings


class StoreConfig(Settings):
    """Where the coordination state (plans, leases, reports) is kept."""

    kind: Literal["memory", "etcd"] = Field(
        default="memory",
        description="Store adapter; memory: embedded in the launcher's process (one machine); "
        "etcd: for any number of machines.",
    )
    controllers: int = Field(
        default=2,
        ge=1,
        description="Controllers that everstep run starts with etcd: one leads, the others stand "
        "by. In the memory store there is always one.",
    )
    endpoints: tuple[str, ...] = Field(
        default=(),
        description="host:port of etcd's members: several addresses, or one name that resolves to "
        "all of them. Empty with kind etcd: a private etcd is started for the run, on one machine.",
    )
    prefix: str = Field(
        default="",
        pattern=r"^(/.*[^/])?$",
        description="Goes before every key in etcd, such as /team-a: begins with a slash, does not "
        "end with one. Empty: keys begin with /everstep/.",
    )
    user: str | None = Field(default=None, description="User of etcd, if it wants one.")
    password: SecretStr | None = Field(
        default=None,
        description="The user's password. It is left out of the files that a run writes.",
    )
    password_env: str | None = Field(
        default=None,
        description="Name of the environment variable that holds the password, instead of it.",
    )
    ca: Path | None = Field(
        default=None,
        description="PEM file of the authority that signed etcd's certificates; connections use "
        "TLS if it is given.",
    )
    cert: Path | None = Field(
        default=None, description="PEM file of this client's certificate, if etcd wants one."
    )
    key: Path | None = Field(default=None, description="PEM file of the certificate's key.")
    server_name: str | None = Field(
        default=None,
        description="Name to expect in the members' certificates; needed with TLS and several "
        "endpoints.",
    )

    @field_validator("endpoints")
    @classmethod
    def _endpoints_have_ports(cls, endpoints: tuple[str, ...]) -> tuple[str, ...]:
        for endpoint in endpoints:
            host, _, port = endpoint.rpartition(":")
            if not host or "/" in host or not port.isdecimal() or not 0 < int(port) < 2**16:
                raise ValueError(
                    f"{endpoint!r} is not host:port; write, for example, 10.0.0.1:2379 (TLS is "
                    "asked for by store.ca, not by https://)"
                )
        versions = {_ip_version(endpoint) for endpoint in endpoints}
        if len(endpoints) > 1 and (None in versions or len(versions) > 1):
            raise ValueError(
                f"{len(endpoints)} endpoints must all be IPv4 or all IPv6 addresses; give such, or "
                "one name that resolves to all members"
            )
        return endpoints

    @model_validator(mode="after")
    def _settings_fit_together(self) -> Self:
        given = [
            name for name in type(self).model_fields if getattr(self, name) not in (None, "", ())
        ]
        given = [name for name in given if name not in ("kind", "controllers")]
        if given and self.kind != "etcd":
            raise ValueError(f"store.{given[0]} means nothing to the memory store; set kind: etcd")
        if given and not self.endpoints:
            raise ValueError(
                f"store.{given[0]} means nothing to a private etcd; set store.endpoints to reach "
                "another one"
            )
        if self.password is not None and self.password_env is not None:
            raise ValueError("store.password and store.password_env exclude each other; keep one")
        if (self.user is None) != (self.password is None and self.password_env is None):
            raise ValueError(
                "store.user needs a password and a password a user; set store.user and "
                "store.password_env, or neither"
            )
        if (self.cert is None) != (self.key is None) or (self.cert is not None and self.ca is None):
            raise ValueError(
                "a client's certificate needs its key and the servers' authority; set store.ca, "
                "store.cert and store.key"
            )
        if self.server_name is not None and self.ca is None:
            raise ValueError("store.server_name means nothing without TLS; set store.ca")
        if self.ca is not None and self.server_name is None and len(self.endpoints) > 1:
            raise ValueError(
                f"TLS with {len(self.endpoints)} endpoints needs a name that all their "
                "certificates hold; set store.server_name"
            )
        return self


def _ip_version(endpoint: str) -> int | None:
    """4 or 6; None for a name."""
    try:
        return ip_address(endpoint.rpartition(":")[0].strip("[]")).version
    except ValueError:
        return None
