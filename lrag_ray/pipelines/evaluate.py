"""An evaluation: rollouts, scores and report. Everything that `lrag-ray run` does is `evaluate`.

The same call again is resume: what is committed is subtracted, what is partial is continued, what failed is retried.
With nothing left to do, Ray is not started.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache, partial

from lrag_ray.config.methods import resolve_method
from lrag_ray.config.paths import with_absolute_paths
from lrag_ray.config.prompts import Prompt, load_prompts
from lrag_ray.config.schema import RunConfig
from lrag_ray.engine.probe_nodes import probe_nodes
from lrag_ray.engine.session import ray_session
from lrag_ray.errors import INTERRUPTED, StorageError
from lrag_ray.events import Listener, RunPlanned, silent
from lrag_ray.pipelines.identity import build_identity
from lrag_ray.pipelines.job import Job
from lrag_ray.pipelines.plan import history_bytes, make_plan
from lrag_ray.pipelines.refine import refine_prompts
from lrag_ray.pipelines.repair import Repair, identity_of_commits, set_aside
from lrag_ray.pipelines.scoring import RunScoring, report_events
from lrag_ray.pipelines.stored_config import store_config
from lrag_ray.pipelines.text_features import TextFeatures
from lrag_ray.pipelines.waves import scoring_waves
from lrag_ray.report import build_report
from lrag_ray.stages.rollout.pending import PendingRollouts, pending_rollouts
from lrag_ray.stages.rollout.worker import RolloutStage, RolloutTask
from lrag_ray.stages.spec import Task
from lrag_ray.store.lease import REPORT, RUN
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import METHOD_DEPTH, Inventory, RolloutRun
from lrag_ray.watch.tally import cell_of
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


def evaluate(
    config: RunConfig, prompts: Sequence[Prompt] | None = None, *, repair: bool = False, listener: Listener = silent
) -> RunOutcome:
    """Run an evaluation to its end: rollouts, scores, report. With `repair`, damaged files are made again first.

    `prompts` are those of the configuration unless they were loaded before. Raises, before any actor starts:
    PromptError, ConfigError and WeightsError for what the configuration names; StorageError for an address that
    cannot be written; IdentityError for an address that holds another run; LeaseError while another driver works on
    the run, and later if another one takes it over; ClusterError. Ctrl-C ends the actors and gives exit code 130;
    nothing that was committed or stored is lost.
    """
    return begin(config, prompts, listener, EvaluateJob, repair=repair)


def begin(
    config: RunConfig,
    prompts: Sequence[Prompt] | None,
    listener: Listener,
    kind: Callable[..., EvaluateJob],
    *,
    repair: bool,
) -> RunOutcome:
    """Start a job of `kind` with the prompts of the configuration, refined first where it says so.

    Without a prompt, or after an interruption, that is all, and the outcome is a plain `RunOutcome`.
    """
    prompts = load_prompts(config.prompts) if prompts is None else prompts
    if config.prompts.refine is None:
        return kind(config, prompts, listener, repair=repair).start()
    absolute = with_absolute_paths(config)
    # What would keep the run from its work is found before a model is paid for.
    RunScoring(RolloutRun(config.run.uri, config.storage), absolute.scoring, config.engine).check()
    build_identity(absolute, [])
    refined = refine_prompts(config, prompts, repair=repair, listener=listener)
    if refined.exit_code == INTERRUPTED or not refined.prompts:
        return RunOutcome(refined.exit_code, config.run.uri, 0, 0, 0, (), refined.missing, refined.seconds)
    job = kind(config, refined.prompts, listener, repair=repair)
    job.missing |= refined.missing
    return job.start()


class EvaluateJob(Job[RunOutcome]):
    """One start of an evaluation."""

    command = "run"

    def __init__(
        self, config: RunConfig, prompts: Sequence[Prompt], listener: Listener, *, repair: bool = False
    ) -> None:
        config = with_absolute_paths(config)
        run = RolloutRun(config.run.uri, config.storage)
        super().__init__(run.storage, config.engine, listener)
        self._config = config
        self._run = run
        self._scoring = RunScoring(run, config.scoring, config.engine)
        self._pending = PendingRollouts([], [], 0, 0)
        self._inventory = Inventory({}, {}, {})
        """What storage held at the start."""
        for note in make_plan(config, prompts).notes:
            self.note(note)
        self._connected = False
        # Before anything is written: another user's run must not receive our lease.
        wanted = build_identity(config, prompts)
        self._identity = identity_of_commits(run, wanted) if repair and run.is_damaged() else run.continued(wanted)
        self._texts = TextFeatures(self, config.backbones, self._identity)
        self._repair = (
            Repair(self, run, config, self._identity, self._scoring, self._texts, self._history_bytes())
            if repair
            else None
        )
        where = config.prompts.path or "prompts"
        self._scoring.check({f"{where}:{prompt.line}": prompt.text for prompt in prompts})

    @property
    def kinds(self) -> Sequence[str]:
        """Rollouts, and the scores of its suite."""
        return [RUN, *([self._scoring.suite.folder] if self._scoring.suite else [])]

    def do(self) -> None:
        """Rollouts, scores, report; only what is open."""
        with ExitStack() as cluster:
            connect = partial(self._connect, cluster)
            if self._repair is not None:
                self._repair.make_again(connect)
            self._prepare()
            videos = self._scoring.pending()
            if self._pending.tasks or videos:
                connect()
            if self._pending.tasks:
                self._roll_out(self._texts.encode_prompts(self._pending.tasks))
                self.wait_until_listed(self._hidden_commits)
                videos = self._scoring.pending()
            if videos:
                with self.stage("scoring", len(videos)):
                    self._scoring.score(videos, self.report)
            if self._repair is not None:
                self._repair.compare()
            self.wait_until_listed(self._hidden_scores)
            # While Ray is there: its metrics have the scores, too.
            with self.stage("report"), self.leased([REPORT], patient=True):
                made = build_report(self._run, suites=[self._scoring.suite] if self._scoring.suite else ())
                for event in report_events(made):
                    self.report(event)
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

    def _connect(self, cluster: ExitStack) -> None:
        """Reach Ray until `cluster` is closed, unless it is reached."""
        if self._connected:
            return
        self._connected = True
        with self.stage("connect"):
            cluster.enter_context(ray_session(self.engine))
            probe_nodes(self._run, self._config, self.report)
            self._scoring.refuse_without_room()

    def _prepare(self) -> None:
        """Check and grow the run directory, and find out what is open."""
        if not self.storage.probe().create_only:
            self.warn(f"{self._run.uri} does not honour create-only writes: let one driver work at a time")
        self._inventory = inventory = self._run.inventory()
        pending = pending_rollouts(self._identity, inventory, self._history_bytes())
        if self.missing:
            # What a repair could not make again as it was is not replaced by something else.
            pending = dataclasses.replace(
                pending,
                tasks=[task for task in pending.tasks if task.title not in self.missing],
                invalid=[state for state in pending.invalid if state.path.rpartition("/")[0] not in self.missing],
            )
        self._pending = pending
        if pending.tasks:
            # Before the run knows the digests of files that no rollout could load.
            refuse_misfits(self._config)
        self._run.ensure(self._identity)
        self._run.refuse_foreign_commits(self._identity, inventory)
        store_config(self._run, self._config)
        for state in pending.invalid:
            set_aside(self, self._run, state.path, state.problem or "", state.data)
        self.report(
            RunPlanned(
                uri=self._run.uri,
                commits_total=pending.commits_total,
                commits_done=pending.commits_total - pending.commits_open,
                rollouts_to_do=len(pending.tasks),
                blocks_to_do=pending.blocks,
                cells=dict(Counter(cell_of(task.title) for task in pending.tasks)),  # `asdict` spoils a Counter
            )
        )

    def _hidden_commits(self) -> set[str]:
        """Commits of this start that no listing shows."""
        finished = self.finished.get("rollouts", set())
        made = {
            f"{task.payload.rollout.path}/commit-{horizon}.json"
            for task in self._pending.tasks
            if task.title in finished and task.title not in self.missing
            for horizon in task.payload.horizons
        }
        return made - self.storage.list_files_in_shares("rollouts", METHOD_DEPTH).keys() if made else set()

    def _hidden_scores(self) -> set[str]:
        """Videos that this start has scored and whose scores no listing shows."""
        finished = self.finished.get("scoring", set())
        return {task.title for task in self._scoring.pending()} & finished if finished else set()

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
            rollout_bytes = history_bytes(self._config, backbones[backbone], methods[method], latent_frames)
            return self._config.engine.prompts_per_pass * rollout_bytes

        return need

    def _roll_out(self, tasks: Sequence[Task[RolloutTask]]) -> None:
        with scoring_waves(self._run, self._config.scoring, self.engine, self.report) as relay:
            self.run_stage(RolloutStage.of(self._run, self._config), tasks, listener=relay)
