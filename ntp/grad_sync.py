"""Gradient sync between replicas of unlike degrees, while backward still computes.

Theory of operation. `ntp.sync_plan` says who sums what: per home, members all-reduce, and leaves
send their pieces to proxies before and get the sums back after. Replicated tensors are reduced once
over the stage, so that all slots of all replicas receive the same bits; one slot of each replica
contributes to them, and every slot to those whose gradients are partial sums. Gradients are summed
here, never averaged: the optimizer divides by the global number of tokens.

Gradients travel in buckets (`ntp.buckets`), each of which takes the steps of `ntp.bucket_sync`. A
bucket is *launched*, which is its first step, as soon as its gradients and those of all buckets
before it are complete, out of a hook in the last backward pass.

A hook never waits for another replica. The rank that runs it has tensor-parallel mates that wait
for it inside backward. Were it to wait for a rank of another replica, whose own mates wait in turn,
then a tensor without gradient on one rank (an expert without tokens) could close the circle, a
stopped device would make healthy replicas look stopped, and a lost one would stop healthy ranks in
the middle of backward instead of at the boundary, where all of them arrive. For the same reason a
broken connection is no error in a hook: it is remembered, backward goes on to its end, and `finish`
raises it.

- NCCL: waiting orders streams and does not hold up the process. So a launched bucket is enqueued
  with all its steps, on a stream of its own beside that of backward.
- gloo: waiting blocks, and messages cannot be polled. So backward overlaps with what launches send:
  the pieces for proxies, and the parts of all-reduces that need no pieces; half of all bytes. The
  later steps are taken in `finish`, each for all buckets before the next one, so that their bytes
  travel together. Taking them in hooks too gained nothing (measured, see `ntp.all_reduce`).

Nobody waits in vain in `finish`: every rank launches all buckets first, in one order; and each step
waits only for what others do in a step before it.

Buffers for what must be packed live from a bucket's launch to its end.

Until other replicas' gradients come into this slot's, they are its replica's alone, or *unmixed*,
and a step that is given up can be taken up again from them. Over gloo the first step of a bucket
only sends, and receives into buffers of its own; so gradients are unmixed up to `finish`. (A silent
slot clears replicated gradients, but those never count.) On NCCL a bucket that is launched may be
reduced at any time. A step is therefore *held* once it is known to be given up: nothing more is
launched out of hooks.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ntp.bucket_sync import BucketSync, replicated_bucket, sharded_bucket
from ntp.bucket_sync import SyncGroups as SyncGroups
from ntp.buckets import Bucket, Countdown, plan_buckets
from ntp.geometry import ParallelLayout, SlotRef
from ntp.local_shards import LocalShards
from ntp.marked_exchange import MarkedExchange
from ntp.process_groups import is_connection_error
from ntp.sync_exchange import exchange_of
from ntp.sync_plan import SyncPlan


class GradientSync:
    """Sums the gradients of one slot with those of all replicas, in place, step after step.

    `ranks` are those of `groups.stage`. `contributes_replicated`: whether this slot gives its
    replica's gradients of replicated tensors; one slot of each replica must. `bucket_bytes`: about
    how many bytes of a slot at full degree travel together; the same on all ranks. `apart` names
    tensors that another stage holds and reduces too, which must come to the same bits there.

    Per step: `begin`; `ready` for each tensor and backward pass; `finish`. After an error, or
    `abandon`, the groups must be built anew before the next step.
    """

    def __init__(
        self,
        plan: SyncPlan,
        layout: ParallelLayout,
        slot: SlotRef,
        ranks: Mapping[SlotRef, int],
        shards: LocalShards,
        groups: SyncGroups,
        contributes_replicated: bool,
        bucket_bytes: int,
        apart: frozenset[str] = frozenset(),
    ) -> None:
        self._plan = plan
        self._layout = layout
        self._slot = slot
        self._ranks = ranks
        self._shards = shards
        self._groups = groups
        self._contributes_replicated = contributes_replicated
        self._bucket_bytes = bucket_bytes
        self._apart = apart
        self._bound: _Bound | None = None
        self._step: _Step | None = None
        # What others may not have received yet of the last step.
        self._answers: list[MarkedExchange] = []

    @property
    def unmixed(self) -> bool:
        """Whether a step is in flight whose gradients are still those of this replica alone."""
        return self._step is not None and not self._step.mixed

    def begin(
        self, gradients: Tensor, passes: int, held: Callable[[], bool] = lambda: False
    ) -> None:
        """A step starts, with `passes` backward passes that add to `gradients` (flat, local).

        `held` is asked before a hook launches anything whether the step will be given up, so that
        `finish` will not follow. With no passes at all, everything is launched in `finish`.

        Raises RuntimeError if a peer was lost before it had all answers to its last step.
        """
        assert self._step is None, "finish or abandon the last step first"
        while self._answers:
            self._answers.pop().send()
        if self._bound is None or self._bound.gradients is not gradients:
            self._bound = self._bind(gradients)
        countdown = Countdown(self._bound.buckets, passes)
        self._step = _Step(self._bound, countdown, self._answers, held)

    def ready(self, name: str) -> None:
        """A backward pass has added to the gradient of tensor `name`.

        Does not wait for other ranks, and does not raise if they are lost.
        """
        assert self._step is not None, "begin comes before backward"
        self._step.added(name)

    def finish(self, between: Callable[[], None] = lambda: None) -> None:
        """Backward is over: replace the gradients by their sums over all replicas.

        Tensors that no pass added to take part like all others. `between` is called once when some
        of the exchanges are done and some are not. Raises RuntimeError when a peer is or was lost.

        The gradients may then be read. They may be written when all ranks have finished, as is
        known from the commit vote: this rank may still be answering others from them.
        """
        assert self._step is not None, "begin comes before finish"
        try:
            self._step.finish(between)
        except BaseException:
            self.abandon()
            raise
        self._step = None

    def abandon(self) -> None:
        """Forget the step in flight, if there is one: nothing touches its gradients any more."""
        self._answers.clear()
        if self._step is not None:
            self._step.close()
        self._step = None

    def _bind(self, gradients: Tensor) -> _Bound:
        specs = [placement.spec for placement in self._shards.placements]
        element_bytes = gradients.element_size()
        buckets = plan_buckets(
            specs, self._layout.tp_base, element_bytes, self._bucket_bytes, self._apart
        )
        syncs = tuple(self._sync_of(bucket, gradients) for bucket in buckets)
        stream = torch.cuda.Stream(gradients.device) if gradients.is_cuda else None
        return _Bound(gradients, buckets, syncs, stream)

    def _sync_of(self, bucket: Bucket, gradients: Tensor) -> BucketSync:
        if bucket.replicated:
            contributes = self._contributes_replicated
            return replicated_bucket(bucket, self._shards, gradients, self._groups, contributes)
        return sharded_bucket(
            bucket,
            self._shards,
            gradients,
            exchange_of(self._plan, self._layout, self._slot, bucket.turn),
            self._ranks,
            self._groups,
            has_leaves=bool(self._plan.homes[self._slot.slot].leaves),
        )


@dataclass(frozen=True, slots=True)
class _Bound:
    """The buckets of one gradient buffer; `stream` is where they travel on an accelerator."""

    gradients: Tensor
    buckets: tuple[Bucket, ...]
    syncs: tuple[BucketSync, ...]
    stream: torch.cuda.Stream | None


@dataclass(slots=True)
class _Step:
    """The sync of one step: what is complete, what is under way, and what went wrong."""

    bound: _Bound
    countdown: Countdown
    answers: list[MarkedExchange]
    held: Callable[[], bool]
    mixed: bool = False
    running: list[Iterator[None]] = field(default_factory=list)
    error: Exception | None = None

    def added(self, name: str) -> None:
        complete = self.countdown.added(name)
        # Few tensors complete a bucket, and Python is slow between two kernels.
        if not complete or self.error is not None:
            return
        if self.held():
            self.countdown.put_back(complete)
            return
        try:
            self._launch(complete)
        except Exception as error:
            if not is_connection_error(error):
                raise
            # Frames would keep operations, and with them the communicator, alive.
            traceback.clear_frames(error.__traceback__)
            self.running.clear()
            self.error = error

    def finish(self, between: Callable[[], None]) -> None:
        if self.error is not None:
            raise self.error
        self._launch(self.countdown.rest())
        self._advance()
        between()
        while self.running:
            self._advance()
        self._wait_for_stream()

    def close(self) -> None:
        self.running.clear()
        self._wait_for_stream()

    def _launch(self, going: Iterable[int]) -> None:
        for index in going:
            steps = self.bound.syncs[index].steps(self.answers)
            if self.bound.stream is None:
                next(steps)
                self.running.append(steps)
                continue
            self.mixed = True
            self.bound.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.bound.stream):
                for _ in steps:
                    pass

    def _wait_for_stream(self) -> None:
        if self.bound.stream is not None:
            torch.cuda.current_stream().wait_stream(self.bound.stream)

    def _advance(self) -> None:
        """Take the next step of every bucket; those that have taken their last are done."""
        self.mixed = True
        self.running = [steps for steps in self.running if next(steps, _DONE) is not _DONE]


_DONE = object()
