"""Which replicas keep their gradients of an interrupted step.

Pure. A replica does if all its workers say that they hold them from one and the same generation
(`elastic.session`), and if nothing of it has changed since: the members sit in the places that they
had, in the same layout, under that generation's plan, under that of the state, and under the new
one. A worker that adopts a plan which does not keep its gradients forgets them; so what it says is
never of a time before such a plan.

Which samples are behind a gradient follows from the plan of its generation, whose replica may have
kept some of them from an earlier one, and so on back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter

from elastic.answers import Answers
from elastic.placement import Row
from elastic.plan import Plan
from elastic.salvage import Kept
from elastic.session import Standing
from elastic.topology import Member
from ntp.geometry import ParallelLayout, ReplicaLayout
from ntp.ranges import Range, merged


@dataclass(frozen=True, slots=True)
class _Past:
    """A plan by replica: who sat where, in which layout, and the samples of a step."""

    rows: Mapping[int, Row]
    layouts: Mapping[int, ReplicaLayout]
    samples: Mapping[int, tuple[Range, ...]]


def _past(plan: Plan, step: int) -> _Past:
    return _Past(
        plan.rows(),
        {replica.replica: replica for replica in plan.layout.replicas},
        {
            number: merged(share.kept + share.fresh) if share.kept else share.fresh
            for number, share in plan.shares(step)
        },
    )


def kept_gradients(
    step: int,
    source: Plan,
    layout: ParallelLayout,
    rows: Mapping[int, Row],
    answers: Answers,
    history: Mapping[int, Plan],
) -> tuple[Kept, ...]:
    """What the replicas of `layout`, seated in `rows`, keep of `step`, in the layout's order.

    `source` is the plan whose layout the state has; `history` the run's plans by generation.
    """
    claims = {
        answer.member: held.kept
        for group in answers.alike
        if (held := group[0].standing) is not None and held.kept and _counts(held, step, source)
        for answer in group
    }
    if not claims:
        return ()
    pasts = {source.generation: _past(source, step)}
    kept: list[Kept] = []
    for replica in layout.replicas:
        number, row = replica.replica, rows[replica.replica]
        if (generation := _claim(row, claims)) not in history:
            continue
        if generation not in pasts:
            pasts[generation] = _past(history[generation], step)
        if all(
            past.rows.get(number) == row and past.layouts[number] == replica
            for past in (pasts[source.generation], pasts[generation])
        ) and (samples := pasts[generation].samples[number]):
            kept.append(Kept(number, generation, samples))
    return tuple(kept)


def _counts(held: Standing, step: int, source: Plan) -> bool:
    """Whether a worker holds the state of `source`, of which `step` is the next."""
    layouts = (held.layout_generation, held.pending_generation)
    return held.committed == step - 1 and source.generation in layouts


def _claim(row: Row, claims: Mapping[Member, int]) -> int:
    """The generation from which all of a row keep gradients; 0: there is none."""
    # There may be a hundred thousand members, so the loop over them is left to C.
    generations = set(map(claims.get, map(itemgetter(1), row)))
    return (generations.pop() or 0) if len(generations) == 1 else 0
