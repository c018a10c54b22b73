"""An evaluation: rollouts, scores and report. Everything that `lrag-ray run` does is `evaluate`.

The same call again is resume: what is committed is subtracted, what is partial is continued, what failed is retried.
With nothing left to do, Ray is not started.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache

from lrag_ray.config.methods import resolve_method
from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.prompts import Prompt, load_prompts
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.probe_nodes import probe_nodes
from lrag_ray.engine.session import ray_session
from lrag_ray.engine.sizing import PoolSize
from lrag_ray.errors import INTERRUPTED, StorageError
from lrag_ray.events import Listener, RunPlanned, silent
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.job import Job
from lrag_ray.pipelines.plan import history_bytes, make_plan
from lrag_ray.pipelines.scoring import RunScoring
from lrag_ray.pipelines.stored_config import store_config
from lrag_ray.pipelines.waves import scoring_waves
from lrag_ray.report import build_report
from lrag_ray.stages.rollout.pending import PendingRollouts, pending_rollouts
from lrag_ray.stages.rollout.worker import RolloutStage, RolloutTask
from lrag_ray.stages.spec import Task
from lrag_ray.stages.text import TextStage, TextTask, embedding_path, without_features
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.weights.verify import refuse_misfits


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended."""

    exit_code: int
    """0 all that was asked for is made, 1 something could not be made, 130 interrupted."""
    uri: str
    commits_total: int
    """Horizons of all rollouts of the configuration."""
    commits_made: int
    """Horizons that this start committed."""
    videos_scored: int
    """Videos that this start scored."""
    failed: tuple[RolloutId, ...]
    """Rollouts without all their commits."""
    missing: Mapping[str, str]
    """What could not be made, rollouts, texts and scores: the reason, by title."""
    seconds: float


def evaluate(config: RunConfig, prompts: Sequence[Prompt] | None = None, *, listener: Listener = silent) -> RunOutcome:
    """Run an evaluation to its end: rollouts, scores, report.

    `prompts` are those of the configuration unless they were loaded before. Raises, before any actor starts:
    PromptError, ConfigError and WeightsError for what the configuration names; StorageError for an address that
    cannot be written; IdentityError for an address that holds another run; LeaseError while another driver works on
    the run, and later if another one takes it over; ClusterError. Ctrl-C ends the actors and gives exit code 130;
    nothing that was committed or stored is lost.
    """
    return EvaluateJob(config, load_prompts(config.prompts) if prompts is None else prompts, listener).start()


class EvaluateJob(Job[RunOutcome]):
    """One start of an evaluation."""

    lease = "run"

    def __init__(self, config: RunConfig, prompts: Sequence[Prompt], listener: Listener) -> None:
        config = with_absolute_paths(config)
        run = RolloutRun(config.run.uri, config.storage)
        super().__init__(run.storage, config.engine, listener)
        self._config = config
        self._run = run
        self._scoring = RunScoring(run, config.scoring, config.engine)
        self._pending = PendingRollouts([], [], 0, 0)
        for note in make_plan(config, prompts).notes:
            self.note(note)
        # Before anything is written: another user's run must not receive our lease.
        self._identity = run.continued(build_identity(config, prompts))
        self._scoring.check()

    def do(self) -> None:
        """Rollouts, scores, report; only what is open."""
        self._prepare()
        with ExitStack() as cluster:
            videos = self._scoring.pending()
            if self._pending.tasks or videos:
                with self.stage("connect"):
                    cluster.enter_context(ray_session(self.engine))
                    probe_nodes(self._run, self._config, self.report)
                    self._scoring.refuse_without_room()
            if self._pending.tasks:
                self._roll_out(self._encode_prompts(self._pending.tasks))
                videos = self._scoring.pending()
            if videos:
                with self.stage("scoring", len(videos)):
                    self._scoring.score(videos, self.report)
        with self.stage("report"):
            made = build_report(self._run, suites=[self._scoring.suite] if self._scoring.suite else ())
        self.missing |= self._scoring.missing(made.data.suite, made.data.scores, self.report)

    def outcome(self, exit_code: int) -> RunOutcome:
        """What was made and what was not."""
        rollouts = {task.title: task.payload.rollout for task in self._pending.tasks}
        return RunOutcome(
            exit_code=exit_code,
            uri=self._run.uri,
            commits_total=self._pending.commits_total,
            commits_made=self._commits_made(exit_code),
            videos_scored=self.made["scoring"],
            failed=tuple(rollout for title, rollout in rollouts.items() if title in self.missing),
            missing=self.missing,
            seconds=self.seconds,
        )

    def _prepare(self) -> None:
        """Check and grow the run directory, and find out what is open."""
        if not self.storage.probe().create_only:
            self.warn(f"{self._run.uri} does not honour create-only writes: let one driver work at a time")
        inventory = self._run.inventory()
        self._pending = pending = pending_rollouts(self._identity, inventory, self._history_bytes())
        if pending.tasks:
            # Before the run knows the digests of files that no rollout could load.
            refuse_misfits(self._config)
        self._run.ensure(self._identity)
        self._run.refuse_foreign_commits(self._identity, inventory)
        store_config(self._run, self._config)
        for state in pending.invalid:
            kept = self._run.set_aside(state.path)
            self.warn(f"{state.path} does not count ({state.problem}); it is kept as {kept} and made again")
        self.report(
            RunPlanned(
                uri=self._run.uri,
                commits_total=pending.commits_total,
                commits_done=pending.commits_total - pending.commits_open,
                rollouts_to_do=len(pending.tasks),
                blocks_to_do=pending.blocks,
            )
        )

    def _commits_made(self, exit_code: int) -> int:
        if exit_code == INTERRUPTED and self._pending.tasks:
            # Rollouts that were cut off may have reached some of their horizons.
            with suppress(StorageError):
                now = pending_rollouts(self._identity, self._run.inventory(), lambda *_: 0)
                return self._pending.commits_open - now.commits_open
        return self.made["rollouts"]

    def _history_bytes(self) -> Callable[[str, str, int], int]:
        backbones = self._config.backbones
        methods = {name: resolve_method(section) for name, section in self._config.methods.items()}

        @cache
        def need(backbone: str, method: str, latent_frames: int) -> int:
            return history_bytes(backbones[backbone], methods[method], latent_frames)

        return need

    def _encode_prompts(self, tasks: Sequence[Task[RolloutTask]]) -> list[Task[RolloutTask]]:
        """Store the text features of every distinct open prompt, once per text encoder.

        Returns the rollouts whose prompt could be encoded; the others are missing.
        """
        wanted = {(task.payload.text_digest, task.payload.prompt): task for task in reversed(tasks)}
        by_encoder: dict[str, list[str]] = {}
        for digest, prompt in reversed(wanted):
            by_encoder.setdefault(digest, []).append(prompt)
        texts = [
            Task(
                key=embedding_path(digest, prompt),
                payload=TextTask(wanted[digest, prompt].group, digest, prompt),
                order=order,
                group=digest,
                name=f"prompt {wanted[digest, prompt].payload.rollout.prompt_id} of {wanted[digest, prompt].group}",
            )
            for digest, prompts in by_encoder.items()
            for order, prompt in enumerate(without_features(self.storage, digest, prompts))
        ]
        if not texts:
            return list(tasks)
        # One worker: it reads the encoder (11 GB for umT5-xxl) once.
        failed = self.run_stage(
            TextStage(self.storage, self._config.backbones, self.engine), texts, size=PoolSize(1, 1)
        )
        lost = {(text.payload.text_digest, text.payload.prompt) for text in failed}
        for task in tasks:
            if (task.payload.text_digest, task.payload.prompt) in lost:
                self.missing[task.title] = "its prompt could not be encoded"
        return [task for task in tasks if task.title not in self.missing]

    def _roll_out(self, tasks: Sequence[Task[RolloutTask]]) -> None:
        with scoring_waves(self._run, self._config.scoring, self.engine, self.report) as relay:
            self.run_stage(RolloutStage.of(self._run, self._config), tasks, listener=relay)
