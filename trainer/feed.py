"""What one replica consumes of one step's global batch."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import torch

from elastic.plan import Plan
from ntp.pipeline import MicroBatch
from trainer.batch import micro_batches, sample_digest, sample_offsets
from trainer.config import TrainConfig
from trainer.data import ByteCorpus


class ReplicaBatch:
    """The samples of `replica` in `step`; every slot and stage of the replica builds the same.

    Those whose gradients it keeps from an interrupted attempt are in no microbatch, but counted and
    digested like the others. It has at least `least_micro_batches` microbatches, if it has as many
    samples to compute; it may have none.

    Attributes: ``sizes`` are the numbers of samples of its microbatches, ``tokens`` counts labels.
    """

    def __init__(
        self,
        train: TrainConfig,
        corpus: ByteCorpus,
        plan: Plan,
        replica: int,
        step: int,
        least_micro_batches: int,
        device: torch.device,
    ) -> None:
        share = next(each for number, each in plan.shares(step) if number == replica)
        kept = chain.from_iterable(range(part.start, part.stop) for part in share.kept)
        fresh = list(chain.from_iterable(range(part.start, part.stop) for part in share.fresh))
        samples = [*kept, *fresh]
        offsets = sample_offsets(
            train.seed, step, train.global_batch_size, len(corpus), train.seq_length
        )
        self._windows = {
            index: corpus.window(int(offsets[index]), train.seq_length + 1) for index in samples
        }
        size = min(train.micro_batch_size, max(1, len(fresh) // least_micro_batches))
        self._micro_batches = micro_batches(fresh, size)
        self._device = device
        self.sizes = [len(indices) for indices in self._micro_batches]
        self.tokens = len(samples) * train.seq_length

    def __iter__(self) -> Iterator[MicroBatch]:
        for indices in self._micro_batches:
            rows = [torch.from_numpy(self._windows[index].astype("int64")) for index in indices]
            batch = torch.stack(rows).to(self._device)
            yield MicroBatch(batch[:, :-1].contiguous(), batch[:, 1:].contiguous())

    def digests(self) -> list[int]:
        """Digest of each sample, in order."""
        return [sample_digest(index, window.tobytes()) for index, window in self._windows.items()]
