"""``lrag-ray submit``, ``jobs``, ``logs`` and ``stop``: work on a cluster, seen from here."""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated

import typer

from lrag_ray.cli.options import AsJson, Config, Overrides, Progress
from lrag_ray.cli.output import console, count, duration, print_json, quantity, say, tells_errors, write
from lrag_ray.cli.tables import print_average_ranks, table
from lrag_ray.errors import INTERRUPTED
from lrag_ray.printable import counted

if TYPE_CHECKING:
    from lrag_ray.cli.progress import ProgressForm
    from lrag_ray.config.schema import StorageSection
    from lrag_ray.events import Event
    from lrag_ray.pipelines.plan import Plan
    from lrag_ray.pipelines.submit.follow import JobEnd
    from lrag_ray.pipelines.submit.submit import Preparation, SubmittedJob

Address = Annotated[
    str | None,
    typer.Option(
        "--address",
        metavar="URL",
        help="Dashboard of the cluster, http://host:8265. RAY_API_SERVER_ADDRESS and RAY_ADDRESS override it.",
    ),
]
JobName = Annotated[str, typer.Argument(metavar="ID|RUN", help="Id of a job, or address of its run (run.uri).")]
_SHOWN = 8


def register(app: typer.Typer) -> None:
    """Add the commands to the program."""
    for command in (submit, jobs, logs, stop):
        app.command()(command)


@tells_errors
def submit(
    config: Config,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow/--no-follow", help="Show progress until the job ends, and end with its exit code.")
    ] = True,
    overrides: Overrides = None,
    upload: Annotated[
        bool, typer.Option("--upload/--no-upload", help="Send this code along, or use that of the nodes' image.")
    ] = True,
    python: Annotated[
        str, typer.Option("--python", metavar="PROGRAM", help="Python of the head node that runs the job.")
    ] = "python",
    progress: Progress = "auto",
    as_json: AsJson = False,
) -> None:
    """Run on a cluster, as a Ray job: what `lrag-ray run` does here, with the same progress and exit code.

    Relative paths mean the working directory here. Prompts, plug-ins and this code travel with the job; weights and
    the run itself must be at addresses that every node reaches. While a job works on the run, the command attaches to
    it; afterwards it starts another one, which continues. Ctrl-C detaches; the job goes on.

    \b
    Examples:
      lrag-ray submit configs/table2.yaml --address http://head:8265 --set run.uri=s3://bucket/table2
      lrag-ray submit configs/table2.yaml --address http://head:8265 --no-follow
    """
    from lrag_ray.config.load import load_job
    from lrag_ray.pipelines.submit import submit as pipeline

    prepared = pipeline.prepare(load_job(config, overrides or []))
    _print_prepared(prepared, upload)
    try:
        job = pipeline.submit(prepared, address=address, upload=upload, python=python, listener=_tell)
    except KeyboardInterrupt:
        write("interrupted while submitting: `lrag-ray jobs` says whether the job was started", stderr=True)
        raise typer.Exit(INTERRUPTED) from None
    if not (as_json and follow):
        _print_submitted(job, prepared.bundle.config.job, as_json)
    if follow:
        _follow(job, progress, as_json, prepared.bundle.config.storage)


@tells_errors
def jobs(address: Address = None, as_json: AsJson = False) -> None:
    """List the jobs that were submitted to a cluster with lrag-ray, as far as its head remembers them.

    \b
    Examples:
      lrag-ray jobs --address http://head:8265
    """
    from lrag_ray.pipelines.submit import submit as pipeline

    found = pipeline.jobs(address, _tell)
    if as_json:
        print_json({"jobs": found})
        return
    if not found:
        console().print("no job was submitted there with lrag-ray since the head started")
        return
    shown = table("Jobs", "id", "state", "run", "began (UTC)", "took", "exit code", text_columns=4)
    for job in found:
        # The clock of the head may be ahead of ours.
        took = duration(max(0, (job.ended_ms or _now_ms()) - job.began_ms) / 1000)
        code = "" if job.exit_code is None else str(job.exit_code)
        shown.add_row(job.id, job.state.lower(), job.run, _time(job.began_ms), took, code)
    console().print(shown)


@tells_errors
def logs(
    name: JobName,
    address: Address = None,
    follow: Annotated[
        bool, typer.Option("--follow", help="Show progress until the job ends, and end with its exit code.")
    ] = False,
    progress: Progress = "auto",
    as_json: AsJson = False,
) -> None:
    """Show what a job has reported; with --follow until it ends, with its exit code.

    \b
    Examples:
      lrag-ray logs s3://bucket/table2 --address http://head:8265 --follow
    """
    from lrag_ray.cli.progress import PlainProgress, json_lines
    from lrag_ray.pipelines.submit.follow import job_log, show
    from lrag_ray.pipelines.submit.submit import find_job

    job = find_job(name, address, _tell)
    if follow:
        _follow(job, progress, as_json)
        return
    if as_json:
        print_json({"job": job, "lines": job_log(job).splitlines()})
        return
    listener = json_lines(write) if progress == "json" else PlainProgress(write)
    for line in job_log(job).splitlines():
        show(line, listener)


@tells_errors
def stop(name: JobName, address: Address = None, as_json: AsJson = False) -> None:
    """End a job and wait until it has: workers store what they have finished, so that the next submit continues.

    \b
    Examples:
      lrag-ray stop s3://bucket/table2 --address http://head:8265
    """
    from lrag_ray.pipelines.submit import follow
    from lrag_ray.pipelines.submit.submit import find_job

    job = find_job(name, address, _tell)
    end = follow.stop(job, _tell)
    if as_json:
        print_json(end)
        return
    if job.state in ("PENDING", "RUNNING") and end.state == "STOPPED":
        write(f"{end.id} was stopped. What it stored stays; the same submit continues")
    else:
        write(f"{end.id} had ended before: {end.state.lower()}, exit code {end.exit_code}")


def _follow(job: SubmittedJob, progress: ProgressForm, as_json: bool, storage: StorageSection | None = None) -> None:
    from lrag_ray.cli.progress import shown_progress
    from lrag_ray.events import CellScored
    from lrag_ray.pipelines.submit.follow import follow

    cells: list[CellScored] = []

    def receive(event: Event) -> None:
        if isinstance(event, CellScored):
            cells.append(event)
        shown(event)

    try:
        with shown_progress(progress) as shown:
            end = follow(job, storage=storage, listener=receive)
    except KeyboardInterrupt:
        name, at = shlex.quote(job.id), f" --address {shlex.quote(job.url)}"
        write(
            f"detached: {job.id} goes on. Follow it again: lrag-ray logs {name} --follow{at}; end it: lrag-ray stop "
            f"{name}{at}",
            stderr=True,
        )
        raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print_json(end)
    else:
        print_average_ranks(console(), cells)
        _print_end(end)
    raise typer.Exit(end.exit_code)


def _print_prepared(prepared: Preparation, upload: bool) -> None:
    """On stderr, as progress is: stdout is for the job."""
    out = console(stderr=True)
    if prepared.plan is not None:
        say(out, _planned(prepared.plan))
    code = ["this code"] if upload else []
    names = prepared.travels
    more = [f"{len(names) - _SHOWN} more files"] if len(names) > _SHOWN else []
    say(out, f"travels with the job: {', '.join(['the configuration', *code, *names[:_SHOWN], *more])}")
    for key, place in prepared.on_nodes:
        say(out, f"must be there on every node: {place} ({key})")
    for note in (*(prepared.plan.notes if prepared.plan else ()), *prepared.bundle.notes):
        say(out, f"note: {note}")


def _planned(plan: Plan) -> str:
    totals = plan.totals
    hours = max((hours.total.most for hours in plan.gpu_hours.values()), default=0)
    return (
        f"plan: {counted(plan.prompts, 'prompt')}, {counted(totals.cells, 'cell')}, "
        f"{counted(totals.rollouts, 'rollout')}, "
        f"{quantity(totals.latent_bytes + totals.video_bytes, 'B')} stored"
        + (f", at most {hours:.3g} GPU-hours of generation and decoding" if hours >= 0.1 else "")
    )


def _print_submitted(job: SubmittedJob, kind: str, as_json: bool) -> None:
    made, shown_by = ("the dataset", "dataset info") if kind == "latents" else ("tables and page", "report")
    at = f" --address {shlex.quote(job.url)}"
    # The id of a job that is attached to is somebody else's choice.
    name, run = shlex.quote(job.id), shlex.quote(job.run)
    commands = {
        "progress": f"lrag-ray logs {name} --follow{at}",
        "end it": f"lrag-ray stop {name}{at}",
        "all jobs": f"lrag-ray jobs{at}",
        "results so far": f"lrag-ray status {run}",
        made: f"lrag-ray {shown_by} {run}",
    }
    if as_json:
        print_json({**job._asdict(), "commands": commands})
        return
    write(f"{job.id} works on {job.run} already; attached to it" if job.attached else f"submitted {job.id}")
    for what, command in commands.items():
        write(f"  {what + ':':17}{command}")


def _print_end(end: JobEnd) -> None:
    outcome = end.outcome
    if {"commits_made", "commits_total", "videos_scored"} <= outcome.keys():
        write(
            f"{end.id} made {count(outcome['commits_made'])} of {count(outcome['commits_total'])} results and scored "
            f"{counted(outcome['videos_scored'], 'video')}."
        )
    for title, reason in (outcome.get("missing") or {}).items():
        write(f"  could not be made: {title}: {reason}")
    if end.reason:
        write(end.reason, stderr=True)
    write(f"{end.id}: {end.state.lower()}, exit code {end.exit_code}")


def _tell(event: Event) -> None:
    if text := getattr(event, "text", ""):
        write(f"{'warning: ' if getattr(event, 'warning', False) else ''}{text}", stderr=True)


def _time(milliseconds: int) -> str:
    return f"{datetime.fromtimestamp(milliseconds / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def _now_ms() -> int:
    return round(datetime.now(UTC).timestamp() * 1000)
