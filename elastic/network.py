"""A network of its own for a run on one machine, in which nodes can be cut off from the others.

Theory of operation. Linux gives a process a network namespace: interfaces, addresses and routes of
its own. The launcher moves into a new one, whose bridge is the switch between the nodes; what it
starts there (etcd, controllers) is plugged in at the switch itself. Each node has another one,
wired to the switch by a pair of virtual interfaces, and its agent is started inside. To cut a node
off is to take its port of the switch down: nothing answers any more, as behind a cable that was
pulled, and no connection is told.

Namespaces have no names here. The launcher's open descriptors and the processes inside are all that
holds them, so the kernel removes them, with every interface, when these are gone, however that came
about.

It needs the right to administrate networks (root has it), and three common programs: `ip` of
iproute2, `nsenter` and `unshare` of util-linux.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Collection
from ipaddress import IPv4Interface
from pathlib import Path
from typing import Final

CLONE_NEWNET: Final = 0x40000000
THIS_NAMESPACE: Final = Path("/proc/thread-self/ns/net")
SWITCH: Final = IPv4Interface("10.0.0.1/16")
"""The launcher's own address; any would do, as nobody else is in this network."""
FIRST_NODE: Final = IPv4Interface("10.0.1.1/16")
PROGRAMS: Final = {"ip": "iproute2", "nsenter": "util-linux", "unshare": "util-linux"}
PROBE: Final = "ip link add switch type bridge && ip link add port type veth peer name wire"


class NetworkRefused(ValueError):
    """Networks cannot be made here; the message says what is missing and what to do."""


class Loopback:
    """No network at all: every node is this machine."""

    host = "127.0.0.1"

    def address(self, node: int) -> str:
        """Under which others reach `node`."""
        return self.host

    def inside(self, node: int) -> tuple[str, ...]:
        """What goes before a command that is to run on `node`."""
        return ()

    def close(self) -> None:
        """Nothing is held."""


class PrivateNetwork:
    """The switch, with this thread and all that it starts from now on, and `nodes` around it.

    Call `check_network` first, and make it before other threads that need it.
    """

    host = str(SWITCH.ip)

    def __init__(self, nodes: Collection[int]) -> None:
        self._outside = os.open(THIS_NAMESPACE, os.O_RDONLY)
        self._switch = _new_namespace()
        self._nodes: dict[int, int] = {}
        _ip("link add switch type bridge", f"address add {SWITCH} dev switch")
        _ip("link set switch up", "link set lo up")
        for node in nodes:
            self._nodes[node] = _new_namespace()
            _enter(self._switch)
            self._wire(node)

    def address(self, node: int) -> str:
        """Under which others reach `node`."""
        return str(_interface(node).ip)

    def inside(self, node: int) -> tuple[str, ...]:
        """What goes before a command that is to run on `node`."""
        return ("nsenter", f"--net={self._path(node)}")

    def cut(self, node: int) -> None:
        """Separate `node` from all others, until it is joined again."""
        _ip(f"link set node{node} down")

    def join(self, node: int) -> None:
        """Connect `node` again."""
        _ip(f"link set node{node} up")

    def close(self) -> None:
        """Leave the network; it ends with the last process inside."""
        _enter(self._outside)
        for descriptor in (self._outside, self._switch, *self._nodes.values()):
            os.close(descriptor)

    def _wire(self, node: int) -> None:
        _ip(
            f"link add node{node} master switch type veth peer name wire netns {self._path(node)}",
            f"link set node{node} up",
        )
        _ip(
            f"address add {_interface(node)} dev wire",
            "link set wire up",
            "link set lo up",
            inside=self.inside(node),
        )

    def _path(self, node: int) -> str:
        return f"/proc/{os.getpid()}/fd/{self._nodes[node]}"


Network = Loopback | PrivateNetwork


def check_network() -> None:
    """Raise NetworkRefused if this process may not make networks, or lacks a program for it."""
    for program, package in PROGRAMS.items():
        if shutil.which(program) is None:
            raise NetworkRefused(
                f"a partition needs network namespaces, and the program {program} for them; "
                f"install {package}"
            )
    tried = subprocess.run(
        ["unshare", "--net", "sh", "-c", PROBE], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        raise NetworkRefused(
            "a partition needs network namespaces with a bridge and virtual interfaces, and this "
            f"process may not make them ({tried.stderr.strip()}); run it as root, or as: "
            "unshare --map-root-user everstep run ..."
        )


def _interface(node: int) -> IPv4Interface:
    return IPv4Interface((FIRST_NODE.ip + node, FIRST_NODE.network.prefixlen))


def _new_namespace() -> int:
    """A descriptor of a new network namespace, which this thread is in from now on."""
    _call("unshare", CLONE_NEWNET)
    return os.open(THIS_NAMESPACE, os.O_RDONLY)


def _enter(namespace: int) -> None:
    _call("setns", namespace, CLONE_NEWNET)


def _call(function: str, *arguments: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc[function](*arguments):
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


def _ip(*commands: str, inside: tuple[str, ...] = ()) -> None:
    """Run commands of the ip program, in this thread's namespace or `inside` another."""
    subprocess.run([*inside, "ip", "-batch", "-"], input="\n".join(commands), text=True, check=True)
