"""One rank's share of a megatron-core training step, without any of the runtime around it.

It is put together from the parts that a worker of everstep uses (the same model, flat buffers, Adam
and data), so that a comparison measures the runtime and nothing else. Gradients are summed over
tokens and divided by their number in the optimizer. They are clipped by their global norm, which
is all-reduced over the tensor-parallel group, as Megatron does: after gradient sync every replica
has the same gradients, so no other group need be asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.distributed as dist

from ntp.geometry import ParallelLayout, SlotRef, full_layout
from ntp.layers import bind_parameters, build_chunk
from ntp.model_shape import atom_counts, tensor_specs
from ntp.stages import Chunk
from trainer.batch import even_split, replica_samples, sample_offsets
from trainer.config import RunConfig, model_shape
from trainer.data import load_corpus
from trainer.optim import Adam, AdamSettings
from trainer.schedule import learning_rate
from trainer.shard_state import ShardState, initialize
from trainer.training import model_numerics

CPU = torch.device("cpu")


def layout_of(config: RunConfig) -> ParallelLayout:
    """The job at full strength."""
    counts = atom_counts(model_shape(config))
    return full_layout(counts, config.parallel.tensor, config.parallel.replicas)


class BareModel:
    """State, model, data and optimizer of one slot."""

    def __init__(
        self,
        config: RunConfig,
        slot: SlotRef,
        tensor_group: dist.ProcessGroup,
        accumulated: Callable[[str], None] | None = None,
    ) -> None:
        shape, train = model_shape(config), config.train
        layout = layout_of(config).replica(slot.replica)
        numerics = model_numerics(config)
        self._train = train
        self._group = tensor_group
        self.state = ShardState(tensor_specs(shape), layout, slot.slot, numerics.dtype, CPU)
        initialize(self.state, train.seed, config.model.init_method_std, shape.layers)
        self._model = build_chunk(
            shape,
            numerics,
            Chunk(0, shape.layers, has_embedding=True, has_output=True),
            layout.shards,
            slot.slot,
            layout.degree,
            tensor_group,
            CPU,
        )
        bind_parameters(
            [self._model],
            self.state.shards,
            self.state.parameters,
            self.state.gradients,
            numerics.implementation,
            accumulated,
        )
        settings = AdamSettings(
            train.adam_beta1, train.adam_beta2, train.adam_epsilon, train.weight_decay
        )
        self._adam = Adam(self.state, settings)
        self._corpus = load_corpus(
            config.data.kind, config.data.path, seq_length=train.seq_length, seed=train.seed
        )
        split = even_split(train.global_batch_size, config.parallel.replicas)
        self._samples = replica_samples(split, slot.replica)
        # One slot of a replica counts what all of its slots hold.
        self._counts_replicated = slot.slot == layout.active[0]
        self._positions = torch.arange(train.seq_length).unsqueeze(0)
        ones = torch.ones(1, 1, train.seq_length, train.seq_length, dtype=torch.bool)
        self._future = torch.triu(ones, diagonal=1)

    @property
    def passes(self) -> int:
        """Backward passes of a step."""
        return -(-len(self._samples) // self._train.micro_batch_size)

    def compute_gradients(self, step: int) -> float:
        """Forward and backward of this replica's samples of `step`; returns the sum of losses."""
        train = self._train
        self.state.gradients.zero_()
        offsets = sample_offsets(
            train.seed, step, train.global_batch_size, len(self._corpus), train.seq_length
        )
        loss_sum = 0.0
        for start in range(self._samples.start, self._samples.stop, train.micro_batch_size):
            rows = [
                torch.from_numpy(
                    self._corpus.window(int(offset), train.seq_length + 1).astype("int64")
                )
                for offset in offsets[start : start + train.micro_batch_size]
            ]
            batch = torch.stack(rows)
            inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()
            loss = self._model(inputs, self._positions, self._future, labels=labels).sum()
            loss.backward()
            loss_sum += loss.item()
        return loss_sum

    def apply_gradients(self, step: int) -> None:
        """Clip the gradients, which are summed over all replicas by now, and update."""
        train, shards, gradients = self._train, self.state.shards, self.state.gradients
        counted = gradients if self._counts_replicated else gradients[: shards.sharded]
        norm = torch.linalg.vector_norm(counted, dtype=torch.float64)
        square = (norm * norm).reshape(1)
        dist.all_reduce(square, group=self._group)
        tokens = train.global_batch_size * train.seq_length
        mean_norm = math.sqrt(square.item()) / tokens
        clip = min(1.0, train.clip_grad / (mean_norm + 1e-6)) if train.clip_grad else 1.0
        rate = learning_rate(
            step,
            peak=train.learning_rate,
            minimum=train.min_learning_rate,
            warmup_steps=train.warmup_steps,
            total_steps=train.steps,
        )
        self._adam.update(step, rate, clip / tokens)
