"""What is trained, as the runtime sees it: state in a layout, and how it moves to another one.

A generation that changes this slot's layout gets a new ShardState beside the present one; the
present one stays valid until the runtime says that everybody has received everything. Where the
replica's layout is unchanged, state and model simply stay, and the slot only sends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import nn

from elastic.plan import Plan, StateSource
from elastic.worker import StepFigures
from ntp.geometry import SlotRef
from ntp.grad_sync import GradientSync, SyncGroups
from ntp.layers import ModelNumerics, bind_parameters, build_model
from ntp.model_shape import tensor_specs
from ntp.p2p import ranges_kept, reshard
from ntp.process_groups import ProcessGroups
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
    slot: SlotRef
    state: ShardState
    model: nn.Module
    sync: GradientSync
    adam: Adam
    digest: WeightsDigest


class Training:
    """Implements `elastic.worker.Trainable` for a GPT on megatron-core."""

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
        self._specs = tensor_specs(self._shape)
        self._dtype = DTYPES[config.train.dtype]
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
        )

    def reshard(self, plan: Plan, ranks: Mapping[SlotRef, int], slot: SlotRef) -> None:
        """Receive the shards of `plan` beside the present ones, which stay valid."""
        layout = plan.layout.replica(slot.replica)
        current = self._current
        if current is not None and current.state.layout == layout:
            # Nothing changes for this replica: keep state and model, and only send.
            held = (current.state.shards, current.state.persistent)
            reshard(plan.reshard, slot, ranks, self._groups.world, held, held, kept=())
            sync = self._new_sync(plan, ranks, slot, current.state)
            self._pending = replace(current, plan=plan, sync=sync)
            return
        state = ShardState(self._specs, layout, slot.slot, self._dtype, self._device)
        if plan.state_source is StateSource.INITIALIZE:
            initialize(state, self._config.train.seed, self._config.model.init_method_std)
        else:
            assert plan.source_layout is not None
            held_before = (current.state.shards, current.state.persistent) if current else None
            kept = ranges_kept(plan.source_layout, plan.layout, slot) if current else ()
            received = (state.shards, state.persistent)
            reshard(plan.reshard, slot, ranks, self._groups.world, held_before, received, kept)
            state.publish()
        self._pending = Generation(
            plan=plan,
            slot=slot,
            state=state,
            model=self._new_model(state, layout.degree),
            sync=self._new_sync(plan, ranks, slot, state),
            adam=self._new_adam(state),
            digest=WeightsDigest(state),
        )

    def promote(self) -> None:
        """Switch to the shards received last."""
        assert self._pending is not None
        self._current, self._pending = self._pending, None

    def discard(self) -> None:
        """Forget the shards received last, if any."""
        self._pending = None

    def _new_sync(
        self, plan: Plan, ranks: Mapping[SlotRef, int], slot: SlotRef, state: ShardState
    ) -> GradientSync:
        return GradientSync(
            plan_sync(plan.layout),
            slot,
            ranks,
            state.shards,
            SyncGroups(self._groups.world, self._groups.home),
            contributes_replicated=slot.slot == state.layout.active[0],
        )

    def _new_adam(self, state: ShardState) -> Adam:
        train = self._config.train
        settings = AdamSettings(
            train.adam_beta1, train.adam_beta2, train.adam_epsilon, train.weight_decay
        )
        return Adam(state, settings)

    def _new_model(self, state: ShardState, degree: int) -> nn.Module:
        model = self._config.model
        numerics = ModelNumerics(
            dtype=self._dtype,
            max_sequence_length=self._config.train.seq_length,
            rms_norm=model.normalization == "RMSNorm",
            norm_epsilon=model.layernorm_epsilon,
            rotary_base=model.rotary_base,
            rotary_percent=model.rotary_percent,
            activation=model.activation,
        )
        built = build_model(
            self._shape,
            numerics,
            state.layout.shards,
            state.slot,
            degree,
            self._groups.tensor,
            self._device,
        )
        bind_parameters(built, state.shards, state.parameters, state.gradients)
        return built
