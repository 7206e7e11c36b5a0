"""A worker's line to its agent: what is kept goes out with what is sent, and in order."""

from __future__ import annotations

import threading
from multiprocessing import Pipe
from multiprocessing.connection import Connection

import msgspec
import pytest

from elastic.agent_link import AgentLink
from elastic.messages import FaultFired
from elastic.topology import DeviceId, Member

MEMBER = Member(DeviceId(0, 1), 1)


def word(number: int, phase: str = "vote") -> FaultFired:
    return FaultFired(number, MEMBER, number, phase, 0.0)


@pytest.fixture
def line() -> tuple[AgentLink, Connection]:
    here, there = Pipe()
    return AgentLink(here), there


def received(there: Connection) -> list[FaultFired]:
    """The words in the next frame."""
    return msgspec.msgpack.decode(there.recv_bytes(), type=list[FaultFired])


def test_what_is_kept_goes_out_before_what_is_sent_next(line: tuple[AgentLink, Connection]) -> None:
    link, there = line
    link.send_later(word(1))
    link.send_later(word(2))
    assert not there.poll(0)
    link.send(word(3))
    assert received(there) == [word(1), word(2), word(3)]
    link.send(word(4))
    assert received(there) == [word(4)] and not there.poll(0)


def test_each_message_comes_once_and_in_its_thread_s_order(
    line: tuple[AgentLink, Connection],
) -> None:
    link, there = line
    count = 300

    def beat() -> None:
        for number in range(count):
            link.send(word(number, "heart"))

    def train() -> None:
        for number in range(count):
            tell = link.send if number % 7 == 0 else link.send_later
            tell(word(number, "train"))

    threads = [threading.Thread(target=each) for each in (beat, train)]

    def end() -> None:
        for thread in threads:
            thread.join()
        # The last words may be kept.
        link.send(word(count, "end"))

    for thread in (*threads, ending := threading.Thread(target=end)):
        thread.start()
    heard: dict[str, list[int]] = {}
    while "end" not in heard:
        for each in received(there):
            heard.setdefault(str(each.phase), []).append(each.step)
    ending.join()
    assert heard["heart"] == heard["train"] == list(range(count))
