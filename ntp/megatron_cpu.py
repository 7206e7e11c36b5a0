"""What megatron-core expects of CUDA, answered for the CPU.

megatron-core calls a few ``torch.cuda`` functions and global registries while it builds and runs a
model, even with CPU initialisation. ``prepare`` answers them once per process and may be called any
number of times. On a machine with GPUs it leaves ``torch.cuda`` alone.

It also asks whether torch.distributed is initialised before it believes a group that it was given.
The default group is therefore a world of one: every group that matters is passed explicitly, and
whatever reaches for the default cannot block on a peer.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist


def prepare() -> None:
    """Make this process fit to build megatron-core models on its device. Idempotent."""
    with warnings.catch_warnings():
        # megatron-core warns at import that Transformer Engine and Apex are absent; on a CPU they
        # always are.
        warnings.simplefilter("ignore")
        from megatron.core import parallel_state
        from megatron.core.pipeline_parallel import schedules
        from megatron.core.tensor_parallel import random

    # torch 2.13 renamed the reduce-scatter that sequence parallelism calls in every layer.
    warnings.filterwarnings("ignore", message=".*reduce_scatter_single.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*all_gather_single.*", category=FutureWarning)
    if not torch.cuda.is_available():
        torch.cuda.current_device = _cpu_device  # type: ignore[assignment]
        schedules.torch = _TorchWithoutCuda()
    if not dist.is_initialized():
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    # Dropout is refused by the configuration, so no layer draws from the tracker; this tracker's
    # fork() is free, where the training one switches generator states twice a layer.
    random.initialize_rng_tracker(inference_rng_tracker=True)


class _TorchWithoutCuda:
    """torch as megatron-core's schedules see it, which count tokens in a tensor on the GPU."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def zeros(self, *size: Any, **options: Any) -> torch.Tensor:
        """torch.zeros on the CPU."""
        return torch.zeros(*size, **{**options, "device": "cpu"})


def _cpu_device() -> torch.device:
    return torch.device("cpu")
