"""What fault tolerance costs while nothing fails: everstep against a bare megatron-core loop.

    python -m benchmarks.overhead [--pairs 5] [--steps 60] [--workers 8]

Theory of operation. Both train the same model on the same data with the same groups, gradient sync
and optimizer on CPU workers (two replicas). They run in turns, A B A B, as the speed of
a shared machine drifts, and each pair gives one ratio. The first steps are dropped; of the others
the median counts, as a burst of foreign load hits some steps and not all. A second ratio compares
the fastest fifth of the steps, which foreign load touches least.

A step's seconds are the time between the moments at which the last rank had done it and the one
before; everstep's steps.jsonl has the same measure. Weights digests, a diagnostic that a production
run computes rarely, are off. Nothing is asserted, as a busy machine may miss any target.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.common import DEMO_CONFIG, progress, run_everstep, run_main, scratch_folder
from trainer.config import RunConfig
from trainer.config_file import load

TARGET_RATIO = 0.99
REPLICAS = 2
DROPPED_STEPS = 5
SHAPE = (
    "job=overhead",
    "model.hidden_size=256",
    "model.ffn_hidden_size=688",
    "train.seq_length=128",
    "train.global_batch_size=4",
    "train.micro_batch_size=2",
    "train.dtype=float32",
    "train.weights_digest_every=0",
)


@dataclass(frozen=True, slots=True)
class Pair:
    """Seconds of the steps of one run of each, and the largest difference between their losses."""

    everstep: list[float]
    bare: list[float]
    loss_difference: float

    @property
    def ratio(self) -> float:
        """What everstep keeps of the bare loop's speed."""
        return median(self.bare) / median(self.everstep)

    @property
    def ratio_of_fastest(self) -> float:
        """The same, of the fastest fifth of the steps."""
        return median(_fastest(self.bare)) / median(_fastest(self.everstep))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Failure-free speed of everstep.")
    parser.add_argument("--pairs", type=int, default=5, help="runs of each (default 5)")
    parser.add_argument("--steps", type=int, default=60, help="steps of a run (default 60)")
    parser.add_argument("--workers", type=int, default=8, help="an even number (default 8)")
    options = parser.parse_args()
    if options.pairs < 1 or options.steps < DROPPED_STEPS + 2:
        parser.error(f"--pairs must be at least 1 and --steps at least {DROPPED_STEPS + 2}")
    if options.workers < REPLICAS or options.workers % REPLICAS:
        parser.error(f"--workers must be a multiple of {REPLICAS}")
    overrides = (*SHAPE, *_shape(options.workers), f"train.steps={options.steps}")
    config = load(DEMO_CONFIG, overrides)
    pairs = []
    with scratch_folder() as scratch:
        for number in range(1, options.pairs + 1):
            pairs.append(_pair(config, overrides, scratch / f"pair{number}"))
            progress(f"pair {number} of {options.pairs}: ratio {pairs[-1].ratio:.3f}")
    _print(config, pairs)


def _shape(workers: int) -> tuple[str, ...]:
    degree = workers // REPLICAS
    return (
        f"cluster.devices_per_node={degree}",
        f"parallel.tensor={degree}",
        f"parallel.replicas={REPLICAS}",
    )


def _pair(config: RunConfig, overrides: tuple[str, ...], scratch: Path) -> Pair:
    # Only here, as this loads torch, which the parser's --help should not wait for.
    from benchmarks.bare_loop import run_bare_loop

    progress(f"everstep: {config.train.steps} steps")
    run = run_everstep(DEMO_CONFIG, overrides, [], scratch / "everstep")
    progress(f"bare loop: {config.train.steps} steps")
    bare = run_bare_loop(config, scratch / "bare")
    # The bare loop's list begins with step 1.
    everstep = [float(step["seconds"]) for step in run.steps][1:]
    difference = max(
        abs(step["loss"] - loss) for step, loss in zip(run.steps, bare.losses, strict=True)
    )
    dropped = DROPPED_STEPS - 1
    return Pair(everstep[dropped:], bare.seconds[dropped:], difference)


def _fastest(seconds: list[float]) -> list[float]:
    return sorted(seconds)[: max(1, len(seconds) // 5)]


def _print(config: RunConfig, pairs: list[Pair]) -> None:
    model, train = config.model, config.train
    table = Table(
        title=f"Failure-free speed: {REPLICAS} replicas x TP{config.parallel.tensor},"
        f" hidden {model.hidden_size}, {model.num_layers} layers,"
        f" {train.global_batch_size} x {train.seq_length} tokens a step"
    )
    table.add_column("pair")
    for name in ("everstep, steps/s", "bare loop, steps/s", "ratio", "of the fastest"):
        table.add_column(name, justify="right")
    for number, pair in enumerate(pairs, start=1):
        speeds = (1 / median(pair.everstep), 1 / median(pair.bare))
        figures = (*speeds, pair.ratio, pair.ratio_of_fastest)
        table.add_row(str(number), *(f"{figure:.3f}" for figure in figures))
    ratio = median(pair.ratio for pair in pairs)
    console = Console()
    console.print(table)
    verdict = "met" if ratio >= TARGET_RATIO else "missed"
    difference = max(pair.loss_difference for pair in pairs)
    console.print(f"both train alike: largest difference between their losses {difference:.2g}")
    console.print(f"median ratio {ratio:.3f}; target >= {TARGET_RATIO}: {verdict}")


if __name__ == "__main__":
    run_main(main)
