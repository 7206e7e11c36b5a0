"""Twenty random faults of all kinds in one job of two hundred steps, and nothing of it changes.

``make test`` runs one sequence, ``make chaos`` several. A seed that fails is run again with
``pytest -m "chaos or not chaos" tests/chaos/test_sequences.py -k seed7``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.checks import check_comparison
from tests.chaos.launcher import ONE_PIECE, SHORT_QUARANTINE, Run, run_job
from tests.chaos.sequences import FAULTS, REPLICAS, REST, SLOTS, STEPS, Losses, random_faults

JOB = [
    f"cluster.nodes={REPLICAS}",
    f"cluster.devices_per_node={SLOTS}",
    f"parallel.replicas={REPLICAS}",
    f"parallel.tensor={SLOTS}",
    # Replicas stay on their nodes, so that a fault of a node is one of a replica.
    "cluster.tensor_across_nodes=false",
    *SHORT_QUARANTINE,
    f"train.steps={STEPS}",
    "train.global_batch_size=6",
    "train.micro_batch_size=1",
    "train.seq_length=16",
]
SEEDS = [pytest.param(0, id="seed0")] + [
    pytest.param(seed, id=f"seed{seed}", marks=pytest.mark.chaos) for seed in range(1, 8)
]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The job without failures. Neither its layout nor where its state is kept changes anything."""
    run = run_job(tmp_path_factory.mktemp("calm") / "job", overrides=[*JOB, *ONE_PIECE])
    assert run.exit_code == 0, run.output
    return run


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_sequence_of_faults_changes_nothing(seed: int, tmp_path: Path, calm: Run) -> None:
    faults = random_faults(seed)
    run = run_job(tmp_path / "job", faults, [*JOB, "store.kind=etcd"])
    assert run.exit_code == 0, run.output
    assert run.summary["outcome"] == "completed"
    assert run.summary["lost_steps"] == 0
    assert run.summary["replicas_bitwise_equal"] is True
    check_comparison(run.directory, calm.directory, tolerance=1e-9)
    struck = {entry["fault"] for entry in run.journal if entry["event"] == "fault_injected"}
    assert struck == set(range(1, FAULTS + 1)), "a fault never struck"
    assert run.left_over == (), f"processes were left behind: {run.left_over}"


@given(seed=st.integers(0, 10**6))
def test_a_sequence_leaves_an_intact_replica(seed: int) -> None:
    faults = random_faults(seed)
    assert faults == random_faults(seed) and len(faults) == FAULTS
    losses = Losses()
    for fault in faults:
        step, target = fault["at_step"], fault["target"]
        assert step < STEPS
        if target.get("component") == "agent":
            losses.dropped.add(target["node"])
        elif "slot" in target:
            slot = (target["replica"], target["slot"])
            assert not losses.gone(slot, step), (
                f"it may still be gone, as {REST} steps have to pass"
            )
            if fault["kind"] != "slow":
                losses.struck[slot] = step
        assert losses.intact(step)
