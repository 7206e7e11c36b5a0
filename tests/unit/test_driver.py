"""Leaders over a real store: what one leaves unwritten, the next one writes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scenes import LIMITS, Stage, failure_of, job_shape, node_devices, step_done

from elastic import term
from elastic.controller import Controller
from elastic.driver import Driver
from elastic.effects import Finish
from elastic.journal import Recorder
from elastic.keys import encode, key_of, leader_key, position_key
from elastic.memory_store import MemoryStore
from elastic.messages import AgentRecord, ComponentFault, Failed, FaultFired, NodeProgress, Stop
from elastic.recorded import Recorded
from elastic.topology import DeviceId, Member
from elastic.worker_status import fresh_status, summed_up

SHAPE = job_shape()
PATIENCE_SECONDS = 5.0
"""Spent only by a test that fails."""


class Candidate:
    """A driver, and waits for its lead and for events of its journal."""

    def __init__(self, store: MemoryStore, run_dir: Path, lease_seconds: float = 2.0) -> None:
        self.leads = asyncio.Event()
        self._seen: asyncio.Queue[str] = asyncio.Queue()

        def listen(event: str, fields: Mapping[str, Any]) -> None:
            self._seen.put_nowait(event)

        def make(recorded: Recorded, now: float) -> Controller:
            return Controller(SHAPE, node_devices(SHAPE), LIMITS, now, recorded)

        def opened(controller: Controller) -> Recorder:
            self.leads.set()
            return Recorder(run_dir, "job", controller.plans, listen)

        self.driver = Driver(store, "job", "candidate", lease_seconds, make, opened)

    async def until(self, event: str) -> None:
        async def seen() -> None:
            while await self._seen.get() != event:
                pass

        await asyncio.wait_for(seen(), PATIENCE_SECONDS)


def journal(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "journal.jsonl").open()]


def test_faults_that_struck_while_nobody_led_are_written_once(tmp_path: Path) -> None:
    fired = FaultFired(1, Member(DeviceId(0, 0), 1), 4, "vote", 9.0)
    known = {"at": 8.0, "event": "fault_injected", "fault": 3, "component": "store"}
    (tmp_path / "journal.jsonl").write_text(json.dumps(known) + "\n")

    async def main() -> Finish:
        store = MemoryStore()
        begun = await store.put(position_key("job"), b"0")
        await store.put(position_key("job"), str(begun).encode())
        for message in (
            NodeProgress(0, (fired,)),
            ComponentFault(2, "controller", None, 5, 9.5),
            ComponentFault(3, "store", None, 2, 8.0),
        ):
            await store.put(key_of("job", message), encode(message))
        candidate = Candidate(store, tmp_path)
        leading = asyncio.create_task(candidate.driver.run())
        await candidate.until("fault_injected")
        await candidate.until("fault_injected")
        candidate.driver.stop("enough")
        return await asyncio.wait_for(leading, PATIENCE_SECONDS)

    assert asyncio.run(main()).outcome == "interrupted"
    faults = [entry["fault"] for entry in journal(tmp_path) if entry["event"] == "fault_injected"]
    assert faults == [3, 1, 2]


def test_a_report_that_waits_for_others_outlives_the_leader_that_heard_it(tmp_path: Path) -> None:
    stage = Stage(SHAPE)
    stage.start()
    part = {"sharded_digest": 1, "replicated_digest": 2}
    early, late = stage.placed[:2], stage.placed[2:]

    def reports(members: list[Member]) -> NodeProgress:
        return NodeProgress(0, tuple(step_done(1, each, 0, 10.0, **part) for each in members))

    async def main() -> None:
        store = MemoryStore()
        # Before each event it says how far the files are written, as if its lease had been over.
        eager = Candidate(store, tmp_path, lease_seconds=0.0)
        for message in stage.stored.values():
            await store.put(key_of("job", message), encode(message))
        leading = asyncio.create_task(eager.driver.run())
        await asyncio.wait_for(eager.leads.wait(), PATIENCE_SECONDS)
        heard = await store.put(key_of("job", reports(early)), encode(reports(early)))
        other = AgentRecord(7, 1, (), (Member(DeviceId(7, 0), 1),), "node7:7")
        await store.put(key_of("job", other), encode(other))
        await eager.until("workers_ready")
        assert await store.get(position_key("job")) == str(heard - 1).encode()
        leading.cancel()
        await asyncio.gather(leading, return_exceptions=True)
        successor = Candidate(store, tmp_path)
        leading = asyncio.create_task(successor.driver.run())
        await asyncio.wait_for(successor.leads.wait(), PATIENCE_SECONDS)
        await store.put(key_of("job", reports(late)), encode(reports(late)))
        await successor.until("step")
        successor.driver.stop("enough")
        await asyncio.wait_for(leading, PATIENCE_SECONDS)

    asyncio.run(main())
    (line,) = [json.loads(line) for line in (tmp_path / "steps.jsonl").open()]
    assert line["weights_digest"] == f"{4:016x}"


def test_a_candidate_stands_by_until_the_leader_is_gone(tmp_path: Path) -> None:
    async def main() -> Finish:
        store = MemoryStore()
        lease = await store.lease(2.0)
        await store.create(leader_key("job"), b"another", lease)
        record = AgentRecord(0, 1, (), (), "node0:7")
        candidate = Candidate(store, tmp_path)
        leading = asyncio.create_task(candidate.driver.run())
        await store.put(key_of("job", record), encode(record))
        assert await store.get(leader_key("job")) == b"another"
        assert not (tmp_path / "journal.jsonl").exists()
        await lease.revoke()
        await asyncio.wait_for(candidate.leads.wait(), PATIENCE_SECONDS)
        candidate.driver.stop("enough")
        return await asyncio.wait_for(leading, PATIENCE_SECONDS)

    assert asyncio.run(main()).outcome == "interrupted"
    assert (tmp_path / "summary.json").exists()


def test_a_leader_that_does_not_know_that_another_leads_leaves_the_files_alone(
    tmp_path: Path,
) -> None:
    member = Member(DeviceId(0, 0), 1)

    async def main() -> None:
        store = MemoryStore()
        # As if the whole time of its lease had passed before each event.
        paused = Candidate(store, tmp_path, lease_seconds=0.0)
        leading = [asyncio.create_task(paused.driver.run())]
        await asyncio.wait_for(paused.leads.wait(), PATIENCE_SECONDS)
        successor = Candidate(store, tmp_path)
        leading.append(asyncio.create_task(successor.driver.run()))
        await store.delete(leader_key("job"))
        await asyncio.wait_for(successor.leads.wait(), PATIENCE_SECONDS)
        failed = Failed(failure_of(member, at=9.0), None, None, None)
        await store.put(key_of("job", failed), encode(failed))
        await successor.until("failure")
        successor.driver.stop("enough")
        await asyncio.wait_for(asyncio.gather(*leading), PATIENCE_SECONDS)

    asyncio.run(main())
    failures = [entry for entry in journal(tmp_path) if entry["event"] == "failure"]
    assert [entry["member"] for entry in failures] == [str(member)]


class Lifelines:
    """Plays the connections to agents, and lists which are held and let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._happened: asyncio.Queue[str] = asyncio.Queue()
        monkeypatch.setattr(term, "until_nobody_listens", self._hold)

    async def _hold(self, address: str) -> None:
        self._happened.put_nowait(f"hold {address}")
        try:
            await asyncio.Event().wait()
        finally:
            self._happened.put_nowait(f"release {address}")

    async def next(self) -> str:
        return await asyncio.wait_for(self._happened.get(), PATIENCE_SECONDS)

    def rest(self) -> list[str]:
        return [self._happened.get_nowait() for _ in range(self._happened.qsize())]


def test_a_lifeline_lasts_as_long_as_the_record_of_its_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lives = [AgentRecord(0, life, (), (), f"node0:{life}") for life in (1, 2, 3)]

    async def main() -> None:
        store, lifelines = MemoryStore(), Lifelines(monkeypatch)
        begun = await store.put(position_key("job"), b"0")
        await store.put(position_key("job"), str(begun).encode())
        key = key_of("job", lives[0])
        # Changes that the term is told of although they lie behind it.
        await store.put(key, encode(lives[0]))
        await store.delete(key)
        await store.put(key, encode(lives[1]))
        candidate = Candidate(store, tmp_path)
        leading = asyncio.create_task(candidate.driver.run())
        assert await lifelines.next() == "hold node0:2"
        await store.delete(key)
        assert await lifelines.next() == "release node0:2"
        await store.put(key, encode(lives[2]))
        assert await lifelines.next() == "hold node0:3"
        candidate.driver.stop("enough")
        await asyncio.wait_for(leading, PATIENCE_SECONDS)
        assert lifelines.rest() == ["release node0:3"]

    asyncio.run(main())


def test_a_run_whose_leader_was_lost_at_the_very_end_is_concluded_once(tmp_path: Path) -> None:
    fired = FaultFired(1, Member(DeviceId(0, 0), 1), 4, "vote", 9.0)
    record = AgentRecord(0, 1, (), (Member(DeviceId(0, 0), 1),), "node0:7")

    async def main() -> list[Finish]:
        store = MemoryStore()
        begun = await store.put(position_key("job"), b"0")
        await store.put(position_key("job"), str(begun).encode())
        for message in (record, NodeProgress(0, (fired,)), Stop("all is done", "completed")):
            await store.put(key_of("job", message), encode(message))
        drivers = [Candidate(store, tmp_path).driver for _ in range(2)]
        return [await asyncio.wait_for(driver.run(), PATIENCE_SECONDS) for driver in drivers]

    assert asyncio.run(main()) == [Finish("completed", "all is done")] * 2
    events = [entry["event"] for entry in journal(tmp_path)]
    assert events == ["workers_ready", "fault_injected", "finish"]
    assert json.loads((tmp_path / "summary.json").read_text())["outcome"] == "completed"


def test_the_last_steps_of_a_job_that_was_done_before_anybody_led_again_are_written(
    tmp_path: Path,
) -> None:
    stage = Stage(SHAPE)
    stage.start()

    async def main() -> Finish:
        store = MemoryStore()
        begun = await store.put(position_key("job"), b"0")
        await store.put(position_key("job"), str(begun).encode())
        for message in stage.stored.values():
            await store.put(key_of("job", message), encode(message))
        statuses = {member: fresh_status(member) for member in stage.placed}
        for step in range(SHAPE.steps):
            done = [step_done(1, member, step, 10.0 + step) for member in stage.placed]
            for word in done:
                statuses[word.member] = summed_up(statuses[word.member], word)
            for node in range(SHAPE.replicas):
                words = tuple(word for word in done if word.member.device.node == node)
                of_node = tuple(s for m, s in statuses.items() if m.device.node == node)
                progress = NodeProgress(node, words, of_node)
                await store.put(key_of("job", progress), encode(progress))
        return await asyncio.wait_for(Candidate(store, tmp_path).driver.run(), PATIENCE_SECONDS)

    assert asyncio.run(main()).outcome == "completed"
    steps = [json.loads(line)["step"] for line in (tmp_path / "steps.jsonl").open()]
    assert steps == list(range(SHAPE.steps))
