"""Journal and steps -> the summary of a run.

Pure: it reads the entries of the two files and nothing else, which shows that they explain the run.

- ``lost_steps`` counts steps that had been committed and were not part of the state that went on.
- ``redone_steps`` counts steps on which work had begun when a failure dropped it;
  ``redone_samples`` counts the samples of these that no replica kept.
- ``recover_seconds`` runs from the fault (its injection, or else its detection) to the first step
  that the generation which answers it commits. ``detect_seconds`` is known for injected faults.
- ``goodput`` is the time that the committed steps would have taken at the run's median step time,
  over the time they took with everything between them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

Entry = Mapping[str, Any]


STEP_FIGURES = ("loss", "weights_digest", "seconds")


def step_figures(step: Entry) -> Entry:
    """What the summary needs of a step: a run may have more of them than fit into memory whole."""
    return {name: step[name] for name in STEP_FIGURES}


def summarize(
    job: str, journal: Sequence[Entry], steps: Sequence[Entry], outcome: str
) -> dict[str, Any]:
    """The content of summary.json; `outcome` is completed, halted, interrupted or failed.

    Of the steps, no more is read than their `step_figures`.
    """
    plans = [entry for entry in journal if entry["event"] == "plan"]
    resumed = [entry for entry in journal if entry["event"] == "resumed"]
    differ = any(entry["event"] == "replicas_differ" for entry in journal)
    digests = [entry["weights_digest"] for entry in steps if entry["weights_digest"] is not None]
    return {
        "job": job,
        "committed_steps": len(steps),
        "lost_steps": sum(plan["lost_steps"] for plan in plans),
        "redone_steps": sum(bool(plan["redone"]) for plan in plans),
        "redone_samples": sum(plan["redone_samples"] for plan in plans),
        "generations": len(plans),
        "failures": [
            _failure(entry, plans, resumed) for entry in journal if entry["event"] == "failure"
        ],
        "final_loss": steps[-1]["loss"] if steps else None,
        "final_weights_digest": digests[-1] if digests else None,
        "replicas_bitwise_equal": not differ if digests else None,
        "goodput": _goodput(steps),
        "outcome": outcome,
    }


def _failure(failure: Entry, plans: Sequence[Entry], resumed: Sequence[Entry]) -> dict[str, Any]:
    answer = next((p for p in plans if p["generation"] > failure["generation"]), None)
    began = failure["fault_at"] or failure["detected_at"]
    first = None
    if answer is not None and failure["placed"]:
        first = next((e for e in resumed if e["generation"] >= answer["generation"]), None)
    detected = failure["detected_at"] - failure["fault_at"] if failure["fault_at"] else None
    return {
        "id": failure["id"],
        "kind": failure["kind"],
        "device": failure["device"],
        "at_step": failure["at_step"],
        "phase": failure["fault_phase"] or failure["phase"],
        "action": answer["action"] if answer is not None else None,
        "detect_seconds": _rounded(detected),
        "recover_seconds": _rounded(first["at"] - began if first is not None else None),
        "reason": answer["reason"] if answer is not None else failure["evidence"],
    }


def _goodput(steps: Sequence[Entry]) -> float | None:
    seconds = [step["seconds"] for step in steps]
    total = sum(seconds)
    return round(min(1.0, median(seconds) * len(seconds) / total), 4) if total > 0 else None


def _rounded(seconds: float | None) -> float | None:
    return round(seconds, 4) if seconds is not None else None
