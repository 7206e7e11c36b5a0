"""The short table at the end of the demo: what was lost, and how far the loss is off."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from elastic.compare import Comparison


def recovery_table(summary: Mapping[str, Any], comparison: Comparison) -> Table:
    """Figures of a run with failures, beside a run of the same job without."""
    table = Table(title="with the failure, against the run without", title_justify="left")
    table.add_column("")
    table.add_column("figure", justify="right")
    for failure in summary["failures"]:
        seconds = failure["recover_seconds"]
        table.add_row(
            f"{failure['device']} {failure['kind']} in step {failure['at_step']}: "
            f"{failure['action']}, fault to next committed step",
            f"{seconds:.2f} s" if seconds is not None else "-",
        )
    table.add_row("steps committed", str(summary["committed_steps"]))
    table.add_row("committed steps lost", str(summary["lost_steps"]))
    table.add_row("steps redone", str(summary["redone_steps"]))
    table.add_row("largest loss difference", f"{comparison.max_loss_difference:.1e}")
    same = comparison.first_sample_step is None
    table.add_row("same samples in every step", "yes" if same else "no")
    equal = summary["replicas_bitwise_equal"]
    words = {True: "yes", False: "no", None: "not computed"}
    table.add_row("replicas bitwise equal after every step", words[equal])
    return table
