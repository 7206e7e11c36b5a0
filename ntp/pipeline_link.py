"""What neighbouring pipeline stages send each other, behind megatron-core's interface.

`Neighbours` exchanges tensors over a stable group. It does not wait for what it sent, as gloo may
not notice a receiver that is lost in the middle of it (see `ntp.marked_exchange`): whoever made it
does, when it is known to be received.

Known wrong case, guarded here. With two stages the next stage is also the previous one, and
megatron-core's batched exchange posts the messages of both in one order on both sides: activations
meet gradients, silently (two stages, two chunks, no overlap). Here each direction has a tag of its
own, and activations are exchanged before gradients, for backends that match by order.

Pairs of tensors are in the order in which they travel: forward, then backward. So what is sent goes
to the next and to the previous stage, and what comes is from the previous and from the next one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ntp.exchange import Message
from ntp.marked_exchange import MarkedExchange

FORWARD_TAG = 8
BACKWARD_TAG = 9

Pair = tuple[Tensor | None, Tensor | None]


class Neighbours:
    """The stages before and after this one, in the ring of `group`.

    `dtype` is that of what comes. `carries_shapes`: a header with its shape goes before each
    tensor, as microbatches differ in size. What is on its way is added to `sent`.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        dtype: torch.dtype,
        carries_shapes: bool,
        sent: list[MarkedExchange],
    ) -> None:
        self.group = group
        self.next = (group.rank() + 1) % group.size()
        self.previous = (group.rank() - 1) % group.size()
        self._dtype = dtype
        self._carries_shapes = carries_shapes
        self._sent = sent

    def exchange(self, sends: Pair, wanted: tuple[bool, bool], shape: Sequence[int]) -> Pair:
        """Send what there is, and return what is wanted; headers, if any, overrule its `shape`.

        Raises RuntimeError when a neighbour's connection breaks.
        """
        shapes = self._exchange_shapes(sends, wanted) if self._carries_shapes else (shape, shape)
        forward, backward = (
            torch.empty(tuple(each), requires_grad=True, device=_device(), dtype=self._dtype)
            if comes
            else None
            for each, comes in zip(shapes, wanted, strict=True)
        )
        self._swap(sends, (forward, backward))
        return forward, backward

    def _exchange_shapes(
        self, sends: Pair, wanted: tuple[bool, bool]
    ) -> tuple[Sequence[int], Sequence[int]]:
        forward, backward = (
            None if tensor is None else torch.tensor(tensor.shape, device=_device())
            for tensor in sends
        )
        ahead, behind = (torch.empty(3, dtype=torch.long, device=_device()) for _ in wanted)
        self._swap(
            (forward, backward), (ahead if wanted[0] else None, behind if wanted[1] else None)
        )
        return ahead.tolist(), behind.tolist()

    def _swap(self, sends: Pair, receives: Pair) -> None:
        under_way = [
            MarkedExchange(
                self.group,
                [] if sent is None else [Message(to, sent.detach().contiguous())],
                [] if room is None else [Message(source, room.detach())],
                tag,
            )
            for to, source, tag, sent, room in (
                (self.next, self.previous, FORWARD_TAG, sends[0], receives[0]),
                (self.previous, self.next, BACKWARD_TAG, sends[1], receives[1]),
            )
        ]
        for exchange in under_way:
            exchange.receive()
        self._sent += under_way


def _device() -> torch.device | int:
    return torch.cuda.current_device()


@cache
def pipeline_link_class() -> Any:
    """megatron-core's P2PCommunicator by way of `Neighbours`; made on call, as its import is slow.

    It is made of the neighbours, megatron-core's configuration, and the number of chunks.
    """
    from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator

    class PipelineLink(P2PCommunicator):  # type: ignore[misc]
        def __init__(self, neighbours: Neighbours, config: Any, chunks: int) -> None:
            # Not the parent's: that looks the group up in torch's registry.
            self.pp_group = neighbours.group
            self.next_rank, self.prev_rank = neighbours.next, neighbours.previous
            self.config = config
            self.virtual_pipeline_model_parallel_size = chunks if chunks > 1 else None
            self._neighbours = neighbours

        def _communicate(
            self,
            *,
            tensor_send_next: Tensor | None,
            tensor_send_prev: Tensor | None,
            recv_prev: bool,
            recv_next: bool,
            tensor_shape: Sequence[int],
            wait_on_reqs: bool = True,
        ) -> tuple[Tensor | None, Tensor | None, None]:
            """Tensors received from the previous and from the next stage, where asked for."""
            assert wait_on_reqs, "the schedules are configured not to overlap their exchanges"
            sends, wanted = (tensor_send_next, tensor_send_prev), (recv_prev, recv_next)
            return (*self._neighbours.exchange(sends, wanted, tensor_shape), None)

    return PipelineLink
