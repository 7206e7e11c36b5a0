"""What one replica consumes of one step's global batch."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from elastic.plan import Plan
from ntp.pipeline import MicroBatch
from trainer.batch import (
    BatchSplit,
    micro_batches,
    replica_samples,
    sample_digest,
    sample_offsets,
)
from trainer.config import TrainConfig
from trainer.data import ByteCorpus


class ReplicaBatch:
    """The samples of `replica` in `step`; every slot and stage of the replica builds the same.

    It has at least `least_micro_batches` microbatches, if it has as many samples.

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
        replicas = [layout.replica for layout in plan.layout.replicas]
        samples = replica_samples(BatchSplit(plan.batch_split), replicas.index(replica))
        offsets = sample_offsets(
            train.seed, step, train.global_batch_size, len(corpus), train.seq_length
        )
        self._windows = {
            index: corpus.window(int(offsets[index]), train.seq_length + 1) for index in samples
        }
        size = min(train.micro_batch_size, max(1, len(samples) // least_micro_batches))
        self._micro_batches = micro_batches(samples, size)
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
