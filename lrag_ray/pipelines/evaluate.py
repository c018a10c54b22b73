"""The whole job: everything that `lrag-ray run` does is `run`.

The same call again is resume: what is committed is subtracted, what is partial is continued, what failed is tried
again. With nothing left to do no Ray is started.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.prompts import Prompt, load_prompts
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.fan_out import Item
from lrag_ray.engine.probe_nodes import probe_nodes
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import INTERRUPTED
from lrag_ray.events import (
    Event,
    Notice,
    Progress,
    RolloutFinished,
    RunPlanned,
    Stage,
    StageAdvanced,
    StageBegan,
    StageEnded,
    VideosScored,
    silent,
)
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.lease import keep_lease
from lrag_ray.pipelines.plan import make_plan
from lrag_ray.pipelines.rollouts import run_rollouts
from lrag_ray.pipelines.scoring import (
    check_scoring,
    pending_scores,
    refuse_without_room,
    score_pending,
    set_aside_damaged,
)
from lrag_ray.pipelines.stored_config import store_config
from lrag_ray.pipelines.waves import scoring_waves
from lrag_ray.report import build_report
from lrag_ray.stages.rollout.pending import OpenWork, open_work
from lrag_ray.stages.text import encode_prompts
from lrag_ray.store.address import Storage
from lrag_ray.store.records import RolloutId
from lrag_ray.store.run_dir import RunDirectory
from lrag_ray.weights.verify import refuse_misfits


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended."""

    exit_code: int
    """0 all done, 1 finished with failed rollouts, 130 interrupted."""
    uri: str
    commits_total: int
    """Horizons of all rollouts of the configuration."""
    commits_made: int
    """Horizons that this start committed."""
    videos_scored: int
    """Videos that this start scored."""
    failed: tuple[RolloutId, ...]
    """Rollouts that were given up."""
    seconds: float


def run(config: RunConfig, prompts: Sequence[Prompt] | None = None, *, progress: Progress = silent) -> RunOutcome:
    """Run an evaluation to its end: rollouts, scores, report.

    `prompts` are those of the configuration unless they were loaded before. Raises, before any actor starts:
    PromptError, ConfigError and WeightsError for what the configuration names; StorageError for an address that
    cannot be written; IdentityError for an address that holds another run; LeaseError while another driver works on
    the run, and later if another one takes it over; ClusterError. Ctrl-C ends the actors and gives exit code 130;
    nothing that was committed or stored is lost.
    """
    job = _Job(config, load_prompts(config.prompts) if prompts is None else prompts, progress)
    try:
        with keep_lease(job.storage, "run", ttl_s=config.engine.lease_ttl_s, progress=progress):
            job.prepare()
            job.do()
    except KeyboardInterrupt:
        progress(Notice("interrupted; the same command continues the run", warning=True))
        return job.outcome(INTERRUPTED)
    return job.outcome(1 if job.failed else 0)


class _Job:
    """One start of a run."""

    def __init__(self, config: RunConfig, prompts: Sequence[Prompt], progress: Progress) -> None:
        self._began = time.monotonic()
        self._config = with_absolute_paths(config)
        self._show = progress
        self._commits_made = 0
        self._videos_scored = 0
        self.failed: list[RolloutId] = []
        self._run = RunDirectory(config.run.uri, config.storage)
        self._work = OpenWork([], [], 0, 0)
        for note in make_plan(self._config, prompts).notes:
            self._progress(Notice(note))
        self._identity = build_identity(self._config, prompts)
        # Before anything is written: it may be the run of somebody else, who is not to find our lease in it.
        self._run.refuse_another_run(self._identity)
        check_scoring(self._run, self._config)

    @property
    def storage(self) -> Storage:
        """Where the run lives."""
        return self._run.storage

    def prepare(self) -> None:
        """Check and grow the run directory, and find out what is open."""
        identity = self._identity
        probe = self._run.storage.probe()
        if not probe.create_only:
            self._progress(
                Notice(
                    f"{self._run.uri} does not honour create-only writes: let one driver work at a time", warning=True
                )
            )
        inventory = self._run.inventory()
        self._work = work = open_work(identity, inventory)
        if work.items:
            # Before the run knows the digests of files that no rollout could load.
            refuse_misfits(self._config)
        self._run.ensure(identity)
        self._run.refuse_foreign_commits(identity, inventory)
        store_config(self._run, self._config)
        for state in work.invalid:
            kept = self._run.set_aside(state.path)
            text = f"{state.path} does not count ({state.problem}); it is kept as {kept} and made again"
            self._progress(Notice(text, warning=True))
        self._progress(
            RunPlanned(
                uri=self._run.uri,
                commits_total=work.commits_total,
                commits_done=work.commits_total - work.commits_open,
                rollouts_to_do=len(work.items),
                blocks_to_do=work.blocks,
            )
        )

    def do(self) -> None:
        """Rollouts, scores, report; only what is open."""
        with ExitStack() as cluster:
            videos = pending_scores(self._run, self._config)
            if self._work.items or videos:
                with self._stage("connect", 1):
                    cluster.enter_context(ray_session(self._config.engine))
                    probe_nodes(self._run, self._config, self._progress)
                    refuse_without_room(self._config)
            if self._work.items:
                self._encode_prompts()
                with (
                    self._stage("rollouts", len(self._work.items)),
                    scoring_waves(self._run, self._config, self._progress) as relay,
                ):
                    self.failed = run_rollouts(self._config, self._run, self._work.items, relay)
                videos = pending_scores(self._run, self._config)
            if videos:
                self._score(videos)
        with self._stage("report", 1):
            made = build_report(self._run)
        set_aside_damaged(self._run, self._config, made.data.scores.damaged, self._progress)

    def outcome(self, exit_code: int) -> RunOutcome:
        """What to tell the caller."""
        return RunOutcome(
            exit_code=exit_code,
            uri=self._run.uri,
            commits_total=self._work.commits_total,
            commits_made=self._commits_made,
            videos_scored=self._videos_scored,
            failed=tuple(self.failed),
            seconds=time.monotonic() - self._began,
        )

    def _encode_prompts(self) -> None:
        """Store the text features of every distinct open prompt, once per text encoder."""
        prompts: dict[str, dict[str, None]] = {}
        backbones: dict[str, str] = {}
        for item in self._work.items:
            backbones.setdefault(item.payload.text_digest, item.group)
            prompts.setdefault(item.payload.text_digest, {})[item.payload.prompt] = None
        total = sum(len(texts) for texts in prompts.values())
        with self._stage("text", total):
            done = 0
            for digest, texts in prompts.items():
                backbone = self._config.backbones[backbones[digest]]
                encode_prompts(self._run.storage, backbone, digest, list(texts), self._config.engine)
                done += len(texts)
                self._progress(StageAdvanced("text", done, total))

    def _score(self, videos: Sequence[Item]) -> None:
        with self._stage("scoring", len(videos)):
            outcome = score_pending(self._run, self._config, self._progress, items=videos)
        self._videos_scored += outcome.scored
        for path, reason in outcome.failures.items():
            self._progress(Notice(f"{path} could not be scored: {reason}", warning=True))

    @contextmanager
    def _stage(self, stage: Stage, total: int) -> Iterator[None]:
        began = time.monotonic()
        self._progress(StageBegan(stage, total))
        yield
        self._progress(StageEnded(stage, time.monotonic() - began))

    def _progress(self, event: Event) -> None:
        if isinstance(event, RolloutFinished):
            self._commits_made += len(event.horizons)
        if isinstance(event, VideosScored):
            self._videos_scored += event.videos
        self._show(event)
