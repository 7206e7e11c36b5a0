"""What a controller knows of its job, and how the job goes from one generation to the next.

Pure. These are the transitions of the machine that `elastic.controller` describes; each returns its
effects, in the order in which they must be performed. Which event leads to which of them is the
controller's table.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import itemgetter

from elastic.adoption import Adoption
from elastic.commit_log import CommitLog
from elastic.effects import Effect, Finish, ForgetPlan, Limits, Note, Phase, Send
from elastic.membership import Membership
from elastic.messages import (
    Failed,
    Leave,
    PhaseDone,
    Quiesce,
    RecoveryPhase,
    Stop,
    WholePlan,
)
from elastic.notes import drained_note, failure_note, plan_notes, quiesce_note
from elastic.pace import PaceLog
from elastic.plan import NoPlan, Plan, changed_rows
from elastic.plan_chain import KEPT_PLANS, publication
from elastic.planner import (
    JobShape,
    Situation,
    home_devices,
    newcomers,
    plan_generation,
    still_needed,
)
from elastic.probation import Probation
from elastic.quiescence import Quiescence
from elastic.recorded import Recorded
from elastic.stalls import Stalls
from elastic.topology import DeviceId, Member

_There = tuple[int, frozenset[DeviceId]]
"""Who is there: how often that changed, and which devices are quarantined."""


class Job:
    """The job. `plans` are those of the last generations, `commits` who committed what."""

    def __init__(
        self,
        shape: JobShape,
        devices: tuple[DeviceId, ...],
        limits: Limits,
        now: float,
        recorded: Recorded,
    ) -> None:
        self.shape = shape
        self.limits = limits
        self.phase = Phase.QUIESCING
        self.generation = max(1, recorded.generation)
        self.plans: dict[int, Plan] = dict(recorded.plans)
        self._placed, self._participants = _members(self.plan)
        known = {m: step for m, step in recorded.committed.items() if m in self._placed}
        self.commits = CommitLog(self._placed, known, shape.steps - 1)
        self.members = Membership(devices, home_devices(shape, devices))
        self.quiescence = Quiescence((), now, limits.spawn_timeout_seconds)
        self.adoption = Adoption(self.generation, ())
        self.stalls = Stalls()
        self.pace = PaceLog(self.plans)
        self.probation = Probation(limits.quarantine)
        self._announced: Quiesce | None = None
        self._fruitless = 0
        self._progress_at_announcement = -1
        self._judged: tuple[int, _There] = (0, (0, frozenset()))
        self._drain_judged = self._judged[1]
        self._ran = 0
        self._in_use: tuple[tuple[int, int], frozenset[int]] = ((0, 0), frozenset())

    @property
    def plan(self) -> Plan | None:
        """The newest plan."""
        return self.plans[max(self.plans)] if self.plans else None

    def placed(self) -> frozenset[Member]:
        """The workers that the newest plan places."""
        return self._placed

    def involved(self) -> frozenset[Member]:
        """Who must live for the newest plan: until it runs, its donors too."""
        plan = self.plan
        return self._placed if plan and plan.generation == self._ran else self._participants

    @property
    def adopting(self) -> bool:
        """Whether the newest plan is out, and not overtaken."""
        return self.phase in (
            Phase.REBUILDING,
            Phase.RESHARDING,
            Phase.RESUMING,
            Phase.RUNNING,
        )

    def suspect(self, member: Member, now: float) -> None:
        """`member` lost a connection in this generation."""
        self.adoption.suspect(member, now + self.limits.corroboration_seconds)

    def ask_agents(self, now: float) -> None:
        """The agents of all that are awaited were asked whether they live."""
        nodes = {member.device.node for member in self.quiescence.awaited}
        self.quiescence.expect_agents(nodes, now + self.limits.agent_timeout_seconds)

    def watch_stalls(self) -> None:
        """All have the groups of the newest plan, and may come to wait in them."""
        self.stalls.watch(max(self.plans))

    def break_stall(self, now: float) -> list[Effect]:
        """If everybody waits for everybody, announce a generation in which nobody does."""
        cause = self.stalls.cause(self._awaited(), now, self.limits.corroboration_seconds)
        if cause is None:
            return []
        self.stalls.watch(0)
        note = Note("stalled", {"generation": max(self.plans), "reason": cause})
        return [note, *self.announce(cause, True, now, ask_agents=True, sever_all=True)]

    def _reported(self, plan: Plan) -> int:
        """The last step that a living worker said it committed, if `plan` begins before its end."""
        if self.commits.newest < plan.resume_step:
            return self.commits.newest
        alive, steps = self.members.alive(), self.commits.steps
        return max((steps[member] for member in alive & steps.keys()), default=-1)

    def _awaited(self) -> Iterable[Member]:
        """Those by whom the present phase is over once they have done something."""
        match self.phase:
            case Phase.QUIESCING:
                return self.quiescence.awaited
            case Phase.RUNNING:
                return self.commits.behind
            case _:
                return self.adoption.awaited

    def announce(
        self,
        cause: str,
        urgent: bool,
        now: float,
        *,
        ask_agents: bool = False,
        sever_all: bool = False,
    ) -> list[Effect]:
        """Begin the next generation: everybody placed and alive is to stop.

        `ask_agents`: nobody knows who is gone, so the agents are to say that they live.
        `sever_all`: nor which group is at fault, so none is kept.
        """
        self.generation += 1
        if self.generation - 1 > self.limits.max_recoveries:
            return self.halt(
                f"{cause}, after {self.limits.max_recoveries} recoveries; "
                "raise health.max_recoveries to go on"
            )
        progress = self.commits.newest
        stuck = urgent and progress == self._progress_at_announcement
        self._fruitless = self._fruitless + 1 if stuck else 0
        self._progress_at_announcement = progress
        if self._fruitless > self.limits.max_fruitless_recoveries:
            return self.halt(
                f"{cause}, after {self.limits.max_fruitless_recoveries} recoveries in a row "
                "without a committed step; the journal and the workers' logs say what fails again"
            )
        if self.phase is Phase.QUIESCING and self._announced is not None:
            # It overtakes one that not everybody may have heard.
            ask_agents |= self._announced.ask_agents
            sever_all |= self._announced.sever_all
        reason = f"{cause}: {'stop at once' if urgent else 'stop after the step in flight'}"
        lost = tuple(sorted(self.involved() - self.members.alive()))
        quiesce = Quiesce(self.generation, urgent, lost, reason, ask_agents, sever_all)
        note = self.quiesce(quiesce, now)
        return [Send(quiesce), note, *self.plan_if_quiet(now)]

    def quiesce(self, quiesce: Quiesce, now: float) -> Note:
        """Wait for everybody involved that lives."""
        self.phase = Phase.QUIESCING
        self._announced = quiesce
        alive, involved = self.members.alive(), self.involved()
        limits = self.limits
        # A step in flight may be finished if it is not urgent.
        patience = (
            limits.quiesce_timeout_seconds if quiesce.urgent else limits.pause_timeout_seconds
        )
        self.quiescence = Quiescence(involved & alive, now, patience, involved - alive)
        self.members.employ(involved)
        if quiesce.ask_agents:
            self.ask_agents(now)
        return quiesce_note(quiesce, len(self.quiescence.awaited))

    def plan_if_quiet(self, now: float) -> list[Effect]:
        """Plan the generation that was announced, once nobody is awaited any more."""
        complete = not self.quiescence.awaited if self.plans else self.members.complete
        return self._plan_now(now) if complete else []

    def start_late(self, now: float) -> list[Effect]:
        """Some of the devices that places prefer are not ready in time: begin the job without them
        if spares fill all places."""
        missing = ", ".join(map(str, self.members.missing()))
        waited = self.limits.spawn_timeout_seconds
        late = f"workers on {missing} were not ready {waited:g} s after the start"
        staying = self.members.workers().keys() - self.members.leaving()
        if len(staying) < len(self.members.homes):
            spared = f"{len(staying)} of the {len(self.members.homes)} that are needed were"
            remedy = "see their logs, or raise health.spawn_timeout_seconds"
            return self.halt(f"{late}, {spared}; {remedy}")
        return [
            Note("late_start", {"reason": f"{late}; spares take their places"}),
            *self._plan_now(now),
        ]

    def _plan_now(self, now: float) -> list[Effect]:
        answers = self.quiescence.answers
        plan = plan_generation(self.shape, self._situation(now))
        if isinstance(plan, NoPlan):
            return self.halt(plan.reason)
        published, before = publication(self.plans, plan), self.plan
        lost_steps = max(0, self._reported(plan) + 1 - plan.resume_step)
        self.plans[self.generation] = plan
        self._placed, self._participants = _members(plan)
        self.phase = Phase.REBUILDING
        self.adoption = Adoption(self.generation, self.involved())
        # While groups are built, that has its own limit, and not everybody has begun.
        self.stalls.watch(0)
        # Nobody asks for the answers' steps again: this record goes on with them.
        held = answers.committed
        for member in _left(before, plan) if before else ():
            held.pop(member, None)
        self.commits = CommitLog(self._placed, held, self.shape.steps - 1)
        notes = plan_notes(plan, before, self.shape.sizes, answers, lost_steps)
        return [Send(published), *notes]

    def _situation(self, now: float) -> Situation:
        return Situation(
            generation=self.generation,
            workers=self.members.workers(),
            answers=self.quiescence.answers,
            history=self.plans,
            rendezvous=self.members.rendezvous,
            homes=self.members.homes,
            paces=self.pace.paces,
            quarantined=self._kept_out(now),
            leaving=self.members.leaving(),
            silent=self.quiescence.lost,
            idle=self.members.idle,
        )

    def _kept_out(self, now: float) -> frozenset[DeviceId]:
        """The quarantined devices on which nobody works. Nobody is torn out of what runs, and a job
        starts with all that it has."""
        held = self.probation.held(now)
        if not held or not self.plans:
            return frozenset()
        alive = self.members.alive()
        return held - {member.device for member in self.involved() if member in alive}

    def phase_done(self, note: PhaseDone) -> list[Effect]:
        """A worker finished a part of the change to this generation."""
        if note.phase is RecoveryPhase.RESUME and self.plan and note.member in self._placed:
            self.commits.take(note.member, self.plan.resume_step - 1)
        done_at = self.adoption.take(note)
        if done_at is None:
            return []
        self.phase = self.adoption.phase
        fields = {"generation": note.generation, "phase": note.phase, "done_at": done_at}
        effects: list[Effect] = [Note("phase_done", fields)]
        if note.phase is RecoveryPhase.REBUILD:
            self.watch_stalls()
        if self.phase is Phase.RUNNING:
            self._ran = note.generation
            # Nobody needs the answers any more, and letting go of so many takes its time.
            self.quiescence = Quiescence((), 0.0, 0.0)
            effects.append(Note("running", {"generation": note.generation}))
            effects += self._forget_plans()
        return effects

    def _forget_plans(self) -> list[Effect]:
        """Everybody runs the newest plan: the oldest ones have become too many."""
        if len(self.plans) < 2 * KEPT_PLANS:
            return []
        old, (oldest, *_) = list(self.plans)[:-KEPT_PLANS], list(self.plans)[-KEPT_PLANS:]
        effects: list[Effect] = [Send(WholePlan(self.plans[oldest]))]
        for generation in old:
            del self.plans[generation]
            effects.append(ForgetPlan(generation))
        return effects

    def improve(self, now: float) -> list[Effect]:
        """Announce the next generation if it could do without a node that drains, or if workers are
        ready that could take a place."""
        plan = self.plan
        # Who was not wanted is not wanted as long as nobody comes or goes.
        there = (self.members.changes, self.probation.held(now))
        known = (self.generation, there)
        if plan is None or known == self._judged or self.step_in_flight() >= self.shape.steps - 1:
            return []
        self._judged = known
        situation = self._situation(now)
        effects: list[Effect] = []
        if situation.leaving and there != self._drain_judged:
            # Once for those who are there: a plan that finds no way would not find one again.
            self._drain_judged = there
            effects = self._leave_if_possible(plan, situation, now)
        if self.phase is not Phase.RUNNING:
            return effects
        wanted = newcomers(self.shape, situation, plan)
        if not wanted:
            return effects
        names = ", ".join(str(member.device) for member in wanted)
        return [*effects, *self.announce(f"{names} can take a place", False, now)]

    def _leave_if_possible(self, plan: Plan, situation: Situation, now: float) -> list[Effect]:
        nodes = {m.device.node for m in self.placed() if m.device in situation.leaving}
        if not nodes:
            return []
        names = ", ".join(f"node{node} drains" for node in sorted(nodes))
        needed = still_needed(self.shape, situation, plan)
        if needed is not None:
            return [Note("drain_waits", {"nodes": sorted(nodes), "reason": f"without: {needed}"})]
        return self.announce(names, False, now)

    def dismiss(self) -> list[Effect]:
        """Let the agents go that drain, and of whose nodes nothing is in use any more."""
        draining = self.members.draining
        if not draining or self.phase in (Phase.COMPLETED, Phase.HALTED):
            return []
        # Asked with every event, and the same until there is another plan or the newest one runs.
        known = (max(self.plans, default=0), self._ran)
        if known != self._in_use[0]:
            self._in_use = known, frozenset(member.device.node for member in self.involved())
        meeting_at = self.plan.rendezvous if self.plan and known[0] != self._ran else None
        effects: list[Effect] = []
        for agent in draining:
            if agent.node not in self._in_use[1] and agent.rendezvous != meeting_at:
                self.members.dismiss(agent.node, agent.life)
                effects.append(Send(Leave(agent.node, agent.life)))
                effects.append(drained_note(agent.node, agent.life))
        return effects

    def complete_if_done(self) -> list[Effect]:
        """End the job if everybody committed the last step."""
        if not self.commits.complete:
            return []
        self.phase = Phase.COMPLETED
        reason = f"all {self.shape.steps} steps are committed"
        return end("completed", reason)

    def halt(self, reason: str) -> list[Effect]:
        """Nothing can be done."""
        self.phase = Phase.HALTED
        return [Note("halt", {"reason": reason}), *end("halted", reason)]

    def step_in_flight(self) -> int:
        """The step after the last one known to be committed."""
        return self.commits.newest + 1

    def failure_note(self, failed: Failed) -> Note:
        """The failure as the journal is to have it."""
        return failure_note(
            failed,
            phase=self.phase,
            step_in_flight=self.step_in_flight(),
            placed=failed.member in self.involved() or not self.plans,
            generation=max(self.plans, default=0),
        )


def _members(plan: Plan | None) -> tuple[frozenset[Member], frozenset[Member]]:
    """The workers that `plan` places, and all that take part in the change to it."""
    if plan is None:
        return frozenset(), frozenset()
    if not plan.donors:
        return plan.members, plan.members
    return plan.members.difference(map(itemgetter(1), plan.donors)), plan.members


def _left(before: Plan, plan: Plan) -> set[Member]:
    """Who took part in the plan before, and has no place any more."""
    changed = changed_rows(before, plan)
    old, new = ({m for r in changed for _, m in each.rows().get(r, ())} for each in (before, plan))
    return old.union(map(itemgetter(1), before.donors)) - new


def end(outcome: str, reason: str) -> list[Effect]:
    """The job is over."""
    return [Send(Stop(reason, outcome)), Finish(outcome, reason)]
