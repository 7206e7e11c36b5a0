"""What is trained, as the runtime sees it: state in a layout, and how it moves to another one.

A generation that changes this slot's layout gets a new ShardState beside the present one; the
present one stays valid until the runtime says that everybody has received everything. Where the
replica's layout is unchanged, state and model simply stay, and the slot only sends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from elastic.plan import Plan, StateSource
from elastic.trainable import StepFigures
from ntp.geometry import SlotRef
from ntp.grad_sync import GradientSync, SyncGroups
from ntp.groups import Coordinate
from ntp.layers import ModelNumerics, bind_parameters, build_chunk
from ntp.local_shards import AtomRange
from ntp.model_shape import EMBEDDING
from ntp.pipeline import ForwardBackward
from ntp.process_groups import ProcessGroups
from ntp.reshard import FlatState, ranges_kept, reshard
from ntp.stages import (
    Chunk,
    TransformerImplementation,
    copied_names,
    stage_chunks,
    stage_specs,
)
from ntp.state_chunks import Limits
from ntp.sync_plan import plan_sync
from trainer.batch import format_digest
from trainer.config import RunConfig, model_shape
from trainer.optim import Adam, AdamSettings
from trainer.schedule import learning_rate
from trainer.shard_state import ShardState, initialize
from trainer.weights_digest import WeightsDigest

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


class Vote(NamedTuple):
    """Fields of the commit vote; each is the sum over all ranks.

    Gradients are sums over tokens, so `square_norm` is that of the summed gradient. The digest's
    halves are exact as long as a batch has at most 2**21 samples.
    """

    square_norm: float
    loss_sum: float
    tokens: float
    digest_upper: float
    digest_lower: float
    pause: float

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient of the mean loss."""
        return math.sqrt(self.square_norm) / self.tokens if self.is_finite else math.nan

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are numbers."""
        return math.isfinite(self.square_norm) and math.isfinite(self.loss_sum)


@dataclass(frozen=True, slots=True)
class Generation:
    """Everything of one generation that a step needs on one slot."""

    plan: Plan
    place: Coordinate
    state: ShardState
    chunks: tuple[nn.Module, ...]
    passes: ForwardBackward
    sync: GradientSync
    adam: Adam
    digest: WeightsDigest


class Training:
    """Implements `elastic.trainable.Trainable` for a GPT on megatron-core."""

    def __init__(
        self,
        config: RunConfig,
        groups: ProcessGroups,
        device: torch.device,
        in_optimizer: Callable[[], None],
    ) -> None:
        self._config = config
        self._groups = groups
        self._device = device
        self._in_optimizer = in_optimizer
        self._shape = model_shape(config)
        self._numerics = model_numerics(config)
        self._current: Generation | None = None
        self._pending: Generation | None = None

    @property
    def current(self) -> Generation:
        """The generation whose layout the state has."""
        assert self._current is not None, "no generation was adopted yet"
        return self._current

    def apply(self, step: int, vote: tuple[float, ...]) -> None:
        """Clip and apply the summed gradients of `step`; nothing where they are not finite."""
        fields = Vote(*vote)
        if not fields.is_finite:
            return
        train = self._config.train
        clip = min(1.0, train.clip_grad / (fields.grad_norm + 1e-6)) if train.clip_grad else 1.0
        rate = learning_rate(
            step,
            peak=train.learning_rate,
            minimum=train.min_learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=train.steps,
        )
        self.current.adam.update(step, rate, clip / fields.tokens, self._in_optimizer)

    def figures(self, step: int, vote: tuple[float, ...]) -> StepFigures:
        """Describe `step`, which was just applied."""
        fields = Vote(*vote)
        every = self._config.train.weights_digest_every
        sharded, replicated = None, None
        last = step == self._config.train.steps - 1
        if every and (last or (step + 1) % every == 0):
            sharded, replicated = self.current.digest.parts()
        return StepFigures(
            loss=fields.loss_sum / fields.tokens,
            grad_norm=fields.grad_norm,
            tokens=int(fields.tokens),
            sample_digest=format_digest(int(fields.digest_upper), int(fields.digest_lower)),
            sharded_digest=sharded,
            replicated_digest=replicated,
            last=last,
        )

    def donate(self, plan: Plan, place: Coordinate) -> None:
        """Send what others need of the shards held at `place`, which `plan` does not fill."""
        state = self.current.state
        held = (state.shards, state.persistent)
        self._exchange(plan, place, held, held, kept=())

    def reshard(self, plan: Plan, place: Coordinate) -> None:
        """Receive the shards of `plan` beside the present ones, which stay valid."""
        layout = plan.layout.replica(place.replica)
        current = self._current
        stays = current is not None and current.place == place
        if current is not None and stays and current.state.layout == layout:
            # Nothing changes for this replica: keep state and model, and only send.
            held = (current.state.shards, current.state.persistent)
            self._exchange(plan, place, held, held, kept=())
            self._pending = self._joined(plan, place, current.state, current.chunks)
            return
        chunks = self._chunks_of(place.stage)
        specs = stage_specs(self._shape, chunks, self._config.parallel.sequence_parallel)
        copies = copied_names(self._shape, chunks)
        state = ShardState(specs, layout, place.slot, self._numerics.dtype, self._device, copies)
        if plan.state_source is StateSource.INITIALIZE:
            model = self._config.model
            initialize(state, self._config.train.seed, model.init_method_std, model.num_layers)
        else:
            assert plan.source_layout is not None, f"nobody restores from {plan.state_source} yet"
            received = (state.shards, state.persistent)
            if current is not None and not stays:
                self._move(plan, current.place, place, received)
            else:
                before = (current.state.shards, current.state.persistent) if current else None
                same = ranges_kept(plan.source_layout, plan.layout, place.slot_ref)
                self._exchange(plan, place, before, received, same if before else ())
            state.publish()
        models = tuple(
            build_chunk(
                self._shape,
                self._numerics,
                chunk,
                layout.shards,
                place.slot,
                layout.degree,
                self._groups.tensor,
                self._device,
            )
            for chunk in chunks
        )
        bind_parameters(
            models,
            state.shards,
            state.parameters,
            state.gradients,
            self._numerics.implementation,
            self._accumulated,
        )
        self._pending = self._joined(plan, place, state, models)

    def _exchange(
        self,
        plan: Plan,
        place: Coordinate,
        source: FlatState | None,
        target: FlatState,
        kept: Sequence[AtomRange],
        sends_as: SlotRef | None = None,
    ) -> None:
        """Run the moves of this stage, between the ranks of the meeting."""
        config = self._config
        limits = Limits(
            chunk_bytes=config.train.reshard_chunk_bytes,
            timeout_seconds=config.health.collective_timeout_seconds,
        )
        moves, ranks = plan.reshard[place.stage], plan.meeting_ranks(place.stage)
        meeting = self._groups.meeting
        reshard(moves, place.slot_ref, ranks, meeting, source, target, kept, limits, sends_as)

    def _move(self, plan: Plan, old: Coordinate, new: Coordinate, received: FlatState) -> None:
        """Send what others need of the place `old`, and receive what `new` holds."""
        state = self.current.state
        held = (state.shards, state.persistent)
        if old.stage == new.stage:
            self._exchange(plan, new, held, received, (), sends_as=old.slot_ref)
            return
        # All go through the stages in one order, so that nobody waits in a circle.
        for stage in sorted((old.stage, new.stage)):
            if stage == old.stage:
                self._exchange(plan, old, held, held, ())
            else:
                self._exchange(plan, new, None, received, ())

    def _accumulated(self, name: str) -> None:
        """A backward pass added to the gradient of a tensor."""
        # A tied weight is complete only once its two stages' gradients are summed.
        if name != EMBEDDING or not self._is_tied_across_stages:
            self.current.sync.ready(name)

    def promote(self) -> None:
        """Switch to the shards received last."""
        assert self._pending is not None
        self._current, self._pending = self._pending, None

    def discard(self) -> None:
        """Forget the shards received last, if any."""
        self._pending = None

    def abandon(self) -> None:
        """Forget the gradient sync of a step that was given up."""
        if self._current is not None:
            self._current.sync.abandon()

    def begin_gradients(self, step: int) -> None:
        """`step` begins, with the gradients that the plan keeps of it, or with none."""
        plan, place, state = self.current.plan, self.current.place, self.current.state
        if step != plan.resume_step or not plan.kept_from(place.replica):
            state.clear_gradients()
        elif place.stage > 0 and (tied := self._tied_gradient()) is not None:
            # The first stage keeps the sum of both; adding it once more would count it twice.
            tied.zero_()

    def sum_tied_gradients(self) -> None:
        """Give both stages that hold a tied weight the sum of its gradients in them.

        It comes before the boundary, as it is between stages of one replica: were it behind, a
        stage could wait for one that stopped at a lost replica.
        """
        tied = self._tied_gradient()
        if tied is not None:
            self.current.passes.sum_tied(tied)

    def _tied_gradient(self) -> Tensor | None:
        """The gradient of a weight that another stage holds too; None where there is none."""
        state = self.current.state
        if self._is_tied_across_stages:
            for placement in state.shards.placements:
                if placement.spec.name == EMBEDDING:
                    return state.shards.tensor(state.gradients, placement)
        return None

    def release(self) -> None:
        """Forget all shards: others go on without this worker."""
        self._current = self._pending = None

    def _joined(
        self,
        plan: Plan,
        place: Coordinate,
        state: ShardState,
        chunks: tuple[nn.Module, ...],
    ) -> Generation:
        """The generation of `plan` on state and model that this slot holds already."""
        current = self._current
        kept = current if current is not None and current.state is state else None
        train = self._config.train
        sync = GradientSync(
            plan_sync(plan.layout),
            plan.layout,
            place.slot_ref,
            plan.stage_ranks(),
            state.shards,
            SyncGroups(self._groups.stage, self._groups.home),
            contributes_replicated=place.slot == state.layout.active[0],
            bucket_bytes=train.gradient_bucket_bytes,
            apart=frozenset({EMBEDDING}) if self._is_tied_across_stages else frozenset(),
        )
        settings = AdamSettings(
            train.adam_beta1, train.adam_beta2, train.adam_epsilon, train.weight_decay
        )
        return Generation(
            plan=plan,
            place=place,
            state=state,
            chunks=chunks,
            passes=ForwardBackward(
                chunks, self._groups.tensor, self._groups.pipeline, self._device
            ),
            sync=sync,
            adam=kept.adam if kept else Adam(state, settings),
            digest=kept.digest if kept else WeightsDigest(state, self._shape),
        )

    @property
    def _is_tied_across_stages(self) -> bool:
        return self._shape.tied and self._config.parallel.pipeline > 1

    def _chunks_of(self, stage: int) -> tuple[Chunk, ...]:
        parallel = self._config.parallel
        return stage_chunks(self._shape.layers, parallel.pipeline, stage, parallel.virtual_pipeline)


def model_numerics(config: RunConfig) -> ModelNumerics:
    """What the configuration says of the model beside its shape."""
    model = config.model
    return ModelNumerics(
        dtype=DTYPES[config.train.dtype],
        max_sequence_length=config.train.seq_length,
        rms_norm=model.normalization == "RMSNorm",
        norm_epsilon=model.layernorm_epsilon,
        rotary_base=model.rotary_base,
        rotary_percent=model.rotary_percent,
        activation=model.activation,
        sequence_parallel=config.parallel.sequence_parallel,
        recompute=model.recompute_granularity,
        implementation=TransformerImplementation(model.transformer_impl),
    )
