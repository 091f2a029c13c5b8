"""The command line: the commands that work on this machine. `job_commands` has those that contact a cluster."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.table import Table

import weaksam
from weaksam.cli.job_commands import app as job_app
from weaksam.cli.run_command import run_pipeline
from weaksam.cli.terminal import AsJson, ConfigPath, Overrides, console, end_on_sigterm, guarded, set_up_logging
from weaksam.core.uris import check_place
from weaksam.errors import ConfigError, DamagedError

app = typer.Typer(
    help="From image-level labels to boxes, masks and detectors, as batch jobs on Ray.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(job_app)


def _show_version(is_set: bool) -> None:
    if is_set:
        print(f"weaksam {weaksam.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Options of no command."""


@app.command()
@guarded
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    only: Annotated[list[str] | None, typer.Option(metavar="STEP", help="Run only this step; may be repeated.")] = None,
) -> None:
    """Run the steps of CONFIG. The same command again resumes the run."""
    run_pipeline(config, overrides or [], only=only or [])


@app.command()
@guarded
def check(config: ConfigPath, overrides: Overrides = None) -> None:
    """Check CONFIG without running anything: every fault at once, then what each step would do, then warnings.

    Also reads the files of a dataset as far as that is quick, and names the files that it did not read.
    """
    from weaksam import pipeline
    from weaksam.pipeline.looking import look_at
    from weaksam.pipeline.states import describe_state

    table = Table("step", "stage", "reads", "state", "folder", box=None)
    damaged = []
    steps = pipeline.load(config, overrides or [])
    for step in steps:
        reads = ", ".join(other.name for other in step.inputs.values())
        state, fault = describe_state(step)
        damaged += [str(fault)] if fault else []
        table.add_row(step.name, step.stage.name, reads, state, step.folder)
    console().print(table)
    looked, faults = look_at(steps)
    for line in looked:
        console().print(line, highlight=False)
    for text in pipeline.warnings_of(steps):
        print(f"warning: {text}", file=sys.stderr)
    if damaged:
        raise DamagedError(*damaged, *faults)
    if faults:
        raise ConfigError(*faults)


@app.command()
@guarded
def plan(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    images: Annotated[
        int | None,
        typer.Option(min=2, help="Images of each split in the pilot; 64, or more for many actors, when left out."),
    ] = None,
    gpu_price: Annotated[float | None, typer.Option(min=0, help="Price of a GPU for an hour.")] = None,
    cpu_price: Annotated[float | None, typer.Option(min=0, help="Price of a processor for an hour.")] = None,
    folder: Annotated[
        str | None, typer.Option(metavar="URI", help="Where the pilot lies; `plan` in the run's folder when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Predict what CONFIG takes: hours, GPU-hours, storage and cost, and suggest better pools.

    Runs all steps on a sample first, through the real stages. That takes minutes; the same command again reuses the
    measurements. The plan holds for this machine, or the cluster of RAY_ADDRESS, under its current load: run the
    command where CONFIG will run, and name another folder after a change of machine.
    """
    from weaksam.plan.pilot import run_pilot
    from weaksam.plan.planning import Prices, as_json_of, make_plan, sentences, table_of

    if folder is not None:
        check_place(folder, "--folder", is_folder=True)
    set_up_logging()
    planned = make_plan(run_pilot(config, overrides or [], images=images, folder=folder))
    prices = Prices(gpu_price, cpu_price)
    if as_json:
        print(json.dumps(as_json_of(planned, prices), indent=2))
        return
    console().print(table_of(planned, prices))
    for line in [*sentences(planned), f"The pilot: {planned.images} images of each split, in {planned.folder}"]:
        console().print(line, highlight=False)


@app.command()
@guarded
def status(
    run_uri: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, any URI.")],
    as_json: AsJson = False,
) -> None:
    """Show the finished, running and stopped steps of RUN. Reads its files only, so it needs no cluster."""
    from weaksam.pipeline.listings import states_of_steps
    from weaksam.pipeline.states import read_states

    states = read_states(run_uri)
    if as_json:
        print(json.dumps(states, indent=2))
    else:
        console().print(states_of_steps(states))
    if broken := [state["damage"] for state in states if state["state"] == "damaged" and state["rows"] is None]:
        raise DamagedError("\n".join(broken))


@app.command()
@guarded
def metrics(run_uri: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, any URI.")]) -> None:
    """Show the figures of every finished evaluate step in RUN, one step a line."""
    from weaksam.pipeline.listings import figures_of_steps

    for table in figures_of_steps(run_uri):
        console().print(table)


@app.command()
@guarded
def report(
    run_uri: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, any URI.")],
    to: Annotated[str | None, typer.Option(metavar="URI", help="The file; report.html in RUN when left out.")] = None,
    images: Annotated[
        int, typer.Option(min=1, help="Images shown of each group: examples, best, worst, most uncertain.")
    ] = 6,
    gpu_price: Annotated[
        float | None,
        typer.Option(min=0, metavar="PRICE", help="Price of a GPU for an hour: adds the cost of each step."),
    ] = None,
) -> None:
    """Write the results of RUN as one HTML file: figures, charts, pictures of every stage, failures, settings.

    Needs no run file and no cluster. The file needs no server: open it from a disk or a bucket.
    """
    from weaksam.report.page import write_report

    if to is not None:
        check_place(to, "--to")
    set_up_logging()
    print(write_report(run_uri, to=to, images=images, gpu_price=gpu_price))


@app.command()
@guarded
def export(
    run_uri: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, any URI.")],
    settings: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Settings as `weaksam stages export` lists them: min_score=0.5."),
    ] = None,
    *,
    step: Annotated[
        str, typer.Option(metavar="STEP", help="A finished step of pgt or detections, or <step>-<fingerprint>.")
    ],
    format: Annotated[
        str, typer.Option(metavar="FORMAT", help="A format that `weaksam stages export` lists, e.g. coco.")
    ],
    to: Annotated[
        str | None, typer.Option(metavar="URI", help="Folder to write to; one inside RUN when left out.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a finished STEP of RUN as files for other programs, and check them by reading them back.

    Needs no run file. The same command again finds the finished export; what another one wrote is never overwritten.
    """
    from weaksam import pipeline
    from weaksam.cli.export_command import explain, plan_export, read_report

    if to is not None:
        check_place(to, "--to", is_folder=True)
    set_up_logging()
    planned = plan_export(run_uri, step, format=format, to=to, settings=settings or [])
    was_finished = planned.manifest() is not None
    pipeline.run_steps([planned])
    report = read_report(planned)
    if as_json:
        print(json.dumps({**report, "was_finished": was_finished}, indent=2))
        return
    for line in explain(report, was_finished=was_finished):
        console().print(line, highlight=False)


@app.command()
@guarded
def stages(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A stage; all when left out.")] = None,
    *,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print all keys of all stages as Markdown.")] = False,
) -> None:
    """List the stages, or every key of one with type, default and meaning."""
    from weaksam.pipeline.listings import all_stages, settings_of_stage

    if markdown:
        from weaksam.cli.reference import reference

        print(reference(), end="")
        return
    for shown in [all_stages()] if name is None else settings_of_stage(name):
        console().print(shown, highlight=False)


@app.command()
@guarded
def scenes(
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write to.")],
    images: Annotated[int, typer.Option(min=1, help="Number of scenes.")] = 300,
    seed: Annotated[int, typer.Option(help="The same seed draws the same scenes.")] = 0,
    format: Annotated[str, typer.Option(help="voc or coco.")] = "voc",
) -> None:
    """Draw the demo world: photograph-like scenes with labels, boxes and masks."""
    from weaksam.demo.scenes import write_scenes

    if format not in ("voc", "coco"):
        raise ConfigError(f"--format {format}: must be voc or coco")
    check_place(out, "OUT", is_folder=True)
    set_up_logging()
    write_scenes(out, images=images, seed=seed, format=format)


def main() -> None:
    """The `weaksam` command."""
    end_on_sigterm()
    app()
