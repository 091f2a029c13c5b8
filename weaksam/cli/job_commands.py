"""Commands that contact a cluster: submit a run, show its jobs and their logs, end a job, check the cluster."""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from weaksam.cli.terminal import AsJson, ConfigPath, Overrides, console, guarded, set_up_logging

if TYPE_CHECKING:
    from weaksam.cluster.jobs import Cluster

log = logging.getLogger(__name__)

app = typer.Typer()

ClusterFile = Annotated[
    str | None, typer.Option("--cluster", metavar="FILE", help="Cluster file, such as cluster/local.yaml.")
]
Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="URL of the cluster's dashboard; else RAY_API_SERVER_ADDRESS, else that of the file, else this machine's.",
    ),
]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="Id that `weaksam submit` printed.")]


@app.command()
@guarded
def submit(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    cluster: ClusterFile = None,
    address: Address = None,
    wait: Annotated[bool, typer.Option("--wait", help="Show the log and end with the job's exit code.")] = False,
    look: Annotated[
        bool, typer.Option(help="Look at data and weights from here first; --no-look if only the cluster sees them.")
    ] = True,
    name: Annotated[str | None, typer.Option(metavar="NAME", help="Beginning of the job's id.")] = None,
    as_json: AsJson = False,
) -> None:
    """Run CONFIG as a job of a cluster. The same command again resumes an earlier job."""
    from weaksam import pipeline
    from weaksam.cluster.jobs import Cluster
    from weaksam.cluster.settings import load_cluster
    from weaksam.cluster.submit import plan_job, staged

    set_up_logging()
    settings = load_cluster(cluster, address)
    run_file = pipeline.parse(config, overrides or [])
    with staged() as folder:
        job = plan_job(run_file, settings, folder, name=name)
        if look:
            pipeline.resolve_steps(run_file)
        client = Cluster(job.address)
        log.info("%s: sending %s", job.address, job.sent)
        client.submit(job)
    if as_json:
        summary = {"job": job.id, "address": job.address, "run": job.run, "entrypoint": job.entrypoint}
        print(json.dumps(summary | {"ray": job.ray_line}), flush=True)
    else:
        print(f"{job.id}\n  the same with Ray: {job.ray_line}", flush=True)
        if not wait:
            reach = f" --address {job.address}" if address or not cluster else f" --cluster {cluster}"
            print(f"  weaksam logs {job.id}{reach} --follow\n  weaksam status {job.run}")
    if wait:
        _follow(client, job.id, is_known=True)


@app.command()
@guarded
def jobs(cluster: ClusterFile = None, address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs of a cluster, newest first."""
    rows = _reach(cluster, address).jobs()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("job", "state", "exit code", "started", "ended", "run", box=None)
    for row in rows:
        code = "" if row["exit_code"] is None else str(row["exit_code"])
        table.add_row(row["job"], row["state"], code, row["started"] or "", row["ended"] or "", row["run"] or "")
    console().print(table)


@app.command()
@guarded
def logs(
    job: JobId,
    *,
    cluster: ClusterFile = None,
    address: Address = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job ends; its exit code.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show the output of JOB."""
    client = _reach(cluster, address)
    if follow and not as_json:
        _follow(client, job)
        return
    text, state = client.log(job), client.job(job)
    if as_json:
        print(json.dumps(state | {"log": text.splitlines()}, indent=2))
    else:
        print(text, end="")


@app.command()
@guarded
def cancel(job: JobId, cluster: ClusterFile = None, address: Address = None, as_json: AsJson = False) -> None:
    """End JOB. Its results are kept; submitting the same again resumes the run."""
    client = _reach(cluster, address)
    ended = client.cancel(job)
    if as_json:
        print(json.dumps({"job": job, "cancelled": ended, "state": client.job(job)["state"]}))
    else:
        print(f"{job}: {'ends now' if ended else 'had ended already'}")


@app.command()
@guarded
def doctor(
    config: ConfigPath,
    overrides: Overrides = None,
    *,
    cluster: ClusterFile = None,
    address: Address = None,
    is_local: Annotated[bool, typer.Option("--here", help="Examine this machine (or RAY_ADDRESS) instead.")] = False,
    as_json: AsJson = False,
) -> None:
    """Examine every node of a cluster for what CONFIG needs: versions, storage, weights, memory. It runs as a job."""
    from weaksam import pipeline
    from weaksam.cluster.doctor import run_doctor
    from weaksam.cluster.jobs import Cluster
    from weaksam.cluster.settings import load_cluster
    from weaksam.cluster.submit import plan_job, staged

    set_up_logging()
    if is_local:
        run_doctor(config, overrides or [], as_json=as_json)
        return
    settings = load_cluster(cluster, address)
    run_file = pipeline.parse(config, overrides or [])
    with staged() as folder:
        job = plan_job(
            run_file,
            settings,
            folder,
            module="jobs.doctor",
            name="weaksam-doctor",
            flags=["--json"] if as_json else [],
        )
        client = Cluster(job.address)
        client.submit(job)
    _follow(client, job.id, is_known=True)


def _reach(cluster: str | None, address: str | None) -> Cluster:
    from weaksam.cluster.jobs import Cluster
    from weaksam.cluster.settings import load_cluster

    return Cluster(load_cluster(cluster, address).address)


def _follow(client: Cluster, job_id: str, *, is_known: bool = False) -> None:
    from weaksam.cluster.jobs import exit_code

    def show(text: str) -> None:
        print(text, end="", flush=True)

    state = client.follow(job_id, show, is_known=is_known)
    code = exit_code(state)
    if code:
        print(f"{job_id}: {state['state']}, exit code {code}: {state['message']}", file=sys.stderr)
        raise typer.Exit(code)
