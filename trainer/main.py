"""The command line: ``everstep run | compare | demo | plan``.

Exit codes of ``run`` and ``demo``: 0 completed, 2 refused (configuration, faults file, run
directory), 3 halted, 4 failed, 130 interrupted; ``demo`` exits with 1 if the failure changed the
job. ``compare``: 0 equal, 1 different, 2 refused. ``plan``: 0, 2 refused, 3 the job would halt.

Commands import what they need when they run, so that ``--help`` stays quick; nothing on this side
ever loads torch.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

if TYPE_CHECKING:
    from elastic.faults import Fault
    from elastic.local import Ended
    from trainer.config import RunConfig

EXIT_CODES = {"completed": 0, "halted": 3, "failed": 4, "interrupted": 130}
DIFFERENT = 1
REFUSED = 2
PLAIN_WIDTH = 120
"""Columns of tables that go into a file or a pipe."""
DEMO_TOLERANCE = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 5e-2}
"""Largest loss difference to the calm run that rounding explains, by dtype."""

app = typer.Typer(
    name="everstep",
    help="Pretraining that keeps stepping through failures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="YAML file with the job's configuration.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as train.steps=100."),
    ] = None,
    faults: Annotated[
        Path | None, typer.Option(help="YAML file with failures to inject, for trying things out.")
    ] = None,
    run_dir: Annotated[
        Path | None,
        typer.Option(help="Where the run's files go; default runs/JOB-TIME.", show_default=False),
    ] = None,
) -> None:
    """Run a job on this machine: controller, one agent per node, one worker process per device.

    Exit codes: 0 completed, 2 refused, 3 halted, 4 failed, 130 interrupted.
    """
    loaded, injected = _load(config, overrides or [], faults)
    stamp = time.strftime("%Y%m%d-%H%M%S")
    target = run_dir or Path("runs") / f"{loaded.job}-{stamp}"
    ended = _launch(loaded, injected, target, loaded.job, replace=False)
    typer.echo(f"{ended.outcome}: {ended.reason}; files are in {target}")
    raise typer.Exit(EXIT_CODES[ended.outcome])


@app.command()
def compare(
    run_a: Annotated[Path, typer.Argument(help="Directory of a run.")],
    run_b: Annotated[Path, typer.Argument(help="Directory of another run of the same job.")],
    tolerance: Annotated[
        float, typer.Option(help="Largest loss difference that still counts as equal.")
    ] = 0.0,
) -> None:
    """Hold two runs against each other: losses, samples, weights, steps.

    Exit code 1 where losses differ beyond --tolerance, or samples or step counts differ.
    """
    from rich.console import Console

    from elastic.compare import compare_runs, render

    try:
        comparison = compare_runs(run_a, run_b, tolerance)
    except ValueError as error:
        _refuse(str(error))
    Console().print(render(comparison))
    raise typer.Exit(0 if comparison.equal else DIFFERENT)


@app.command()
def demo(
    config: Annotated[Path, typer.Option(help="The job.")] = Path("configs/demo.yaml"),
    faults: Annotated[Path, typer.Option(help="What goes wrong.")] = Path(
        "configs/demo-faults.yaml"
    ),
    runs: Annotated[Path, typer.Option(help="Where demo and demo-reference go.")] = Path("runs"),
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override one key.")
    ] = None,
) -> None:
    """Kill a worker in the middle of a job, bring its device back, and compare with a calm run."""
    from rich.console import Console

    from elastic.compare import compare_runs
    from elastic.report import recovery_table

    loaded, injected = _load(config, overrides or [], faults)
    ended = {}
    for name, given in (("demo", injected), ("demo-reference", ())):
        ended[name] = _launch(loaded, given, runs / name, name, replace=True)
        if ended[name].outcome != "completed":
            typer.echo(f"{name} {ended[name].outcome}: {ended[name].reason}", err=True)
            raise typer.Exit(EXIT_CODES[ended[name].outcome])
    tolerance = DEMO_TOLERANCE[loaded.train.dtype]
    comparison = compare_runs(runs / "demo", runs / "demo-reference", tolerance)
    summary = ended["demo"].summary
    Console().print(recovery_table(summary, comparison))
    typer.echo(f"files are in {runs / 'demo'} and {runs / 'demo-reference'}")
    if not comparison.equal or summary["lost_steps"] or summary["replicas_bitwise_equal"] is False:
        typer.echo("the failure changed the job: that is a bug", err=True)
        raise typer.Exit(DIFFERENT)


@app.command()
def plan(
    config: Annotated[Path, typer.Argument(help="YAML file with the job's configuration.")],
    failures: Annotated[
        list[str] | None,
        typer.Option(
            "--fail",
            metavar="SLOT|DEVICE",
            help="What is lost; repeat it for more. 1.2 is slot 2 of replica 1, both counted from "
            "0, in all its pipeline stages; node0/5 is device 5 of node 0.",
        ),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as train.steps=100."),
    ] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw it too, into this file.")] = None,
) -> None:
    """Show what losing slots would do, before it happens: owners, moves, batch split, throughput.

    Exit codes: 0, 2 refused, 3 the job would halt.
    """
    from rich.console import Console

    from elastic.forecast import failed_places, forecast
    from elastic.plan import NoPlan
    from trainer.config_file import ConfigError, load
    from trainer.job import cluster_devices, element_bytes, job_shape
    from trainer.plan_svg import draw
    from trainer.plan_view import render

    try:
        loaded = load(config, overrides or [])
    except ConfigError as error:
        _refuse(str(error))
    shape, devices = job_shape(loaded), cluster_devices(loaded)
    try:
        places = failed_places(failures or [], shape, devices)
    except ValueError as error:
        _refuse(f"--fail {error}")
    ahead = forecast(shape, devices, places)
    if isinstance(ahead, NoPlan):
        typer.echo(f"the job would halt: {ahead.reason}", err=True)
        raise typer.Exit(EXIT_CODES["halted"])
    element = element_bytes(loaded)
    if svg is not None:
        try:
            svg.write_text(draw(loaded.job, ahead, element), encoding="utf-8")
        except OSError as error:
            _refuse(f"--svg {svg} cannot be written: {error}")
    terminal = Console()
    console = terminal if terminal.is_terminal else Console(width=PLAIN_WIDTH)
    console.print(render(loaded.job, ahead, element))
    if svg is not None:
        typer.echo(f"the drawing is in {svg}")


def main() -> None:
    """Entry point of the ``everstep`` command."""
    app()


def _load(
    config: Path, overrides: list[str], faults: Path | None
) -> tuple[RunConfig, tuple[Fault, ...]]:
    from elastic.faults import FaultsError, check_faults, load_faults
    from trainer.config_file import ConfigError, load

    try:
        loaded = load(config, overrides)
        injected = load_faults(faults) if faults is not None else ()
        check_faults(injected, loaded.parallel, loaded.cluster, loaded.train.steps)
    except (ConfigError, FaultsError) as error:
        _refuse(str(error))
    return loaded, injected


def _launch(
    config: RunConfig, faults: tuple[Fault, ...], run_dir: Path, title: str, *, replace: bool
) -> Ended:
    import yaml
    from rich.console import Console

    from elastic.live import view
    from elastic.local import LocalRun, run_local
    from elastic.run_dir import claim
    from trainer.data import load_corpus
    from trainer.entry import Payload, worker_main
    from trainer.job import job_shape

    try:
        # Read here once, so that missing data is refused before any process starts.
        corpus = load_corpus(
            config.data.kind,
            config.data.path,
            seq_length=config.train.seq_length,
            seed=config.train.seed,
        )
        claim(run_dir, replace=replace)
    except (ValueError, OSError) as error:
        _refuse(str(error))
    dumped = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    (run_dir / "config.yaml").write_text(dumped)
    job = LocalRun(
        job=config.job,
        shape=job_shape(config),
        cluster=config.cluster,
        health=config.health,
        faults=faults,
        run_dir=run_dir,
        worker_main=worker_main,
        preload=("trainer.preload", "trainer.main"),
        payload=Payload(config=config, corpus=corpus.fingerprint).model_dump_json(),
    )
    with view(Console(), title, config.parallel, config.train.steps) as listener:
        return run_local(job, listener)


def _refuse(problem: str) -> NoReturn:
    typer.echo(f"refused: {problem}", err=True)
    raise typer.Exit(REFUSED)
