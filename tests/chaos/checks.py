"""What must hold of a run with failures, beside a run of the same job without."""

from __future__ import annotations

from pathlib import Path

from elastic.compare import compare_runs
from tests.chaos.launcher import Run


def check_like_calm(run: Run, calm: Run, tolerance: float, failures: int) -> None:
    """Assert every promise of the design that a finished run can show."""
    check_survived(run, calm, tolerance, failures)
    assert run.summary["replicas_bitwise_equal"] is True
    assert all(step["weights_digest"] for step in run.steps)


def check_survived(run: Run, calm: Run, tolerance: float, failures: int) -> None:
    """Assert those promises that show without digests of the weights."""
    assert run.exit_code == 0, run.output
    summary = run.summary
    assert summary["outcome"] == "completed", run.output
    assert len([f for f in summary["failures"] if f["action"]]) == failures, summary["failures"]
    assert summary["lost_steps"] == 0
    assert summary["redone_steps"] <= failures
    check_comparison(run.directory, calm.directory, tolerance)
    assert run.left_over == (), f"processes were left behind: {run.left_over}"


def check_comparison(run: Path, calm: Path, tolerance: float) -> None:
    """Assert that two runs had the same losses and consumed the same samples at every step."""
    comparison = compare_runs(run, calm, tolerance)
    assert comparison.first_missing_step is None
    assert comparison.first_sample_step is None, "a step consumed other samples"
    assert comparison.max_loss_difference <= tolerance, comparison
    assert comparison.equal
