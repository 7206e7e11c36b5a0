"""Bad luck: waits for the trigger of each strike, and lets it happen to somebody."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import TYPE_CHECKING

from network import WAIT_SECONDS
from sim_agent import DRAIN_SECONDS, SimAgent
from sim_candidate import Candidate
from sim_worker import SimWorker
from strikes import Kind, Strike, new_strikes

from elastic.topology import DeviceId
from health.classify import StoppedAnswering

if TYPE_CHECKING:
    from world import World

STALL_SECONDS = 15.0
"""Long before the backend does, the runtime ends a wait that nothing else will end."""
NOTICED_SECONDS = 5.0
"""In which it does, behind a strike that kept it from noticing."""
HANG_NOTICED_SECONDS = 4.0
"""After which the peers of a worker that hangs give its connections up."""


class Luck:
    """The strikes of one world; `struck_at` is the time of the last."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._clock = world.clock
        self._strikes = new_strikes(world.clock.rng, world.shape.steps)
        self._seen: Counter[str] = Counter()
        self.struck_at = 0.0

    def begin(self) -> None:
        """Those whose time is known are due then."""
        for strike in self._strikes:
            if strike.trigger == "time":
                self._clock.after(strike.at, self._strike, strike, None)

    def happened(self, trigger: str) -> None:
        """A phase began, or a key was written."""
        self._seen[trigger] += 1
        self._spring(trigger, self._seen[trigger], None)

    def reached(self, worker: SimWorker, point: str) -> None:
        """A worker's step came to a point."""
        if point == "computing" and worker.gradient.goes_on:
            self.happened("salvaging")
        step = worker.session.committed if point == "committed" else worker.session.step
        self._spring(point, step, worker)

    def _spring(self, trigger: str, at: int, worker: SimWorker | None) -> None:
        for strike in self._strikes:
            if strike.trigger == trigger and strike.at == at and not strike.done:
                strike.done = True
                self._clock.after(strike.delay, self._strike, strike, worker)

    def _strike(self, strike: Strike, at: SimWorker | None) -> None:
        strike.done = True
        world, seconds = self._world, strike.seconds
        self.struck_at = self._clock.now + seconds
        if strike.kind is not Kind.DRAIN:
            world.oracle.avoidance.is_calm = False
        match strike.kind:
            case (
                Kind.KILL
                | Kind.HANG
                | Kind.SLOW
                | Kind.FALSE_ALARM
                | Kind.FLAP
                | Kind.CUT
                | Kind.LOSE
            ):
                self._strike_workers(strike, at)
            case Kind.PARTITION:
                self._partition(seconds)
            case Kind.AGENT_KILL | Kind.AGENT_STOP | Kind.AGENT_CUT | Kind.NODE_CUT:
                self._strike_agent(strike, at)
            case Kind.DRAIN:
                self._drain(at, seconds)
            case Kind.LEADER_KILL | Kind.LEADER_STOP | Kind.LEADER_CUT:
                leaders = [each for each in world.candidates if each.term is not None]
                for leader in leaders:
                    self._strike_leader(strike.kind, leader, seconds)
            case Kind.OUTAGE:
                self._clock.tell("the store falls silent for %.1f s", seconds)
                world.store.fall_silent()
                self._clock.after(seconds, self._store_answers)

    # Workers.

    def _strike_workers(self, strike: Strike, at: SimWorker | None) -> None:
        world, rng = self._world, self._clock.rng
        alive = [w for w in world.workers() if not w.dead and not w.hung]
        rng.shuffle(alive)
        if at in alive and rng.random() < 0.6:
            alive.remove(at)
            alive.insert(0, at)
        if not alive:
            return
        victim = alive[0]
        match strike.kind:
            case Kind.KILL:
                # Often enough somebody is left; now and then nobody is.
                spared = world.shape.tensor if rng.random() < 0.95 else 0
                for worker in alive[: max(1, min(strike.victims, len(alive) - spared))]:
                    world.kill(worker)
            case Kind.HANG:
                self._hang(victim, strike.seconds)
            case Kind.SLOW:
                self._clock.tell("%s takes its time", victim.member)
                victim.process.stopped = True
                self._clock.after(3.0 + 3.0 * rng.random(), self._wake, victim)
            case Kind.FALSE_ALARM:
                self._clock.tell("%s is taken for one that hangs", victim.member)
                self._fence(victim)
            case Kind.FLAP:
                self._flap(victim.member.device, strike.victims + 2)
            case Kind.CUT:
                self._clock.tell("the connections of %s break", victim.member)
                for comm in victim.groups.comms.values():
                    comm.cut(victim.member)
            case Kind.LOSE if victim.groups.comms:
                comm = rng.choice(list(victim.groups.comms.values()))
                comm.lose(victim.member, partial(self._lost, victim))

    def _lost(self, worker: SimWorker) -> float:
        """A result is lost; returns for how long the backend lets that be."""
        clock = self._clock
        clock.tell("a result does not reach %s in step %d", worker.member, worker.session.step)
        self.struck_at = max(self.struck_at, clock.now)
        if worker.cold:
            # How long others may take is not known yet, so only the backend's timeout ends that.
            self._world.disturb(WAIT_SECONDS)
            return WAIT_SECONDS
        clock.after(STALL_SECONDS, self._must_be_over, worker, clock.now)
        return 2 * STALL_SECONDS

    def _must_be_over(self, worker: SimWorker, since: float) -> None:
        """A wait is, once whoever ends it has had the time for it behind the last strike."""
        early = self.struck_at + NOTICED_SECONDS - self._clock.now
        if early > 0.0:
            self._clock.after(early, self._must_be_over, worker, since)
        else:
            self._world.oracle.waits_no_more(worker, since)

    def _hang(self, worker: SimWorker, seconds: float) -> None:
        clock = self._clock
        clock.tell("%s hangs in step %d", worker.member, worker.session.step)
        worker.process.stopped = True
        clock.after(HANG_NOTICED_SECONDS, self._give_up, worker)
        clock.after(1.0 + 8.0 * clock.rng.random(), self._fence_if_hung, worker)
        if clock.rng.random() < 0.4:
            clock.after(seconds, self._wake, worker)

    def _give_up(self, worker: SimWorker) -> None:
        if worker.hung and not worker.dead:
            self._world.sever(worker)

    def _fence_if_hung(self, worker: SimWorker) -> None:
        if worker.hung and not worker.dead:
            self._fence(worker)

    def _wake(self, worker: SimWorker) -> None:
        if not worker.dead and worker.hung:
            self._clock.tell("%s goes on", worker.member)
            worker.excused_until = self._clock.now + HANG_NOTICED_SECONDS
            worker.process.resume()

    def _fence(self, worker: SimWorker) -> None:
        agent = self._world.agents[worker.member.device.node]
        device, incarnation = worker.member.device, worker.member.incarnation
        if agent.life is not None:
            signal = StoppedAnswering(device, incarnation, "make progress", 1.0)
            agent.process.call(agent.life.kill, worker, signal)

    def _flap(self, device: DeviceId, times: int) -> None:
        for worker in self._world.workers():
            if worker.member.device == device:
                self._world.kill(worker, returns=("at once", "at once", "later"))
        if times > 1:
            self._clock.after(1.0 + 8.0 * self._clock.rng.random(), self._flap, device, times - 1)

    # Nodes.

    def _partition(self, seconds: float) -> None:
        world, rng = self._world, self._clock.rng
        nodes = list(world.agents)
        if len(nodes) < 2:
            return
        rng.shuffle(nodes)
        border = rng.randint(1, len(nodes) - 1)
        here, there = nodes[:border], nodes[border:]
        self._clock.tell("nodes %s do not reach %s for %.1f s", here, there, seconds)
        world.disturb(seconds)
        world.network.cut(here, there, seconds)
        if rng.random() < 0.5:
            world.network.cut(there, here, seconds)

    def _pick(self, agents: list[SimAgent], at: SimWorker | None) -> SimAgent | None:
        """One of `agents`, rather that of the worker `at`; of a single node rather none."""
        world, rng = self._world, self._clock.rng
        if not agents or (len(world.agents) == 1 and rng.random() < 0.9):
            return None
        agent = rng.choice(agents)
        here = world.agents[at.member.device.node] if at is not None else agent
        return here if here in agents and rng.random() < 0.6 else agent

    def _drain(self, at: SimWorker | None, seconds: float) -> None:
        world, rng = self._world, self._clock.rng
        agents = [a for a in world.agents.values() if not a.process.dead and not a.leaving]
        agent = self._pick(agents, at)
        if agent is None:
            return
        returns = rng.random() < 0.8
        self._clock.tell("agent %d is to leave, %s", agent.node, seconds if returns else "for ever")
        self.struck_at += DRAIN_SECONDS
        agent.process.call(agent.drain, seconds if returns else None)

    def _strike_agent(self, strike: Strike, at: SimWorker | None) -> None:
        world, rng, seconds = self._world, self._clock.rng, strike.seconds
        agents = [agent for agent in world.agents.values() if not agent.process.dead]
        agent = self._pick(agents, at)
        if agent is None:
            return
        world.disturb(seconds)
        match strike.kind:
            case Kind.AGENT_KILL:
                returns = rng.random() < 0.8
                self._clock.tell(
                    "agent %d dies, %s", agent.node, seconds if returns else "for ever"
                )
                agent.kill()
                if returns:
                    self._clock.after(seconds, agent.start)
            case Kind.AGENT_STOP:
                self._clock.tell("agent %d stops for %.1f s", agent.node, seconds)
                self._stop(agent, seconds)
            case _:
                self._clock.tell("agent %d loses the store for %.1f s", agent.node, seconds)
                self._cut_off(agent, seconds)
                if strike.kind is Kind.NODE_CUT:
                    self._clock.tell("node %d loses all others", agent.node)
                    others = [node for node in world.agents if node != agent.node]
                    world.network.cut([agent.node], others, seconds)
                    world.network.cut(others, [agent.node], seconds)

    def _strike_leader(self, kind: Kind, leader: Candidate, seconds: float) -> None:
        name = leader.process.name
        match kind:
            case Kind.LEADER_KILL:
                self._clock.tell("%s dies", name)
                leader.kill()
                self._clock.after(1.0 + seconds, leader.start)
            case Kind.LEADER_STOP:
                self._clock.tell("%s stops for %.1f s", name, seconds)
                self._stop(leader, seconds)
            case _:
                self._clock.tell("%s loses the store for %.1f s", name, seconds)
                self._cut_off(leader, seconds)

    def _stop(self, host: SimAgent | Candidate, seconds: float) -> None:
        process = host.process
        if process.stopped or process.dead:
            return
        process.stopped = True
        self._world.store.falter(process)

        def go_on() -> None:
            self._clock.tell("%s goes on", process.name)
            process.resume()
            self._world.store.recover(process)

        self._clock.after(seconds, go_on)

    def _cut_off(self, host: SimAgent | Candidate, seconds: float) -> None:
        process = host.process
        self._world.store.cut_off(process)
        self._clock.after(seconds, self._world.store.reconnect, process)

    def _store_answers(self) -> None:
        self._clock.tell("the store answers again")
        self._world.store.answer_again()
