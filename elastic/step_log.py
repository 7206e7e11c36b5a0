"""Step reports of all ranks -> one line a committed step.

Pure. Every rank reports every step it commits, but only some of the reports come at once, and the
last ones of a rank that dies may never come. The
vote's figures are equal on all ranks, so any one report gives them, and the line is due when two
ranks spoke for all: the first and the last, which no single loss takes. The weights digest of a
replica is the sum of its slots' parts, so a step with digests needs all ranks. Otherwise a line is
due with the next step's: a rank that died right after its commit leaves its replica's digest
unknown for that step, and the others' digests stand.

Until its line is due, a report is in memory only. So each comes with its revision in the store, and
whoever goes on with the log is to begin before the oldest that waits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

from elastic.messages import StepDone
from elastic.plan import Plan
from elastic.topology import Member

DIGEST_MODULUS = 1 << 64


@dataclass(frozen=True, slots=True)
class StepLine:
    """A line of steps.jsonl, and beside it what the line has no field for.

    `replica_digests` are those of the replicas that reported completely; `at` is when the last
    rank committed of those that reported (seconds since the epoch).
    """

    step: int
    generation: int
    loss: float
    grad_norm: float
    tokens: int
    sample_digest: str
    weights_digest: str | None
    seconds: float
    degrees: tuple[tuple[int, ...], ...]
    replica_digests: tuple[tuple[int, str], ...]
    at: float

    @property
    def replicas_equal(self) -> bool | None:
        """Whether all digests known agree; None where none is known."""
        digests = {digest for _, digest in self.replica_digests}
        return len(digests) == 1 if digests else None


class StepLog:
    """Collects reports; `take` and `flush` return the lines that became due, in order of step.

    Reports of steps whose lines came out, or that are not after `after`, are dropped.
    """

    def __init__(self, plans: Mapping[int, Plan], after: int = -1) -> None:
        self._plans = plans
        self._after = after
        self._reports: dict[int, dict[Member, StepDone]] = {}
        self._since: dict[int, int] = {}
        self._previous_at: float | None = None

    @property
    def waits_since(self) -> int | None:
        """The revision of the oldest report whose line is not due yet; None: there is none."""
        return min(self._since.values(), default=None)

    def take(self, report: StepDone, revision: int = 0) -> list[StepLine]:
        """Add one report, which the store has had since `revision`."""
        if report.generation not in self._plans or report.step <= self._after:
            return []
        self._reports.setdefault(report.step, {})[report.member] = report
        self._since.setdefault(report.step, revision)
        return self._lines(report.step) if self._is_due(report.step) else []

    def flush(self) -> list[StepLine]:
        """The job is over: everything that is left."""
        return self._lines(max(self._reports)) if self._reports else []

    def _is_due(self, step: int) -> bool:
        reports = self._reports[step]
        newest = next(reversed(reports.values()))
        if newest.awaited and newest.sharded_digest is None:
            speakers = (each for each in reports.values() if each.awaited)
            if sum(each.generation == newest.generation for each in speakers) > 1:
                return True
        # Looked at closely only where their number says that it may be worth it.
        if len(reports) < len(self._plans[newest.generation].placement):
            return False
        generation = max(map(attrgetter("generation"), reports.values()))
        return all(member in reports for _, member in self._plans[generation].placement)

    def _lines(self, up_to: int) -> list[StepLine]:
        due = sorted(step for step in self._reports if step <= up_to)
        self._after = max(self._after, up_to)
        for step in due:
            del self._since[step]
        return [self._line(step, list(self._reports.pop(step).values())) for step in due]

    def _line(self, step: int, reports: Sequence[StepDone]) -> StepLine:
        generation = max(report.generation for report in reports)
        plan = self._plans[generation]
        at = max(report.at for report in reports)
        since = self._previous_at or min(report.started_at for report in reports)
        self._previous_at = at
        # A rank that died may have reported an attempt that was dropped and redone.
        first = next(report for report in reports if report.generation == generation)
        digests = _replica_digests(plan, reports)
        return StepLine(
            step=step,
            generation=generation,
            loss=first.loss,
            grad_norm=first.grad_norm,
            tokens=first.tokens,
            sample_digest=first.sample_digest,
            weights_digest=digests[0][1] if digests else None,
            seconds=at - since,
            degrees=plan.degrees(),
            replica_digests=digests,
            at=at,
        )


def _replica_digests(plan: Plan, reports: Sequence[StepDone]) -> tuple[tuple[int, str], ...]:
    """Digest per replica all of whose slots reported theirs and agree on the replicated tensors."""
    found: list[tuple[int, str]] = []
    by_member = {report.member: report for report in reports if report.sharded_digest is not None}
    for replica, mates in plan.rows().items() if by_member else ():
        parts = {a.coordinate: by_member.get(a.member) for a in mates}
        sharded = [
            part.sharded_digest
            for part in parts.values()
            if part is not None and part.sharded_digest is not None
        ]
        if len(sharded) < len(mates):
            continue
        replicated = {
            (place.stage, part.replicated_digest) for place, part in parts.items() if part
        }
        if len(replicated) > plan.stages:
            # Slots of one stage hold different norms: no digest can be right.
            found.append((replica, "differs-within-replica"))
            continue
        total = (sum(sharded) + sum(digest or 0 for _, digest in replicated)) % DIGEST_MODULUS
        found.append((replica, f"{total:016x}"))
    return tuple(found)
