"""Sums over a group that travel while the rank computes.

`all_reduce` is a generator of three steps, between which the bytes of other ranks travel: give
this rank's parts, add the parts of others and answer with the sum, take the sums. A step waits only
for what others do in the step before it, and the first one for nothing. On NCCL it is the library's
all-reduce, and no step waits, as waiting only orders streams.

Over gloo it is made of messages. Each rank owns a share of the tensor: it receives the other ranks'
parts of that share, adds them to its own in order of rank, and answers with the sum. Small tensors
are one share, owned by the first rank of the group, as in
`ntp.stable_group.StableGroup.allreduce`, which is the same star but blocks. Measured for the
all-reduce of 1.6 MB a slot, 3 replicas x TP4 on 2 cores: processor time of all ranks in a step that
takes 155 ms of it otherwise.

    buckets a step               1      2      4
    gloo's asynchronous ring   +23    +38    +57  ms
    a share for each rank      +24    +36    +64
    one share, a star          +14    +16    +31
    the star that blocks       +18

The ring runs in gloo's own thread and so needs nobody's attention, but its 2(n-1) dependent rounds
wake that thread as often, in competition with backward; and it cannot be guarded against a peer
that is lost in the middle of a message (see `ntp.marked_exchange`). Letting the owner add and
answer within backward, whenever it has launched another bucket, was no faster than at its end; and
it would make backward wait for other replicas (see `ntp.grad_sync`).
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ntp import stable_group
from ntp.exchange import Message
from ntp.marked_exchange import MarkedExchange
from ntp.stable_group import StableGroup

PART_TAG = 4
SUM_TAG = 5


def all_reduce(group: StableGroup, tensor: Tensor, answers: list[MarkedExchange]) -> Iterator[None]:
    """Sum `tensor`, flat and contiguous, over `group` in place, in three steps (see module).

    The sum has the same bits on every rank. After the last step this rank may still be answering
    others from `tensor`, in exchanges that are added to `answers`. Each step raises RuntimeError
    when a peer's connection breaks.
    """
    inner = group.inner
    if not isinstance(inner, dist.ProcessGroupGloo):
        work = inner.allreduce([tensor], dist.AllreduceOptions())
        yield
        yield
        work.wait()
        return
    me, others = group.rank(), [rank for rank in range(group.size()) if rank != group.rank()]
    is_small = tensor.nbytes * len(others) <= stable_group.STAR_LIMIT_BYTES
    shares = [tensor] if is_small else list(tensor.tensor_split(group.size()))
    of_others = [Message(rank, shares[rank]) for rank in others if rank < len(shares)]
    own = shares[me] if me < len(shares) else tensor[:0]

    parts = [Message(rank, torch.empty_like(own)) for rank in others if me < len(shares)]
    given = MarkedExchange(group, of_others, parts, PART_TAG)
    yield
    given.receive()
    for part in parts:
        own += part.tensor
    # A sum comes back only after all of the part has left, so it may take its place.
    sums = [Message(part.peer, own) for part in parts]
    answer = MarkedExchange(group, sums, of_others, SUM_TAG)
    answers.append(answer)
    yield
    answer.receive()
    given.send()
