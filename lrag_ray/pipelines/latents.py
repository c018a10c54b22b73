"""A latent corpus: what `job: latents` does.

Rollouts as in an evaluation, with the same stage, pool, resume and failures, but only the first few are decoded. Their
latents are the dataset (`lrag_ray.store.datasets`), whose index follows the commits while the run goes on.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import PurePath
from queue import Empty, SimpleQueue

from lrag_ray.config.latents import LatentsConfig
from lrag_ray.config.prompts import Prompt
from lrag_ray.errors import ConfigError, StorageError
from lrag_ray.events import Event, Listener, Notice, TaskFinished, silent
from lrag_ray.pipelines.decode import prefix_groups
from lrag_ray.pipelines.evaluate import EvaluateJob, RunOutcome, begin
from lrag_ray.stages.decode import DecodeStage, DecodeTask
from lrag_ray.stages.rollout.worker import RolloutStage, RolloutTask
from lrag_ray.stages.spec import Task
from lrag_ray.store.dataset_card import DatasetCard, WeightsSource
from lrag_ray.store.dataset_rows import RunIndex
from lrag_ray.store.datasets import LatentDataset
from lrag_ray.store.decoded import own_settings, read_decoded
from lrag_ray.store.lease import DECODE, RUN
from lrag_ray.store.records import RolloutId, now_utc
from lrag_ray.store.versions import versions
from lrag_ray.weights.needs import needs_of

INDEX_EVERY_S = 30.0
"""How long a finished rollout may be missing in the index."""


@dataclass(frozen=True)
class LatentsOutcome(RunOutcome):
    """How the making of a corpus ended."""

    dataset_rollouts: int
    """Rollouts of the dataset."""
    dataset_frames: int
    """Their latent frames."""
    dataset_digest: str | None
    """Of all latents; None where the start was interrupted or the dataset is empty."""


def make_latents(
    config: LatentsConfig,
    prompts: Sequence[Prompt] | None = None,
    *,
    repair: bool = False,
    listener: Listener = silent,
) -> LatentsOutcome:
    """Make a corpus to its end: rollouts, index, verification videos, card. The same call again continues.

    Errors are those of `lrag_ray.pipelines.evaluate.evaluate`.
    """
    outcome = begin(config, prompts, listener, LatentsJob, repair=repair)
    if isinstance(outcome, LatentsOutcome):
        return outcome
    return LatentsOutcome(**vars(outcome), dataset_rollouts=0, dataset_frames=0, dataset_digest=None)


class LatentsJob(EvaluateJob):
    """One start of a corpus."""

    def __init__(
        self, config: LatentsConfig, prompts: Sequence[Prompt], listener: Listener, *, repair: bool = False
    ) -> None:
        _refuse_several_forms(config)
        super().__init__(config, prompts, listener, repair=repair)
        self._corpus = config
        self._index = RunIndex(self._run, self._identity)
        self._digest: str | None = None
        shown = config.decoded(config.prompts.samples * len(prompts) * len(config.backbones) * len(config.methods))
        self._shown = set(islice(self._identity.rollouts(), shown))
        """Rollouts that get a video."""

    @property
    def kinds(self) -> Sequence[str]:
        """Rollouts and their verification videos."""
        return [RUN, DECODE]

    def do(self) -> None:
        """Rollouts, index, videos, card; only what is open."""
        with ExitStack() as cluster:
            if self._repair is not None:
                self._repair.make_again(partial(self._connect, cluster))
            self._prepare()
            # What earlier starts made with other prompts or backbones belongs to the dataset too.
            self._index = RunIndex(self._run, self._run.require())
            self._index.catch_up(self._inventory, self.warn)
            self._card().write(self.storage)
            if self._pending.tasks:
                self._connect(cluster)
                self._roll_out(self._texts.encode_prompts(self._pending.tasks))
                self.wait_until_listed(self._hidden_commits)
                self._inventory = self._run.inventory()
            if self._repair is not None:
                self._repair.compare()
            if videos := self._videos_to_make():
                self._connect(cluster)
                self.run_stage(self._decode_stage(), videos)
        with self.stage("dataset"):
            self._index.catch_up(self._inventory, self.warn)
            if self._index.writer.manifest.rollouts:
                self._digest = LatentDataset.open(self.storage.address, storage=self.storage.options).digest
            self._card().write(self.storage)

    def outcome(self, exit_code: int) -> LatentsOutcome:
        """What was made and what was not."""
        manifest = self._index.writer.manifest
        return LatentsOutcome(
            **vars(super().outcome(exit_code)),
            dataset_rollouts=manifest.rollouts,
            dataset_frames=manifest.frames,
            dataset_digest=self._digest,
        )

    def _roll_out(self, tasks: Sequence[Task[RolloutTask]]) -> None:
        marked = [
            dataclasses.replace(
                task, payload=dataclasses.replace(task.payload, decode=task.payload.rollout in self._shown)
            )
            for task in tasks
        ]
        with index_feed(self._index, self.report, INDEX_EVERY_S) as relay:
            self.run_stage(RolloutStage.of(self._run, self._config), marked, listener=relay)

    def _videos_to_make(self) -> list[Task[DecodeTask]]:
        """Commits that were made while fewer videos were asked for."""
        decoded = read_decoded(self._run)
        tasks = []
        for rollout in self._shown:
            settings = own_settings(self._identity, rollout.backbone)
            commits = self._inventory.valid_commits(rollout).values()
            missing = [c for c in commits if c.video is None and decoded.of(c, settings) is None]
            tasks += [
                Task(f"{rollout.path}/{group[-1].latent_frames}", DecodeTask(group, settings), group=rollout.backbone)
                for group in prefix_groups(missing)
            ]
        return tasks

    def _decode_stage(self) -> DecodeStage:
        config = self._config
        return DecodeStage(self.storage.address, config.storage, config.backbones, config.video, config.engine)

    def _card(self) -> DatasetCard:
        identity, config, manifest = self._run.require(), self._corpus, self._index.writer.manifest
        prompts = config.prompts
        return DatasetCard(
            origin="generated",
            licence="unknown: see the licences of the weights and of the prompts",
            seed=identity.seed,
            prompts={
                "file": PurePath(prompts.path).name if prompts.path else None,
                "ratio": prompts.ratio,
                "seed": prompts.seed,
                "limit": prompts.limit,
                "prompts": len(identity.prompts),
                "samples": identity.samples,
            },
            backbones={name: backbone.latents for name, backbone in identity.backbones.items()},
            methods={name: method.model_dump() for name, method in identity.methods.items()},
            weights=[
                WeightsSource(
                    name=need.name,
                    kind=need.kind,
                    source=need.published.source if need.published else "unknown",
                    licence=need.published.licence if need.published else "unknown",
                )
                for need in needs_of(config)
            ],
            numerics_version=identity.numerics_version,
            versions=versions(),
            form=manifest.form,
            rollouts=manifest.rollouts,
            frames=manifest.frames,
            digest=self._digest,
            updated_at=now_utc(),
        )


def _refuse_several_forms(config: LatentsConfig) -> None:
    forms = {name: (backbone.latent, backbone.dtype) for name, backbone in config.backbones.items()}
    if len(set(forms.values())) > 1:
        listed = ", ".join(f"{name} {latent.model_dump()} {dtype}" for name, (latent, dtype) in forms.items())
        raise ConfigError(
            f"backbones: their latents differ ({listed}), and a dataset has one shape. Fix: give each a run of its own"
        )


@contextmanager
def index_feed(index: RunIndex, listener: Listener, every_s: float) -> Iterator[Listener]:
    """Add rollouts to the index in the background for the time of the block, about every `every_s`.

    The yielded listener must get the events of the rollouts; it passes them on. `listener` is called in the caller's
    thread only. What cannot be written is left for the next time, and at the end for `RunIndex.catch_up`.
    """
    feed = _Feed(index, listener, every_s)
    feed.start()
    try:
        yield feed.relay
    finally:
        feed.stop()


class _Feed:
    def __init__(self, index: RunIndex, listener: Listener, every_s: float) -> None:
        self._index, self._listener, self._every_s = index, listener, every_s
        self._finished: SimpleQueue[str] = SimpleQueue()
        self._notices: SimpleQueue[str] = SimpleQueue()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="index", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()
        self._pass_notices()

    def relay(self, event: Event) -> None:
        self._pass_notices()
        if isinstance(event, TaskFinished) and event.stage == "rollouts":
            self._finished.put(event.task)
        self._listener(event)

    def _work(self) -> None:
        waiting: set[str] = set()
        while not self._ended.wait(self._every_s):
            self._add(waiting)
        # An interrupted start leaves no finished rollout out.
        self._add(waiting)

    def _add(self, waiting: set[str]) -> None:
        waiting.update(_drained(self._finished))
        try:
            rollouts = [rollout for path in sorted(waiting) if (rollout := RolloutId.at(path))]
            self._index.add(rollouts, self._notices.put)
        except StorageError as error:
            self._notices.put(f"the index of the dataset is behind, and will be brought up to date: {error}")
        else:
            waiting.clear()

    def _pass_notices(self) -> None:
        for text in _drained(self._notices):
            self._listener(Notice(text, warning=True))


def _drained(queue: SimpleQueue[str]) -> Iterator[str]:
    while True:
        try:
            yield queue.get_nowait()
        except Empty:
            return
