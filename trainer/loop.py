"""The step, top to bottom, and the life of a worker process around it.

A worker waits for a plan, adopts it, and runs steps until the job is done, a pause is agreed in a
vote, or something breaks; then it waits for the next plan. It never restarts anything itself.
"""

from __future__ import annotations

import time
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic.agent_link import AgentLink
from elastic.config import ClusterConfig
from elastic.fault_hook import FaultHook
from elastic.faults import RECOVERY_PHASES, FaultPhase
from elastic.heart import Heart
from elastic.node_workers import WorkerSpec
from elastic.topology import DeviceId
from elastic.worker import StepAborted, Worker
from health.heartbeat import Activity
from ntp.process_groups import Link, ProcessGroups, is_connection_error
from trainer.accelerators import accelerator_of
from trainer.batch import combine
from trainer.config import RunConfig
from trainer.data import ByteCorpus, load_corpus
from trainer.entry import Payload
from trainer.feed import ReplicaBatch
from trainer.training import Training, Vote


class CorpusChanged(RuntimeError):
    """A worker found other data than the launcher did."""


def run_worker(connection: Connection, spec: WorkerSpec) -> None:
    """Main function of a worker process; returns when the controller ends the job."""
    torch.set_num_threads(1)
    payload = Payload.model_validate_json(spec.payload)
    config = payload.config
    device = _device(spec.member.device, config.cluster)
    backend = "nccl" if device.type == "cuda" else "gloo"
    agent = AgentLink(connection)
    heart = Heart(spec.member, agent, spec.health.heartbeat_seconds)
    link = Link(
        backend,
        spec.host,
        spec.health.rebuild_timeout_seconds,
        spec.health.collective_timeout_seconds,
    )
    groups = ProcessGroups(link, heart.log)
    worker = Worker(spec.member, agent, heart, groups, device)
    steps = StepLoop(config, worker, spec, device)
    if steps.corpus.fingerprint != payload.corpus:
        raise CorpusChanged(
            f"the data is now {steps.corpus.fingerprint}, but was {payload.corpus} when the job "
            "started; keep the files of data.path as they are while it runs"
        )
    worker.start()
    while (plan := worker.await_plan(steps.training)) is not None:
        try:
            if worker.adopt(plan, steps.training, at=steps.strike):
                steps.run()
        except Exception as error:
            steps.training.abandon()
            if not isinstance(error, StepAborted) and not is_connection_error(error):
                raise
            worker.interrupted(error)
    groups.close()


class StepLoop:
    """Runs the steps of whatever generation is adopted."""

    def __init__(
        self, config: RunConfig, worker: Worker, spec: WorkerSpec, device: torch.device
    ) -> None:
        train = config.train
        self._train = train
        self._worker = worker
        self._device = device
        self.corpus: ByteCorpus = load_corpus(
            config.data.kind, config.data.path, seq_length=train.seq_length, seed=train.seed
        )
        self._faults = FaultHook(
            spec.faults,
            spec.member.device.node,
            spec.started_at,
            lambda fault, step, phase: worker.announce_fault(fault.id, step, phase),
        )
        self.training = Training(
            config, worker.groups, device, in_optimizer=lambda: self.strike(FaultPhase.OPTIMIZER)
        )

    def run(self) -> None:
        """Run steps until the last one, or until a vote says that a pause was asked for."""
        self._arm_faults()
        paused = False
        while not paused and self._worker.session.step < self._train.steps:
            paused = self._step()

    def _step(self) -> bool:
        """One step; returns whether all ranks agreed to pause after it."""
        worker, generation = self._worker, self.training.current
        step = worker.session.step
        worker.begin_step()
        state = generation.state
        self.training.begin_gradients(step)
        batch = ReplicaBatch(
            self._train,
            self.corpus,
            generation.plan,
            generation.place.replica,
            step,
            # The interleaved schedule needs one for each stage.
            generation.plan.stages if len(generation.chunks) > 1 else 1,
            self._device,
        )
        generation.sync.begin(state.gradients, len(batch.sizes), worker.stop_requested)
        state.loss_sum += generation.passes.run(
            lambda: iter(batch), batch.sizes, self._train.seq_length
        )
        self.training.sum_tied_gradients()

        # The boundary: the one place where a healthy replica's ranks all stop (see elastic.worker).
        worker.reach_boundary(generation.sync.unmixed)
        generation.sync.finish(between=lambda: self.strike(FaultPhase.GRAD_SYNC))
        worker.session = worker.session.prepare()

        worker.turn_to(Activity.VOTE)
        self.strike(FaultPhase.VOTE)
        vote = self._vote(batch)
        worker.session = worker.session.hold_vote(vote)
        worker.commit(self.training, vote)
        return vote.pause > 0

    def _vote(self, batch: ReplicaBatch) -> Vote:
        """The commit vote: whoever gets its result knows that every rank holds its gradients.

        One replica contributes the norm, each of whose atoms is thereby counted once; one slot of
        each replica contributes the loss, in the last stage, and what it consumed, in the first.
        """
        generation = self.training.current
        place, state = generation.place, generation.state
        speaks = place.slot == state.layout.active[0]
        tells_loss = speaks and place.stage == generation.plan.stages - 1
        tells_batch = speaks and place.stage == 0
        square = 0.0
        if place.replica == generation.plan.layout.replicas[0].replica:
            gradients = state.gradients if speaks else state.gradients[: state.shards.sharded]
            norms = [
                torch.linalg.vector_norm(part, dtype=torch.float64).item()
                for part in state.counted(gradients)
            ]
            square = sum(norm * norm for norm in norms)
        upper, lower = combine(batch.digests()) if tells_batch else (0, 0)
        mine = Vote(
            square_norm=square,
            loss_sum=state.loss_sum if tells_loss else 0.0,
            tokens=float(batch.tokens) if tells_batch else 0.0,
            digest_upper=float(upper),
            digest_lower=float(lower),
            pause=float(self._worker.pause_requested),
        )
        ballot = torch.tensor(mine, dtype=torch.float64, device=self._device)
        dist.all_reduce(ballot, group=self._worker.groups.world)
        return Vote(*ballot.tolist())

    def strike(self, phase: FaultPhase) -> None:
        """Carry out the injected fault that is due in this phase, if any."""
        if self._faults.is_empty:
            return
        worker = self._worker
        if phase in RECOVERY_PHASES:
            plan = worker.plan
            assert plan is not None, "there is a plan to recover with"
            step = plan.resume_step
        else:
            plan, step = self.training.current.plan, worker.session.step
        if plan.redone and step == plan.resume_step and plan.came_anew(worker.member):
            # What was to strike this place in this step struck whoever had it before.
            return
        self._faults.forget(worker.struck)
        self._faults.strike(worker.coordinate, step, phase, time.time())

    def _arm_faults(self) -> None:
        """Make faults of the forward and backward phases strike in the middle of the model."""
        model = self.training.current.chunks[0]
        if self._faults.is_empty or getattr(model, "faults_armed", False):
            return
        layers = model.decoder.layers  # type: ignore[union-attr]
        middle: nn.Module = layers[len(layers) // 2]  # type: ignore[index, arg-type, assignment]

        def in_forward(_module: nn.Module, _inputs: object, outputs: tuple[Tensor, object]) -> None:
            self.strike(FaultPhase.FORWARD)
            outputs[0].register_hook(lambda _gradient: self.strike(FaultPhase.BACKWARD))

        middle.register_forward_hook(in_forward)
        model.faults_armed = True  # type: ignore[assignment]


def _device(device: DeviceId, cluster: ClusterConfig) -> torch.device:
    index = accelerator_of(device, cluster, torch.cuda.device_count())
    if index is None:
        return torch.device("cpu")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)
