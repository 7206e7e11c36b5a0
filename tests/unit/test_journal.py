"""The files of a run, with the names that other programs read (DESIGN.md, section 10)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from scenes import Stage, committed, job_shape, step_done

from elastic.effects import Finish, Note
from elastic.journal import Recorder
from elastic.messages import AgentRecord, FaultFired, NodeProgress

STEP_FIELDS = [
    "step",
    "generation",
    "loss",
    "grad_norm",
    "tokens",
    "sample_digest",
    "weights_digest",
    "seconds",
    "degrees",
]
SUMMARY_FIELDS = [
    "job",
    "committed_steps",
    "lost_steps",
    "redone_steps",
    "redone_samples",
    "generations",
    "failures",
    "final_loss",
    "final_weights_digest",
    "replicas_bitwise_equal",
    "goodput",
    "outcome",
]
FAILURE_FIELDS = [
    "id",
    "kind",
    "device",
    "at_step",
    "phase",
    "action",
    "detect_seconds",
    "recover_seconds",
    "reason",
]


class Heard:
    """A listener that remembers."""

    def __init__(self) -> None:
        self.events: list[tuple[str, dict[str, Any]]] = []

    def __call__(self, event: str, fields: Mapping[str, Any]) -> None:
        self.events.append((event, dict(fields)))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def stage() -> Stage:
    stage = Stage(job_shape())
    stage.start()
    return stage


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def recorder(tmp_path: Path, stage: Stage, heard: Heard) -> Recorder:
    return Recorder(tmp_path, "job", stage.controller.plans, heard)


def commit(recorder: Recorder, stage: Stage, step: int, generation: int = 1, **fields: Any) -> None:
    for member in stage.placed:
        report = step_done(generation, member, step, 10.0 + step, **fields)
        recorder.observe(10.0, NodeProgress(0, (report,)))


def test_a_line_of_steps_has_the_contract_s_fields_in_order(
    tmp_path: Path, recorder: Recorder, stage: Stage, heard: Heard
) -> None:
    commit(recorder, stage, 0, sharded_digest=1, replicated_digest=2)
    (line,) = lines(tmp_path / "steps.jsonl")
    assert list(line) == STEP_FIELDS
    assert line["degrees"] == [[2], [2]] and line["weights_digest"] == f"{4:016x}"
    assert [event for event, _ in heard.events] == ["resumed", "step"]


def test_the_journal_takes_notes_and_the_end_with_time_and_name(
    tmp_path: Path, recorder: Recorder, heard: Heard
) -> None:
    recorder.observe(3.5, Note("quiesce", {"generation": 2, "lost": ("node0/1#1",)}))
    recorder.observe(4.0, Finish("halted", "no worker is left"))
    entries = lines(tmp_path / "journal.jsonl")
    assert entries == [
        {"at": 3.5, "event": "quiesce", "generation": 2, "lost": ["node0/1#1"]},
        {"at": 4.0, "event": "finish", "outcome": "halted", "reason": "no worker is left"},
    ]
    assert [fields for _, fields in heard.events] == entries


def test_workers_are_noted_when_they_change_only(
    tmp_path: Path, recorder: Recorder, stage: Stage
) -> None:
    record = AgentRecord(0, 1, stage.devices[:2], tuple(stage.placed[:1]), "node0:7")
    recorder.observe(1.0, record)
    recorder.observe(2.0, record)
    recorder.observe(3.0, AgentRecord(0, 1, stage.devices[:2], (), "node0:7"))
    entries = lines(tmp_path / "journal.jsonl")
    assert [(e["at"], e["event"], e["ready"]) for e in entries] == [
        (1.0, "workers_ready", ["node0/0#1"]),
        (3.0, "workers_ready", []),
    ]


def test_replicas_that_differ_and_figures_that_are_no_numbers_are_noted(
    tmp_path: Path, recorder: Recorder, stage: Stage
) -> None:
    for digest, member in enumerate(stage.placed):
        report = step_done(
            1,
            member,
            0,
            10.0,
            sharded_digest=digest,
            replicated_digest=0,
            grad_norm=float("nan"),
        )
        recorder.observe(10.0, NodeProgress(0, (report,)))
    _, differ, non_finite = lines(tmp_path / "journal.jsonl")
    assert (differ["event"], differ["step"]) == ("replicas_differ", 0)
    assert differ["digests"] == {"0": f"{1:016x}", "1": f"{5:016x}"}
    assert (non_finite["event"], non_finite["step"]) == ("non_finite", 0)
    assert lines(tmp_path / "steps.jsonl")[0]["grad_norm"] is None


def test_every_line_is_on_disk_before_the_next_event(tmp_path: Path, recorder: Recorder) -> None:
    for number in range(3):
        recorder.note(float(number), "start", {"number": number})
        assert len(lines(tmp_path / "journal.jsonl")) == number + 1


def test_the_summary_has_the_contract_s_fields_and_follows_from_the_files(
    tmp_path: Path, recorder: Recorder, stage: Stage
) -> None:
    for effect in [Note("plan", plan_fields(1)), *stage.failed(stage.member(0, 1))]:
        if isinstance(effect, Note):
            recorder.observe(2.0, effect)
    stage.answers({m: committed(-1) for m in stage.placed if m != stage.member(0, 1)})
    for effect in stage.effects:
        if isinstance(effect, Note):
            recorder.observe(3.0, effect)
    commit(recorder, stage, 0, generation=2)
    recorder.observe(20.0, Finish("completed", "done"))
    recorder.close()
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert list(summary) == SUMMARY_FIELDS
    assert [list(entry) for entry in summary["failures"]] == [FAILURE_FIELDS]
    assert summary["failures"][0]["action"] == "REDUCE_TP"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "journal.jsonl",
        "steps.jsonl",
        "summary.json",
    ]


def test_closing_writes_the_steps_that_were_still_awaited(
    tmp_path: Path, recorder: Recorder, stage: Stage
) -> None:
    report = step_done(1, stage.placed[0], 0, 10.0)
    recorder.observe(10.0, NodeProgress(0, (report,)))
    assert lines(tmp_path / "steps.jsonl") == []
    recorder.observe(11.0, Finish("interrupted", "enough"))
    recorder.close()
    assert json.loads((tmp_path / "summary.json").read_text())["committed_steps"] == 1
    assert [line["step"] for line in lines(tmp_path / "steps.jsonl")] == [0]


def plan_fields(generation: int) -> dict[str, Any]:
    return {
        "generation": generation,
        "action": "CONTINUE",
        "reason": "start",
        "redone": False,
        "redone_samples": 0,
        "lost_steps": 0,
    }


def test_a_leader_lost_before_the_line_of_a_step_loses_nothing_of_it(
    tmp_path: Path, recorder: Recorder, stage: Stage, heard: Heard
) -> None:
    commit(recorder, stage, 0, grad_norm=float("nan"))
    recorder.close()
    (tmp_path / "steps.jsonl").write_text("")
    successor = Recorder(tmp_path, "job", stage.controller.plans, heard)
    commit(successor, stage, 0, grad_norm=float("nan"))
    commit(successor, stage, 1)
    events = [entry["event"] for entry in lines(tmp_path / "journal.jsonl")]
    assert events == ["resumed", "non_finite"]
    assert [line["step"] for line in lines(tmp_path / "steps.jsonl")] == [0, 1]


def test_a_fault_of_a_node_is_noted_for_each_worker_whoever_leads(
    tmp_path: Path, recorder: Recorder, stage: Stage, heard: Heard
) -> None:
    first, second = (FaultFired(1, member, 4, "vote", 9.0) for member in stage.placed[:2])
    recorder.catch_up(9.0, NodeProgress(0, (first,)))
    successor = Recorder(tmp_path, "job", stage.controller.plans, heard, faults=(1, 2))
    successor.catch_up(9.0, NodeProgress(0, (first, second)))
    successor.observe(10.0, Finish("completed", "done"))
    told = [(e["event"], e.get("member")) for e in lines(tmp_path / "journal.jsonl")]
    assert told == [
        ("fault_injected", str(first.member)),
        ("fault_injected", str(second.member)),
        ("fault_not_injected", None),
        ("finish", None),
    ]
