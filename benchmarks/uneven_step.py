"""Step time of a job with a reduced replica over its uniform self, at equal work per rank.

    python -m benchmarks.uneven_step [--pairs 3] [--steps 40]

Theory of operation. Three replicas at TP4 train twelve samples a step, four each. The same job with
a slot of one replica lost trains eleven, four, four and three: by the batch split by degree every
rank then has the work that it had before, as heads, MLP columns and vocabulary divide by four and
by three. Both run in turns, A B A B, and each pair gives one ratio of median step times.

On fewer cores than ranks a step takes as long as all ranks' work together, of which the reduced job
has 11/12; so its time is also given per unit of work, and that is what is held against the target.
"""

from __future__ import annotations

import argparse
from statistics import median

from rich.console import Console
from rich.table import Table

from benchmarks.common import DEMO_CONFIG, progress, run_everstep, run_main, scratch_folder

TARGET_RATIO = 1.04
LOST_AT_STEP, DROPPED_STEPS = 2, 8
UNIFORM_SAMPLES, REDUCED_SAMPLES = 12, 11
SHAPE = (
    "job=uneven-step",
    "cluster.nodes=3",
    "cluster.devices_per_node=4",
    "parallel.tensor=4",
    "parallel.replicas=3",
    "model.num_attention_heads=12",
    "model.num_query_groups=12",
    "model.kv_channels=16",
    "model.hidden_size=192",
    "model.ffn_hidden_size=768",
    "model.vocab_size=264",
    "train.seq_length=128",
    "train.micro_batch_size=4",
    "train.dtype=float32",
    "train.weights_digest_every=0",
)
LOSS = {
    "at_step": LOST_AT_STEP,
    "phase": "forward",
    "target": {"replica": 2, "slot": 3},
    "kind": "sigkill",
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="Step time with a reduced replica.")
    parser.add_argument("--pairs", type=int, default=3, help="runs of each (default 3)")
    parser.add_argument("--steps", type=int, default=40, help="steps of a run (default 40)")
    options = parser.parse_args()
    if options.pairs < 1 or options.steps < DROPPED_STEPS + 2:
        parser.error(f"--pairs must be at least 1 and --steps at least {DROPPED_STEPS + 2}")
    pairs = []
    with scratch_folder() as scratch:
        for number in range(1, options.pairs + 1):
            seconds = []
            for name, samples, faults in (
                ("uniform", UNIFORM_SAMPLES, []),
                ("reduced", REDUCED_SAMPLES, [LOSS]),
            ):
                progress(f"pair {number} of {options.pairs}: {name}")
                sizes = (f"train.global_batch_size={samples}", f"train.steps={options.steps}")
                folder = scratch / f"{name}{number}"
                run = run_everstep(DEMO_CONFIG, (*SHAPE, *sizes), faults, folder)
                steps = run.steps[DROPPED_STEPS:]
                degrees = [[4], [4], [3 if faults else 4]]
                assert all(step["degrees"] == degrees for step in steps), "not the job in question"
                seconds.append(median(float(step["seconds"]) for step in steps))
            pairs.append((seconds[0], seconds[1]))
    _print(pairs)


def _print(pairs: list[tuple[float, float]]) -> None:
    table = Table(title="Step time, three replicas at TP4, eleven or twelve ranks at equal work")
    columns = ("pair", "4/4/4, ms", "4/4/3, ms", "ratio", "per unit of work")
    for name in columns:
        table.add_column(name, justify="right")
    work = REDUCED_SAMPLES / UNIFORM_SAMPLES
    for number, (uniform, reduced) in enumerate(pairs, start=1):
        ratio = reduced / uniform
        figures = (f"{uniform * 1000:.0f}", f"{reduced * 1000:.0f}", f"{ratio:.3f}")
        table.add_row(str(number), *figures, f"{ratio / work:.3f}")
    console = Console()
    console.print(table)
    ratio = median(reduced / uniform for uniform, reduced in pairs) / work
    verdict = "met" if ratio <= TARGET_RATIO else "missed"
    console.print(f"median per unit of work {ratio:.3f}; target <= {TARGET_RATIO}: {verdict}")


if __name__ == "__main__":
    run_main(main)
