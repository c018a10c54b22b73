"""Submitting: everything that can be checked here is, then one job works on a run at a time.

The id of a job follows from the address of its run and a number. Ray takes an id once, so of two submits at the same
moment one starts the job and the other finds it and attaches.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import lrag_ray
from lrag_ray.config.jobs import JobConfig
from lrag_ray.config.prompts import load_prompts
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.ray_jobs.client import JobClient, NoAnswerError, RayJob, TakenIdError, UnknownJobError, connect
from lrag_ray.engine.ray_jobs.dashboard import Dashboard, find_token
from lrag_ray.errors import ClusterError, UsageError
from lrag_ray.events import Listener, Notice, silent
from lrag_ray.pipelines.plan import Plan, make_plan
from lrag_ray.pipelines.submit.bundle import CONFIG_NAME, Bundle, OnNodes, make_bundle, run_address
from lrag_ray.pipelines.submit.wheel import build_wheel

RUN_KEY, CONFIG_KEY, VERSION_KEY, JOB_KEY = "lrag_run", "lrag_config", "lrag_version", "lrag_job"
"""Of a job's metadata: address of its run, digest of its configuration, version of this program, kind of job."""
STOP_WAIT_S = 120
"""Between Ray's SIGTERM and its SIGKILL. Ray's own 3 s are too few for an actor to finish its block and store it."""
_TRIES = 5


class SubmittedJob(NamedTuple):
    """A job as it was seen last."""

    id: str
    url: str
    """Of the dashboard that took it."""
    run: str
    """Address of its run; empty for a job that lrag-ray did not submit."""
    state: str
    """PENDING, RUNNING, STOPPED, SUCCEEDED or FAILED."""
    exit_code: int | None
    """None until it has ended; see `RayJob.exit_code`."""
    began_ms: int
    """Milliseconds since 1970, by the clock of the head."""
    ended_ms: int | None
    attached: bool = False
    """It worked on the run already when it was submitted again."""

    @property
    def client(self) -> JobClient:
        """A client of its cluster."""
        return JobClient(Dashboard(self.url, "of this job"), find_token())


class Preparation(NamedTuple):
    """What was found before anything is sent."""

    bundle: Bundle
    plan: Plan | None
    """None for jobs that have none."""

    @property
    def run(self) -> str:
        """Address of the run."""
        return self.bundle.config.run.uri

    @property
    def travels(self) -> list[str]:
        """Files of the user that travel, by their path in the job's working directory."""
        return sorted(self.bundle.files)

    @property
    def on_nodes(self) -> Sequence[OnNodes]:
        """What must be there on every node."""
        return self.bundle.on_nodes


def prepare(config: JobConfig) -> Preparation:
    """Check here what can be checked without a cluster. Raises PromptError and UsageError."""
    bundle = make_bundle(config)
    # First: to plan with prompts that are too large to travel takes minutes.
    bundle.check_size()
    return Preparation(
        bundle, make_plan(config, load_prompts(config.prompts)) if isinstance(config, RunConfig) else None
    )


def submit(
    prepared: Preparation,
    *,
    address: str | None = None,
    upload: bool = True,
    python: str = "python",
    listener: Listener = silent,
) -> SubmittedJob:
    """Start a job that works on the run, or find the one that does.

    `address` is that of the dashboard (`find_dashboard`). Without `upload` the nodes must have this version. `python`
    is the program of the head node that runs the job. Raises UsageError, and ClusterError where the cluster does not
    answer, does not suit or does not take the job.
    """
    with tempfile.TemporaryDirectory(prefix="lrag-submit-") as folder:
        # Before the cluster is asked: it may be too large.
        archive = prepared.bundle.write(Path(folder))
        client = _connected(address, listener)
        if found := _working(client.jobs(), prepared.run):
            return _attached(client, found, prepared, listener)
        runtime_env: dict[str, object] = {
            "working_dir": client.upload(archive),
            "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_WAIT_S)},
        }
        sizes = [archive.stat().st_size]
        if upload:
            wheel = build_wheel(Path(folder)).path
            runtime_env["py_modules"] = [client.upload(wheel)]
            sizes.append(wheel.stat().st_size)
        listener(Notice(f"upload: {sum(sizes):,} bytes"))
    metadata = {
        RUN_KEY: prepared.run,
        CONFIG_KEY: prepared.bundle.digest,
        VERSION_KEY: lrag_ray.__version__,
        JOB_KEY: prepared.bundle.config.job,
    }
    program = [python, "-m", "jobs.evaluate", CONFIG_NAME, "--progress", "json"]
    program += ["--client-version", f"{lrag_ray.__version__}/{lrag_ray.NUMERICS_VERSION}"]
    for _ in range(_TRIES):
        # One list for both: a job that another submit started meanwhile is attached to, and not the reason for a
        # higher number.
        known = client.jobs()
        if found := _working(known, prepared.run):
            return _attached(client, found, prepared, listener)
        job_id = _next_id(known, prepared)
        try:
            client.submit(job_id, f"exec {shlex.join(program)}", runtime_env, metadata)
        except TakenIdError:
            # By a submit at the same moment.
            continue
        except NoAnswerError:
            # The answer may be what was lost.
            if (found := _working(client.jobs(), prepared.run)) is None:
                raise
            return submitted(client, found)
        return submitted(client, client.job(job_id))
    raise ClusterError(f"{client.url} keeps ids of jobs of {prepared.run} that are not in its list. Fix: submit again")


def submitted(client: JobClient, job: RayJob) -> SubmittedJob:
    """What is known of a job, as plain data."""
    code = job.exit_code if job.ended else None
    run = job.metadata.get(RUN_KEY, "")
    return SubmittedJob(job.id, client.url, run, job.state, code, job.began_ms, job.ended_ms)


def jobs(address: str | None = None, listener: Listener = silent) -> list[SubmittedJob]:
    """Jobs that were submitted by this program, oldest first."""
    client = _connected(address, listener)
    return [submitted(client, job) for job in _ours(client)]


def find_job(name: str, address: str | None = None, listener: Listener = silent) -> SubmittedJob:
    """The job with the id `name`, else the latest of the run at the address `name`. UsageError without one."""
    client = _connected(address, listener)
    if re.fullmatch(r"[\w.-]+", name):
        with suppress(UnknownJobError):
            return submitted(client, client.job(name))
    known = _ours(client)
    found = [job for job in known if job.metadata[RUN_KEY] == run_address(name)]
    if found:
        return submitted(client, next((job for job in found if not job.ended), found[-1]))
    latest = ", ".join(f"{job.id} ({job.metadata[RUN_KEY]})" for job in known[-5:])
    raise UsageError(
        f"{client.url} has no job {name!r} and none of a run at {run_address(name)}"
        + (f". The latest: {latest}" if latest else "; no job of lrag-ray was submitted there since its head started")
        + ". Fix: see `lrag-ray jobs`, or submit again: what is stored is not redone"
    )


def _connected(address: str | None, listener: Listener) -> JobClient:
    client = connect(address)
    for note in (client.dashboard.note, client.note):
        if note:
            listener(Notice(note, warning=True))
    return client


def _ours(client: JobClient) -> list[RayJob]:
    return [job for job in client.jobs() if RUN_KEY in job.metadata]


def _working(known: Iterable[RayJob], run: str) -> RayJob | None:
    """The job that works on the run at this address, or is about to."""
    return next((job for job in known if job.metadata.get(RUN_KEY) == run and not job.ended), None)


def _attached(client: JobClient, job: RayJob, prepared: Preparation, listener: Listener) -> SubmittedJob:
    if job.metadata.get(CONFIG_KEY) != prepared.bundle.digest:
        text = (
            f"{job.id} works on this run with another version of the configuration. Submit again when it has ended (or "
            "stop it first): the run then grows by what was added"
        )
        listener(Notice(text, warning=True))
    return submitted(client, job)._replace(attached=True)


def _next_id(known: Iterable[RayJob], prepared: Preparation) -> str:
    """The first id of this run that no job has had."""
    storage = prepared.bundle.config.storage
    digest = hashlib.sha256(f"{prepared.run}\0{storage.endpoint_url or ''}".encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", prepared.run.rstrip("/").rsplit("/", 1)[-1])[:40].strip("-.") or "run"
    stem = f"lrag-{name}-{digest}-"
    taken = [int(job.id[len(stem) :]) for job in known if re.fullmatch(re.escape(stem) + r"\d{1,9}", job.id)]
    return f"{stem}{max(taken, default=0) + 1}"
