"""A rank under torchrun, as its users write it: started again after every failure."""

from __future__ import annotations

import torch.distributed as dist

from benchmarks.peers.training import begin, train


def main() -> None:
    """Train to the end."""
    job = begin()
    dist.init_process_group("gloo", timeout=job.timeout)
    train(job, after_step=lambda: None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
