"""A rank under nvidia-resiliency-ext's ft_launcher: torchrun's job, with a heartbeat a step."""

from __future__ import annotations

import torch.distributed as dist
from nvidia_resiliency_ext.fault_tolerance import RankMonitorClient

from benchmarks.peers.training import begin, train


def main() -> None:
    """Train to the end."""
    job = begin()
    dist.init_process_group("gloo", timeout=job.timeout)
    monitor = RankMonitorClient()
    monitor.init_workload_monitoring()
    train(job, after_step=monitor.send_heartbeat)
    monitor.shutdown_workload_monitoring()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
