"""Forward and backward of a step's microbatches through the pipeline stages of one replica.

The schedules are megatron-core's: one-forward-one-backward, and the interleaved one where a stage
has several chunks. They talk through `ntp.pipeline_link`, on a stable group, so that stages keep
talking across recoveries that leave their replica whole. What a stage sent it waits for in the next
step, whose beginning proves that all was received. Until then a stage must not let go of its
ForwardBackward: that would take back what it sent. Messages carry a header with their shape only
while microbatches differ in size.

The sequence is padded to a multiple of the degree where it is cut (sequence parallelism). Padding
comes last and attention is causal, so no token sees it; its losses are dropped, so it has no
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as functional
from torch import Tensor, nn

from ntp.exchange import Message
from ntp.marked_exchange import MarkedExchange
from ntp.pipeline_link import Neighbours, pipeline_link_class

TIED_TAG = 10


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Token ids and labels ``[batch, sequence]``."""

    inputs: Tensor
    labels: Tensor


class ForwardBackward:
    """Runs microbatches through the chunks of this stage.

    `pipeline` has one rank per stage; None where there is a single stage. `group` is the
    tensor-parallel group of this slot's stage.
    """

    def __init__(
        self,
        chunks: Sequence[nn.Module],
        tensor_group: dist.ProcessGroup,
        pipeline: dist.ProcessGroup | None,
        device: torch.device,
    ) -> None:
        self._chunks = list(chunks)
        self._tensor_group = tensor_group
        self._pipeline = pipeline
        self._device = device
        self._positions_and_masks: dict[int, tuple[Tensor, Tensor]] = {}
        self._sent: list[MarkedExchange] = []

    def run(
        self, batches: Callable[[], Iterator[MicroBatch]], sizes: Sequence[int], length: int
    ) -> float:
        """Accumulate the gradients of all microbatches; returns this stage's sum of token losses.

        There may be no microbatches, on all stages.
        `batches` gives the microbatches from the first, once for each chunk; `sizes` are their
        numbers of samples, `length` is that of the sequence. The sum is 0 on all stages but the
        last.
        """
        while self._sent:
            self._sent.pop(0).send()
        if self._pipeline is None:
            (model,) = self._chunks
            return sum(self._one(model, batch) for batch in batches())
        if not sizes:
            return 0.0
        return self._scheduled(batches, sizes, length, self._pipeline)

    def sum_tied(self, gradient: Tensor) -> None:
        """Replace a contiguous `gradient` of the first and of the last stage by the sum of both.

        A sum of two is the same bits on both sides, whichever comes first.
        """
        pipeline = self._pipeline
        if pipeline is None or pipeline.rank() not in (0, pipeline.size() - 1):
            return
        peer = pipeline.size() - 1 - pipeline.rank()
        # The sum takes the gradient's place, which may still be on its way.
        mine, theirs = gradient.clone(), torch.empty_like(gradient)
        exchange = MarkedExchange(
            pipeline, [Message(peer, mine)], [Message(peer, theirs)], TIED_TAG
        )
        exchange.receive()
        gradient += theirs
        self._sent.append(exchange)

    def _one(self, model: nn.Module, batch: MicroBatch) -> float:
        loss = self._forward(model, batch).sum()
        loss.backward()
        return float(loss.item())

    def _forward(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Losses ``[batch, sequence]`` where the chunk has the output layer, else hidden states."""
        length = batch.inputs.shape[1]
        inputs, labels = batch.inputs, batch.labels
        # Padding by nothing would copy, and cutting nothing off is a step of backward too.
        if padding := self._padded(length) - length:
            inputs, labels = (functional.pad(each, (0, padding)) for each in (inputs, labels))
        positions, future = self._positions_and_mask(length + padding)
        has_output = model.chunk.has_output  # type: ignore[union-attr]
        output: Tensor = model(inputs, positions, future, labels=labels if has_output else None)
        return output[:, :length] if has_output and padding else output

    def _padded(self, length: int) -> int:
        config: Any = self._chunks[0].config
        degree = self._tensor_group.size() if config.sequence_parallel else 1
        return -(-length // degree) * degree

    def _positions_and_mask(self, length: int) -> tuple[Tensor, Tensor]:
        if length not in self._positions_and_masks:
            positions = torch.arange(length, device=self._device).unsqueeze(0)
            ones = torch.ones(1, 1, length, length, dtype=torch.bool, device=self._device)
            self._positions_and_masks[length] = positions, torch.triu(ones, diagonal=1)
        return self._positions_and_masks[length]

    def _scheduled(
        self,
        batches: Callable[[], Iterator[MicroBatch]],
        sizes: Sequence[int],
        length: int,
        pipeline: dist.ProcessGroup,
    ) -> float:
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.process_groups_config import ProcessGroupCollection

        config: Any = self._chunks[0].config
        chunks, stages, count = len(self._chunks), pipeline.size(), len(sizes)
        same_size = len(set(sizes)) == 1
        neighbours = Neighbours(pipeline, config.pipeline_dtype, not same_size, self._sent)
        link = pipeline_link_class()(neighbours, config, chunks)
        alone = dist.ProcessGroup(0, 1)  # type: ignore[call-arg]
        arguments: dict[str, Any] = {
            "forward_step_func": self._forward_step,
            "num_microbatches": count,
            "seq_length": self._padded(length),
            "micro_batch_size": sizes[0],
            "p2p_communicator": link,
            "pg_collection": ProcessGroupCollection(
                tp=self._tensor_group, cp=alone, embd=None, pos_embd=None, pp=pipeline, dp_cp=alone
            ),
        }
        if chunks == 1:
            run = schedules.forward_backward_pipelining_without_interleaving
            losses = run(model=self._chunks[0], data_iterator=batches(), **arguments)
        else:
            for model in self._chunks:
                model.config.virtual_pipeline_model_parallel_size = chunks  # type: ignore[union-attr]
                # Groups of any other size may leave a rest that the schedule refuses.
                model.config.microbatch_group_size_per_vp_stage = (  # type: ignore[union-attr]
                    stages if count % stages == 0 else count
                )
            run = schedules.forward_backward_pipelining_with_interleaving
            iterators = [batches() for _ in self._chunks]
            losses = run(model=self._chunks, data_iterator=iterators, **arguments)
        return float(sum(loss.item() for loss in losses))

    def _forward_step(self, batches: Iterator[MicroBatch], model: nn.Module) -> tuple[Tensor, Any]:
        """What megatron-core's schedules call: the chunk's output, and how to make a loss of it."""
        batch = next(batches)

        def sum_losses(losses: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            total = losses.sum()
            return total, torch.tensor(losses.numel(), dtype=torch.int), total.detach()

        return self._forward(model, batch), sum_losses
