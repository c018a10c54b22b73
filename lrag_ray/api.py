"""The public Python API: what `import lrag_ray as lr` offers. Every command of the CLI is one call of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lrag_ray.config.jobs import JobConfig
from lrag_ray.config.load import load_job
from lrag_ray.config.prompts import Prompt, plan_prompts
from lrag_ray.config.schema import RunConfig, StorageSection
from lrag_ray.config.training import TrainEncoderConfig
from lrag_ray.errors import StorageError, UsageError
from lrag_ray.events import Listener, silent
from lrag_ray.store.records import HOW_TO_REPAIR, Commit, RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.status import RunStatus, run_status

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from lrag_ray.pipelines.jobs import JobOutcome
    from lrag_ray.pipelines.plan import Plan
    from lrag_ray.pipelines.plan_training import TrainingPlan
    from lrag_ray.pipelines.score import RunScores
    from lrag_ray.pipelines.score_videos import VideoScores
    from lrag_ray.pipelines.submit.follow import JobEnd as JobEnd
    from lrag_ray.pipelines.submit.submit import Preparation as Preparation
    from lrag_ray.pipelines.submit.submit import SubmittedJob as SubmittedJob
    from lrag_ray.report import Report
    from lrag_ray.report.collect import ReportData


load_config = load_job


def plan(config: JobConfig, prompts: Sequence[Prompt] | None = None) -> Plan | TrainingPlan:
    """What a run would come to, from nothing: rollouts or steps, arithmetic, memory, bytes. Reads no weights.

    `prompts` are those of the configuration unless they are given. Raises PromptError, and for a training UsageError
    and StorageError for its datasets.
    """
    from lrag_ray.pipelines.plan import make_plan
    from lrag_ray.pipelines.plan_training import plan_training

    if not isinstance(config, RunConfig):
        return plan_training(config)

    return make_plan(config, plan_prompts(config.prompts) if prompts is None else prompts)


def run(
    config: JobConfig | str | Path, prompts: Sequence[Prompt] | None = None, *, listener: Listener = silent
) -> JobOutcome:
    """Run the job that a configuration (or its file) describes, to its end. The same call again continues.

    `listener` receives the events of `lrag_ray.events`. Errors and exit code: see `lrag_ray.pipelines.evaluate`.
    """
    from lrag_ray.pipelines.jobs import start

    loaded = load_config(config) if isinstance(config, str | Path) else config
    return start(loaded, prompts, listener)


def score(
    target: str,
    *,
    config: RunConfig | None = None,
    overrides: Sequence[str] = (),
    manifest: str | None = None,
    to: str | None = None,
    listener: Listener = silent,
) -> RunScores | VideoScores:
    """Score the videos of the run at `target`, or any other videos (folder, file, glob, address of a bucket).

    `config` is the run's configuration, else `overrides` (``scoring.suite=vbench_long``) change the defaults.
    `manifest` and `to` are for videos outside a run. Raises UsageError, WeightsError, StorageError, ClusterError.
    """
    from lrag_ray.config.videos import videos_config
    from lrag_ray.pipelines.score import is_run, score_run
    from lrag_ray.pipelines.score_videos import score_videos
    from lrag_ray.pipelines.stored_config import stored_config

    if is_run(target):
        if manifest is not None or to is not None:
            raise UsageError(f"manifest and to are for videos outside a run, and {target} is a run")
        return score_run(config or stored_config(target, overrides), listener=listener)
    return score_videos(target, videos_config(overrides), manifest=manifest, to=to, listener=listener)


@contextmanager
def progress() -> Iterator[Listener]:
    """A listener that shows what a start does: live in a notebook and on a terminal, lines elsewhere.

    ``with lr.progress() as shown: lr.run(config, listener=shown)``
    """
    from lrag_ray.cli.progress import shown_progress

    with shown_progress() as listener:
        yield listener


def write_report(
    runs: str | Sequence[str] | Mapping[str, str],
    *,
    to: str | None = None,
    suite: str | None = None,
    mode: str | None = None,
    strips: int | None = None,
) -> Report:
    """Write the report of one run, or of several as one, and return its tables; see `lrag_ray.report.report`.

    A mapping gives the runs labels, which tell apart methods that several of them have: ``{"A": "runs/a", "B":
    "runs/b"}`` shows ``rag (A)`` and ``rag (B)``. Without `to`, nothing is written for several. Raises StorageError
    and UsageError.
    """
    from lrag_ray.pipelines.report import report as make_report

    labels = list(runs) if isinstance(runs, Mapping) else None
    uris = [runs] if isinstance(runs, str) else list(runs.values()) if isinstance(runs, Mapping) else list(runs)
    return make_report(
        [RolloutRun(uri) for uri in uris],
        to=to,
        suite=suite,
        mode=mode,
        strips=strips,
        labels=labels,
    )


def prepare(config: JobConfig | str | Path) -> Preparation:
    """What `submit` checks without a cluster: prompts, plan, what travels and what every node must have.

    Raises ConfigError, PromptError and UsageError.
    """
    from lrag_ray.pipelines.submit.submit import prepare as prepare_config

    return prepare_config(load_config(config) if isinstance(config, str | Path) else config)


def submit(
    config: JobConfig | str | Path | Preparation,
    *,
    address: str | None = None,
    upload: bool = True,
    python: str = "python",
    listener: Listener = silent,
) -> SubmittedJob:
    """Start a Ray job that does what `run` does here, or attach to the one that works on this run already.

    `address` is that of the dashboard (``http://host:8265``); RAY_API_SERVER_ADDRESS and RAY_ADDRESS override it.
    `upload` sends the code of this machine along; `python` is the program that runs the job on the head node. Raises
    UsageError, and ClusterError where the cluster cannot be reached, does not suit or does not take the job.
    """
    from lrag_ray.pipelines.submit.submit import submit as submit_prepared

    prepared = prepare(config) if isinstance(config, RunConfig | TrainEncoderConfig | str | Path) else config
    return submit_prepared(prepared, address=address, upload=upload, python=python, listener=listener)


def jobs(address: str | None = None, *, listener: Listener = silent) -> list[SubmittedJob]:
    """The jobs of lrag-ray that the cluster remembers, oldest first. ClusterError where it does not answer."""
    from lrag_ray.pipelines.submit.submit import jobs as submitted_jobs

    return submitted_jobs(address, listener)


def find_job(name: str, *, address: str | None = None, listener: Listener = silent) -> SubmittedJob:
    """The job with the id `name`, else the latest of the run at the address `name`. UsageError without one."""
    from lrag_ray.pipelines.submit.submit import find_job as find

    return find(name, address, listener)


def follow_job(job: SubmittedJob, *, storage: StorageSection | None = None, listener: Listener = silent) -> JobEnd:
    """Report to `listener` what a job reports, from its beginning until it has ended; its exit code.

    `storage` is how its run is reached while the cluster does not answer. Raises ClusterError where the cluster has
    forgotten the job (its head was restarted) or is silent for ten minutes. Interrupting this leaves the job alone.
    """
    from lrag_ray.pipelines.submit.follow import follow

    return follow(job, storage=storage, listener=listener)


def job_log(job: SubmittedJob) -> str:
    """All that a job has written so far: events as lines of JSON, and what else was printed."""
    from lrag_ray.pipelines.submit.follow import job_log as read_log

    return read_log(job)


def stop_job(job: SubmittedJob, *, listener: Listener = silent) -> JobEnd:
    """End a job and wait until its workers have stored what they finished. ClusterError where it does not end."""
    from lrag_ray.pipelines.submit.follow import stop

    return stop(job, listener)


def open_run(uri: str | Path, storage: StorageSection | None = None) -> Run:
    """The run at an address, from its storage alone. StorageError where there is none."""
    return Run(RolloutRun(str(uri), storage or StorageSection()))


class Video(NamedTuple):
    """A committed video of a run."""

    prompt_id: str
    prompt: str
    sample: int
    backbone: str
    method: str
    duration_s: float
    address: str
    """Of the file; longer than the duration where only a longer horizon was committed."""
    frames: int
    """Video frames from its start that belong to the duration."""
    fps: int
    original_prompt: str = ""
    """The prompt before it was refined; empty where it was not."""


class Run:
    """A run directory, read only."""

    def __init__(self, run: RolloutRun) -> None:
        self._run = run
        self.identity = run.require()
        """What the run is: prompts, backbones, methods, durations."""

    @property
    def uri(self) -> str:
        """The address as it may be shown."""
        return self._run.uri

    def status(self) -> RunStatus:
        """How far the run is: counts per cell, rate, failures."""
        return run_status(self._run)

    def scores(self, suite: str | None = None, mode: str | None = None) -> pd.DataFrame:
        """One row per video and dimension: prompt_id, prompt, sample, backbone, method, duration_s, dimension, value.

        With refined prompts original_prompt comes after prompt. Without `suite` and `mode` those that compare best.
        Values are as the suite's files hold them.
        """
        import pandas as pd

        data = self._collect(suite, mode)
        prompts = self.identity.prompts
        columns = ["prompt_id", "prompt", "sample", "backbone", "method", "duration_s", "dimension", "value"]
        rows = [
            (
                video.prompt_id,
                self._prompt(video.prompt_id),
                video.sample,
                video.backbone,
                video.method,
                data.duration_s(video.backbone, video.latent_frames),
                dimension,
                value,
            )
            for video in data.scores.videos
            for dimension, value in video.values.items()
        ]
        table = pd.DataFrame(rows, columns=columns)
        if any(prompt.original for prompt in prompts.values()):
            table.insert(2, "original_prompt", [prompts[prompt_id].original for prompt_id in table["prompt_id"]])
        return table

    def ranks(self, suite: str | None = None, mode: str | None = None) -> pd.DataFrame:
        """One row per backbone, duration and method: average_rank, its prompts, and the mean of every dimension."""
        import pandas as pd

        data = self._collect(suite, mode)
        rows: list[Mapping[str, Any]] = [
            {
                "backbone": block.backbone,
                "duration_s": data.duration_s(block.backbone, block.latent_frames),
                "method": row.method,
                "average_rank": row.average_rank,
                "prompts": row.prompts,
                **row.means,
            }
            for block in data.blocks
            for row in block.rows
        ]
        return pd.DataFrame(rows)

    def videos(
        self,
        *,
        prompt: str | None = None,
        method: str | None = None,
        backbone: str | None = None,
        duration_s: float | None = None,
    ) -> list[Video]:
        """Committed videos, prompt-major.

        `prompt` is a prompt_id or a part of the text, refined or original, in any case.
        """
        from lrag_ray.store.videos import committed_videos

        found = []
        for video in committed_videos(self._run):
            rollout = video.rollout
            if not self._matches(rollout, prompt, method, backbone) or duration_s not in (None, video.duration_s):
                continue
            found.append(
                Video(
                    prompt_id=rollout.prompt_id,
                    prompt=self._prompt(rollout.prompt_id),
                    sample=rollout.sample,
                    backbone=rollout.backbone,
                    method=rollout.method,
                    duration_s=video.duration_s,
                    address=f"{self.uri}/{video.video.path}",
                    frames=video.frames,
                    fps=video.fps,
                    original_prompt=self.identity.prompts[rollout.prompt_id].original,
                )
            )
        return found

    def latents(
        self, *, prompt: str | None = None, method: str | None = None, backbone: str | None = None
    ) -> Iterator[tuple[RolloutId, Tensor]]:
        """Committed latents [frames, C, H, W] of each rollout, at its longest horizon, checked as they are read.

        `prompt` is a prompt_id or a part of the text. Raises StorageError for damaged parts.
        """
        import torch

        from lrag_ray.store.parts import BrokenPartError, read_latents

        longest: dict[RolloutId, Commit] = {}
        for commit in self._run.commits():
            if self._matches(commit.rollout, prompt, method, backbone):
                longest[commit.rollout] = commit
        for rollout, commit in longest.items():
            try:
                latents = torch.cat([read_latents(self._run.storage, part) for part in commit.latent_parts])
            except BrokenPartError as error:
                raise StorageError(f"{self.uri}: {error}. {HOW_TO_REPAIR}") from None
            yield rollout, latents

    def _collect(self, suite: str | None, mode: str | None) -> ReportData:
        from lrag_ray.report.collect import collect

        return collect([self._run], suite, mode)

    def _prompt(self, prompt_id: str) -> str:
        return self.identity.prompts[prompt_id].text

    def _matches(self, rollout: RolloutId, prompt: str | None, method: str | None, backbone: str | None) -> bool:
        if not self.identity.knows(rollout) or method not in (None, rollout.method):
            return False
        if backbone not in (None, rollout.backbone):
            return False
        if prompt is None or prompt == rollout.prompt_id:
            return True
        found = self.identity.prompts[rollout.prompt_id]
        return any(prompt.lower() in each.lower() for each in (found.text, found.original))
