"""The command line: ``everstep run | controller | agent | stop | compare | demo | plan``.

Exit codes of ``run`` and ``demo``: 0 completed, 2 refused (configuration, faults file, run
directory), 3 halted, 4 failed, 130 interrupted; ``demo`` exits with 1 if the failure changed the
job. ``compare``: 0 equal, 1 different, 2 refused. ``plan``: 0, 2 refused, 3 the job would halt.
``agent``: 0 the job is over or the node's work was handed over, 1 the agent left before that, 2
refused.

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

ConfigFile = Annotated[Path, typer.Argument(help="YAML file with the job's configuration.")]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as train.steps=100."),
]
FaultsFile = Annotated[
    Path | None, typer.Option(help="YAML file with failures to inject, for trying things out.")
]


@app.command()
def run(
    config: ConfigFile,
    overrides: Overrides = None,
    faults: FaultsFile = None,
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
    ended = _launch(loaded, injected, faults, target, loaded.job, replace=False)
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
    for name, given, file in (("demo", injected, faults), ("demo-reference", (), None)):
        ended[name] = _launch(loaded, given, file, runs / name, name, replace=True)
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
def controller(
    config: ConfigFile,
    run_dir: Annotated[
        Path,
        typer.Option(help="Where the run's files go; all controllers of a job share it."),
    ],
    overrides: Overrides = None,
    faults: FaultsFile = None,
    name: Annotated[
        str | None,
        typer.Option(help="What tells this controller from others; default its host and process."),
    ] = None,
) -> None:
    """Lead a job, or stand by until its leader is lost. Start any number, on any hosts.

    Needs store.endpoints. SIGTERM and SIGINT give the lead up, and the job goes on. Exit codes:
    those of run, once the job is over; 0 if it was asked to end before.
    """
    from trainer.hosted import run_controller

    loaded, injected = _load(config, overrides or [], faults)
    try:
        outcome = run_controller(loaded, injected, run_dir, name)
    except (ValueError, RuntimeError, OSError) as error:
        _refuse(str(error))
    raise typer.Exit(EXIT_CODES[outcome] if outcome is not None else 0)


@app.command()
def agent(
    config: ConfigFile,
    node: Annotated[int, typer.Option(help="Number of this node, from 0 to cluster.nodes - 1.")],
    run_dir: Annotated[Path, typer.Option(help="Where this node's logs go.")],
    overrides: Overrides = None,
    faults: FaultsFile = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address of this node for the others; default its own towards the store.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Run the workers of one node, until the job is over. Start one on every node.

    Needs store.endpoints. SIGTERM and SIGINT ask it to leave: the step in flight is finished and
    the node's work handed over, for which others have health.drain_timeout_seconds; a second signal
    ends it at once. Exit codes: 0 the job is over or the work was handed over, 5 it was not, 2
    refused.
    """
    from elastic.agent import Departure
    from trainer.hosted import UNDRAINED, run_agent

    loaded, injected = _load(config, overrides or [], faults)
    try:
        departure = run_agent(loaded, injected, run_dir, node, host)
    except (ValueError, RuntimeError, OSError) as error:
        _refuse(str(error))
    typer.echo(f"node{node} left: {departure or 'it was told to end at once'}")
    if departure not in (Departure.JOB_OVER, Departure.DRAINED):
        raise typer.Exit(UNDRAINED)


@app.command()
def stop(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Override one key, as job=other."),
    ] = None,
) -> None:
    """End a job that runs on etcd, as interrupted; returns once its leader was asked."""
    from trainer.hosted import ask_to_stop

    loaded, _ = _load(config, overrides or [], None)
    try:
        ask_to_stop(loaded)
    except (ValueError, RuntimeError, OSError) as error:
        _refuse(str(error))


@app.command()
def plan(
    config: ConfigFile,
    failures: Annotated[
        list[str] | None,
        typer.Option(
            "--fail",
            metavar="SLOT|DEVICE",
            help="What is lost; repeat it for more. 1.2 is slot 2 of replica 1, both counted from "
            "0, in all its pipeline stages; node0/5 is device 5 of node 0.",
        ),
    ] = None,
    overrides: Overrides = None,
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
    from elastic.fault_checks import check_faults
    from elastic.faults import FaultsError, load_faults
    from trainer.config_file import ConfigError, load

    try:
        loaded = load(config, overrides)
        injected = load_faults(faults) if faults is not None else ()
        check_faults(injected, loaded.parallel, loaded.cluster, loaded.train.steps, loaded.store)
    except (ConfigError, FaultsError) as error:
        _refuse(str(error))
    return loaded, injected


def _launch(
    config: RunConfig,
    injected: tuple[Fault, ...],
    faults: Path | None,
    run_dir: Path,
    title: str,
    *,
    replace: bool,
) -> Ended:
    """Run a job; `injected` was read from the file `faults`, which its processes read too."""
    from rich.console import Console

    from elastic.fault_checks import check_launcher
    from elastic.live import view
    from elastic.local import run_local
    from elastic.run_dir import claim
    from trainer.hosted import run_spec, save, start_parts

    try:
        # The data are read here once, so that missing ones are refused before any process starts.
        run = run_spec(config, injected, run_dir)
        check_launcher(run.faults, config.store)
        claim(run_dir, replace=replace)
    except (ValueError, OSError) as error:
        _refuse(str(error))
    save(config, run_dir)
    with view(Console(), title, config.parallel, config.train.steps) as listener:
        if config.store.kind == "memory":
            return run_local(run, listener)
        try:
            return start_parts(run, config, faults, listener)
        except (ValueError, RuntimeError) as error:
            _refuse(str(error))


def _refuse(problem: str) -> NoReturn:
    typer.echo(f"refused: {problem}", err=True)
    raise typer.Exit(REFUSED)


if __name__ == "__main__":
    main()
