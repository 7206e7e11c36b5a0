"""Hold two runs against each other: did they take the same steps, on the same samples?

Theory of operation. A run directory is a contract (`steps.jsonl`, one line a committed step, and
`summary.json`), so two runs are compared from their files alone. They are equal when they committed
the same steps, every step consumed the same samples, and no loss differs by more than a tolerance.
Digests of the weights are reported but do not decide: another layout adds the same numbers in
another order, which changes the last bits of the weights of a run that is entirely right.

A step that was restored from a checkpoint and taken again appears twice, in a later generation the
second time; the later line counts. Anything else that repeats a step is a damaged file. A
comparison without evidence (a run with no committed step) is refused rather than called equal.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table


class CompareError(ValueError):
    """A run's files are missing or damaged; the message names the file and the line."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What two runs, a and b, have in common.

    Attributes:
        tolerance: largest absolute difference of losses that still counts as equal.
        steps_a: number of committed steps in a's steps.jsonl.
        steps_b: number of committed steps in b's steps.jsonl.
        first_missing_step: first step that only one of the runs committed; None: there is none.
        max_loss_difference: largest absolute difference of losses over the common steps.
        max_loss_step: the step where it is; None: no common step has a finite loss on both sides.
        first_loss_step: first step whose losses differ by more than the tolerance.
        first_nan_step: first step where the loss is not a number in exactly one run.
        first_sample_step: first step that consumed different samples.
        weights_compared: number of steps for which both runs have a digest of the weights.
        first_weights_step: first of these whose digests differ.
        outcome_a: how a ended, from its summary.json.
        outcome_b: how b ended, from its summary.json.
    """

    tolerance: float
    steps_a: int
    steps_b: int
    first_missing_step: int | None
    max_loss_difference: float
    max_loss_step: int | None
    first_loss_step: int | None
    first_nan_step: int | None
    first_sample_step: int | None
    weights_compared: int
    first_weights_step: int | None
    outcome_a: str
    outcome_b: str

    @property
    def equal(self) -> bool:
        """Whether both runs took the same steps on the same samples with the same losses."""
        differences = (
            self.first_missing_step,
            self.first_loss_step,
            self.first_nan_step,
            self.first_sample_step,
        )
        return all(step is None for step in differences)


@dataclass(frozen=True, slots=True)
class _Step:
    generation: int
    loss: float
    sample_digest: str | int
    weights_digest: str | int | None


def compare_runs(a: Path, b: Path, tolerance: float) -> Comparison:
    """Compare two run directories.

    Args:
        a: directory of the first run, usually one without failures.
        b: directory of the second run.
        tolerance: largest absolute difference of losses that counts as equal; 0: exactly equal.

    Raises:
        CompareError: a file is missing, damaged or without any committed step.
        ValueError: the tolerance is negative or not a number.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance is {tolerance}; it must be a number of at least 0")
    steps_a, steps_b = _read_steps(a / "steps.jsonl"), _read_steps(b / "steps.jsonl")
    common = sorted(steps_a.keys() & steps_b.keys())
    pairs = {step: (steps_a[step], steps_b[step]) for step in common}
    losses = {step: _loss_difference(x.loss, y.loss) for step, (x, y) in pairs.items()}
    finite = {step: value for step, value in losses.items() if not math.isnan(value)}
    weighed = {
        step: x.weights_digest == y.weights_digest
        for step, (x, y) in pairs.items()
        if x.weights_digest is not None and y.weights_digest is not None
    }
    # max keeps the first of equal values, and the steps are in order.
    worst = max(finite, key=finite.__getitem__, default=None)
    return Comparison(
        tolerance=tolerance,
        steps_a=len(steps_a),
        steps_b=len(steps_b),
        first_missing_step=min(steps_a.keys() ^ steps_b.keys(), default=None),
        max_loss_difference=0.0 if worst is None else finite[worst],
        max_loss_step=worst,
        first_loss_step=_first({step: value <= tolerance for step, value in finite.items()}),
        first_nan_step=_first({step: not math.isnan(value) for step, value in losses.items()}),
        first_sample_step=_first(
            {step: x.sample_digest == y.sample_digest for step, (x, y) in pairs.items()}
        ),
        weights_compared=len(weighed),
        first_weights_step=_first(weighed),
        outcome_a=_read_outcome(a / "summary.json"),
        outcome_b=_read_outcome(b / "summary.json"),
    )


def render(comparison: Comparison) -> Table:
    """A table of what was compared, for a terminal."""
    # Imported here, so that programs that only compare need no terminal library.
    from rich.table import Table

    found = comparison
    table = Table(title="The runs are equal" if found.equal else "The runs differ")
    for heading in ("compared", "result", "decides"):
        table.add_column(heading)
    counts = f"{found.steps_a} and {found.steps_b}"
    if found.first_missing_step is not None:
        counts += f"; only one run has step {found.first_missing_step}"
    table.add_row("committed steps", counts, "yes")
    table.add_row("samples", _since(found.first_sample_step), "yes")
    if found.max_loss_step is None:
        loss = "no step with a number on both sides"
    else:
        loss = f"at most {found.max_loss_difference:.3g} apart, at step {found.max_loss_step}"
    if found.first_loss_step is not None:
        loss += f"; beyond {found.tolerance:.3g} since step {found.first_loss_step}"
    if found.first_nan_step is not None:
        loss += f"; not a number in one run at step {found.first_nan_step}"
    table.add_row("loss", loss, "yes")
    weights = _since(found.first_weights_step) if found.weights_compared else "no digests"
    table.add_row(f"weights ({found.weights_compared} steps)", weights, "no")
    table.add_row("outcome", f"{found.outcome_a} and {found.outcome_b}", "no")
    return table


def _since(step: int | None) -> str:
    return "the same" if step is None else f"different, first at step {step}"


def _first(agreement: Mapping[int, bool]) -> int | None:
    """First step on which the runs do not agree."""
    return min((step for step, agrees in agreement.items() if not agrees), default=None)


def _loss_difference(a: float, b: float) -> float:
    """Absolute difference; 0 for two nans or equal infinities, nan for a nan on one side only."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    return abs(a - b)


def _read_steps(path: Path) -> dict[int, _Step]:
    steps: dict[int, _Step] = {}
    for number, line in enumerate(_read(path).splitlines(), start=1):
        where = f"{path}, line {number}"
        record = _parse(line, where)
        step = _field(record, "step", (int,), where)
        taken = _Step(
            generation=_field(record, "generation", (int,), where),
            loss=_loss(record, where),
            sample_digest=_field(record, "sample_digest", (str, int), where),
            weights_digest=_optional(record, "weights_digest", where),
        )
        earlier = steps.get(step)
        if earlier is not None and earlier.generation >= taken.generation:
            raise CompareError(
                f"{where}: step {step} of generation {taken.generation} was already committed in"
                f" generation {earlier.generation}"
            )
        steps[step] = taken
    if not steps:
        raise CompareError(f"{path}: holds no committed step, so there is nothing to compare")
    return steps


def _read_outcome(path: Path) -> str:
    outcome: str = _field(_parse(_read(path), str(path)), "outcome", (str,), str(path))
    return outcome


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CompareError(f"{path}: cannot be read: {error}") from None


def _parse(text: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise CompareError(
            f"{where}: not JSON (line {error.lineno}, column {error.colno}: {error.msg})"
        ) from None
    if not isinstance(record, dict):
        raise CompareError(f"{where}: holds a {type(record).__name__}, not an object")
    return record


def _loss(record: Mapping[str, Any], where: str) -> float:
    # Strict JSON has no nan: writers put null in its place.
    if "loss" in record and record["loss"] is None:
        return math.nan
    return float(_field(record, "loss", (int, float), where))


def _optional(record: Mapping[str, Any], name: str, where: str) -> str | int | None:
    if record.get(name) is None:
        return None
    digest: str | int = _field(record, name, (str, int), where)
    return digest


def _field(record: Mapping[str, Any], name: str, kinds: tuple[type, ...], where: str) -> Any:
    value = record.get(name)
    # True is an int to Python, but not in JSON.
    if not isinstance(value, kinds) or isinstance(value, bool):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        found = repr(value) if name in record else "nothing"
        raise CompareError(f"{where}: field {name} must be {allowed}, found {found}")
    return value
