"""Nothing is left behind, however a run ends; and nothing is started that cannot work."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from tests.chaos.launcher import (
    EVERSTEP,
    SMALL_JOB,
    Run,
    launch,
    run_job,
    wait_for_file,
    wait_until_gone,
)

ENDLESS = "train.steps=100000"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(SMALL_JOB))
    return path


def test_ctrl_c_ends_the_run_and_everything_in_it(config: Path, tmp_path: Path) -> None:
    arguments = ["run", str(config), "--set", ENDLESS, "--run-dir", str(tmp_path / "run")]
    with launch(arguments) as started:
        started.wait_for_line("generation 1 runs")
        workers = started.descendants()
        assert len(workers) >= 8
        os.kill(started.process.pid, signal.SIGINT)
        output = started.output.read()
        assert started.process.wait() == 130, output
        assert wait_until_gone(workers, timeout_seconds=10) == []
        assert started.left_over() == ()
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["outcome"] == "interrupted"


def test_ctrl_c_in_a_terminal_while_everything_still_imports(config: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    with launch(["run", str(config), "--run-dir", str(target)]) as started:
        wait_for_file(target / "journal.jsonl")
        # As a terminal does: to everybody in the foreground group.
        os.killpg(started.process.pid, signal.SIGINT)
        output = started.output.read()
        assert started.process.wait() == 130, output
        assert started.left_over() == ()
    assert "Traceback" not in output
    assert json.loads((target / "summary.json").read_text())["outcome"] == "interrupted"


def test_a_signal_while_workers_are_being_forked(config: Path, tmp_path: Path) -> None:
    target = tmp_path / "run"
    with launch(["run", str(config), "--run-dir", str(target)]) as started:
        wait_for_file(target / "logs" / "node0-0.1.log")
        os.kill(started.process.pid, signal.SIGTERM)
        output = started.output.read()
        assert started.process.wait() == 130, output
        assert started.left_over() == ()


def test_figures_that_are_not_finite_end_nothing(tmp_path: Path) -> None:
    explode = ["train.steps=4", "train.learning_rate=1e300", "train.min_learning_rate=1e300"]
    explode += ["train.warmup_steps=0", "train.clip_grad=0"]
    run = run_job(tmp_path / "job", overrides=explode)
    assert run.exit_code == 0, run.output
    assert run.summary["committed_steps"] == 4
    assert any(step["loss"] is None for step in run.steps)
    assert any(entry["event"] == "non_finite" for entry in run.journal)


def test_workers_die_with_a_killed_launcher(config: Path, tmp_path: Path) -> None:
    segments = set(Path("/dev/shm").iterdir())
    arguments = ["run", str(config), "--set", ENDLESS, "--run-dir", str(tmp_path / "run")]
    with launch(arguments) as started:
        started.wait_for_line("generation 1 runs")
        workers = started.descendants()
        assert len(workers) >= 8
        os.kill(started.process.pid, signal.SIGKILL)
        assert wait_until_gone(workers, timeout_seconds=10) == []
        assert started.left_over() == ()
    assert set(Path("/dev/shm").iterdir()) <= segments


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.stepz=3", ["train.stepz", "train.steps"]),
        ("train.global_batch_size=1", ["1", "global_batch_size"]),
        ("cluster.nodes=1", ["4", "8"]),
        ("model.num_query_groups=2", ["2", "4"]),
        ("parallel.pipeline=2", ["pipeline"]),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    override: str, words: list[str], config: Path, tmp_path: Path
) -> None:
    target = tmp_path / "run"
    with launch(["run", str(config), "--set", override, "--run-dir", str(target)]) as started:
        output = started.output.read()
        assert started.process.wait() == 2, output
    assert all(word in output for word in words), output
    assert not target.exists()


def test_a_run_directory_is_never_written_over(
    config: Path, tmp_path: Path, calm_run: Callable[[str], Run]
) -> None:
    finished = shutil.copytree(calm_run("float64").directory, tmp_path / "run")
    before = (finished / "summary.json").read_bytes()
    with launch(["run", str(config), "--run-dir", str(finished)]) as started:
        output = started.output.read()
        assert started.process.wait() == 2
    assert "holds a run already" in output
    assert (finished / "summary.json").read_bytes() == before


def test_the_loss_of_every_holder_halts_with_a_reason(tmp_path: Path) -> None:
    both = [
        {"at_step": 4, "phase": "forward", "target": {"node": node}, "kind": "sigkill"}
        for node in (0, 1)
    ]
    run = run_job(tmp_path / "job", both)
    assert run.exit_code == 3, run.output
    assert run.summary["outcome"] == "halted"
    assert run.summary["committed_steps"] == 4
    halt = next(entry for entry in run.journal if entry["event"] == "halt")
    before = run.journal[: run.journal.index(halt)]
    lost = {entry["member"] for entry in before if entry["event"] == "failure"}
    # The first losses may reach a worker before its own fault does: it lives to answer in vain.
    reason = "no worker is left" if len(lost) == 8 else "nobody alive holds"
    assert halt["reason"].startswith(reason), (halt, lost)
    assert run.left_over == (), run.left_over


def test_help_loads_no_torch() -> None:
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", str(EVERSTEP), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "compare" in ended.stdout
    imported = {line.rpartition("|")[2].strip() for line in ended.stderr.splitlines()}
    assert "typer" in imported, "the list of imports was not understood"
    assert not {"torch", "numpy", "megatron"} & imported
