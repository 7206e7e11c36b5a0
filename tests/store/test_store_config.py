"""The store section: what fits together is taken, everything else is refused with a remedy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from elastic.etcd_access import EtcdAccess, read_access
from elastic.store_config import StoreConfig

ONE = ("10.0.0.1:2379",)
TWO = ("10.0.0.1:2379", "10.0.0.2:2379")


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"kind": "etcd"},
        {"kind": "etcd", "endpoints": ["etcd.example:2379"], "prefix": "/team-a"},
        {"kind": "etcd", "endpoints": ["[::1]:2379", "[::2]:2379"]},
        {"kind": "etcd", "endpoints": ONE, "user": "trainer", "password_env": "WORD"},
        {"kind": "etcd", "endpoints": ONE, "ca": "ca.pem", "cert": "c.pem", "key": "c.key"},
        {"kind": "etcd", "endpoints": TWO, "ca": "ca.pem", "server_name": "etcd"},
    ],
)
def test_what_fits_together_is_taken(settings: dict[str, Any]) -> None:
    config = StoreConfig.model_validate(settings)
    assert StoreConfig.model_validate_json(config.model_dump_json()) == config


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"kind": "redis"}, "'memory' or 'etcd'"),
        ({"endpoints": ONE}, "set kind: etcd"),
        ({"kind": "etcd", "prefix": "/team-a"}, "set store.endpoints"),
        ({"kind": "etcd", "endpoints": ["http://10.0.0.1:2379"]}, "is not host:port"),
        ({"kind": "etcd", "endpoints": ["10.0.0.1"]}, "is not host:port"),
        ({"kind": "etcd", "endpoints": ["10.0.0.1:99999"]}, "is not host:port"),
        ({"kind": "etcd", "endpoints": ["etcd-0:2379", "etcd-1:2379"]}, "must all be IPv4"),
        ({"kind": "etcd", "endpoints": ["10.0.0.1:1", "[::1]:1"]}, "must all be IPv4"),
        ({"kind": "etcd", "endpoints": ONE, "prefix": "team-a"}, "pattern"),
        ({"kind": "etcd", "endpoints": ONE, "prefix": "/team-a/"}, "pattern"),
        ({"kind": "etcd", "endpoints": ONE, "user": "trainer"}, "set store.user and"),
        ({"kind": "etcd", "endpoints": ONE, "password": "word"}, "set store.user and"),
        (
            {"kind": "etcd", "endpoints": ONE, "user": "u", "password": "w", "password_env": "W"},
            "exclude each other",
        ),
        ({"kind": "etcd", "endpoints": ONE, "ca": "ca.pem", "cert": "c.pem"}, "store.key"),
        ({"kind": "etcd", "endpoints": ONE, "cert": "c.pem", "key": "c.key"}, "set store.ca"),
        ({"kind": "etcd", "endpoints": ONE, "server_name": "etcd"}, "set store.ca"),
        ({"kind": "etcd", "endpoints": TWO, "ca": "ca.pem"}, "set store.server_name"),
    ],
)
def test_what_does_not_is_refused_with_a_remedy(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        StoreConfig.model_validate(settings)


def test_secrets_are_read_when_needed_and_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "ca.pem").write_bytes(b"PEM")
    config = StoreConfig(
        kind="etcd", endpoints=ONE, user="trainer", password_env="WORD", ca=tmp_path / "ca.pem"
    )
    with pytest.raises(ValueError, match="export WORD="):
        read_access(config)
    monkeypatch.setenv("WORD", "a secret")
    access = read_access(config)
    assert access == EtcdAccess(ONE, "trainer", "a secret", authority=b"PEM")
    assert "a secret" not in repr(access)
    plain = StoreConfig.model_validate(
        {"kind": "etcd", "endpoints": ONE, "user": "trainer", "password": "a secret"}
    )
    assert read_access(plain).password == "a secret"
    assert "a secret" not in repr(plain) + plain.model_dump_json()


def test_a_missing_certificate_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "ca.pem"
    config = StoreConfig(kind="etcd", endpoints=ONE, ca=missing)
    with pytest.raises(ValueError, match=rf"store\.ca: cannot read {missing}"):
        read_access(config)
