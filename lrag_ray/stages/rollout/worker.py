"""One attempt at one rollout: read what is stored, rebuild or generate, decode, store parts, commit horizons.

All that it writes is stored under its own attempt; only a commit, which is created once, makes it count. Horizons that
are committed already are neither decoded nor committed again.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch
from torch import Tensor

from lrag_ray.config.histories import history_frames, tiers_of
from lrag_ray.config.methods import resolve_method
from lrag_ray.config.schema import (
    BackboneConfig,
    EngineSection,
    MethodConfig,
    ResumeSection,
    RunConfig,
    StorageSection,
    VideoSection,
)
from lrag_ray.context.policy import bank_of
from lrag_ray.errors import WeightsError
from lrag_ray.printable import counted
from lrag_ray.rollout.loops import loop_of
from lrag_ray.rollout.noise import KeyedNoise, NoiseVersion
from lrag_ray.stages.backbone import device_for, load_generator, load_method_weights, load_vae, weights_identity
from lrag_ray.stages.horizon_videos import HorizonVideos
from lrag_ray.stages.numerics import make_reproducible
from lrag_ray.stages.rollout.background import BackgroundThread
from lrag_ray.stages.rollout.begun import BegunRollout
from lrag_ray.stages.rollout.block_writer import BlockWriter, Stopwatch
from lrag_ray.stages.rollout.joint import JointRollout, filled, placed
from lrag_ray.stages.rollout.restore import Damaged, Restoration, Restored
from lrag_ray.stages.spec import Host, Parted, Resources, Result, Stage, Task, WorkerState, Yielded
from lrag_ray.store.embeddings import embedding_path, read_embedding
from lrag_ray.store.identity import canonical_digest
from lrag_ray.store.parts import FinishedBlock, StoredPart
from lrag_ray.store.records import RolloutId
from lrag_ray.store.rollouts import Inventory, RolloutRun
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.store.shared import require_run
from lrag_ray.wan import fp8, norm_silu
from lrag_ray.wan.devices import generator_kind, kernel_notes, row_kind, row_of
from lrag_ray.wan.text import pad_text
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.vae import WanVae

BLOCKS_BEHIND = 2
"""Blocks that may wait to be decoded and stored, or be at it, while the next one is generated."""


@dataclass(frozen=True)
class RolloutTask:
    """What the driver asks for."""

    rollout: RolloutId
    rollout_key: str
    prompt: str
    text_digest: str
    weights_digest: str
    """Of the transformer's weights as the driver sees them: another node must not have other files."""
    horizons: tuple[int, ...]
    """Horizons in latent frames that have no commit yet, ascending."""
    damaged: Damaged | None = None
    """Files of commits to make again in their place, instead of making commits."""
    decode: bool = True
    """Whether its videos are made, where the run makes any."""


@dataclass(frozen=True)
class RolloutStage(Stage[RolloutTask]):
    """Rollouts of a run.

    Needs `engine.cpus_per_actor` CPUs, `engine.gpus_per_actor` GPUs, and host memory for the history of each rollout.
    Set up: sees the run and fixes torch's numerics; a backbone is loaded with its first rollout. Does: one rollout,
    or as many as a pass has rows, to their missing commits. Returns: `RolloutResult`, or yields between two blocks.
    """

    name = "rollouts"
    memory_use = "the history in its actor"

    uri: str
    """Address of the run, credentials included: never shown."""
    storage: StorageSection
    created_at: str
    """Of the run: a worker that does not find it at the address sees other storage."""
    seed: int
    noise: NoiseVersion
    """Of the run as it was begun."""
    backbones: Mapping[str, BackboneConfig]
    methods: Mapping[str, MethodConfig]
    video: VideoSection
    resume: ResumeSection
    engine: EngineSection

    @classmethod
    def of(cls, run: RolloutRun, config: RunConfig) -> RolloutStage:
        """The stage of a run with these settings; `run` exists already."""
        identity = run.require()
        return cls(
            uri=run.storage.address,
            storage=config.storage,
            created_at=identity.created_at,
            seed=config.run.seed,
            noise=identity.noise,
            backbones=config.backbones,
            methods=config.methods,
            video=config.video,
            resume=config.resume,
            engine=config.engine,
        )

    @property
    def resources(self) -> Resources:
        """As the engine section says."""
        return Resources(self.engine.cpus_per_actor, self.engine.gpus_per_actor)

    @property
    def threads(self) -> int:
        """Torch threads of a worker."""
        return self.engine.threads_per_actor

    @property
    def checkpoint_every_blocks(self) -> int:
        """Blocks per latent part."""
        return self.engine.checkpoint_every_blocks

    @property
    def tasks_at_once(self) -> int:
        """Rows of a pass."""
        return self.engine.prompts_per_pass

    def open(self, host: Host) -> RolloutWorker:
        """StorageError where this node does not see the run."""
        return RolloutWorker(self, host)

    def progress(self, task: Task[RolloutTask]) -> int:
        """Parts and commits on storage."""
        rollout = task.payload.rollout
        return stored_pieces(RolloutRun(self.uri, self.storage).inventory(rollout), rollout)


@dataclass(frozen=True)
class RolloutResult(Result):
    """What an attempt did; `made` counts commits and `units` blocks."""

    committed: tuple[int, ...] = ()
    """Horizons in latent frames."""
    blocks_generated: int = 0
    blocks_resumed: int = 0
    """Blocks taken from stored parts."""
    restored: Restored | None = None
    """Of a task with damaged files."""


class RolloutWorker:
    """Does rollouts one after the other, or a few at a time, and keeps the backbone that it loaded last."""

    def __init__(self, stage: RolloutStage, host: Host) -> None:
        self.stage = stage
        self.host = host
        self.run = RolloutRun(stage.uri, stage.storage)
        require_run(self.run, stage.created_at)
        make_reproducible(stage.threads)
        self.device = device_for(stage.resources.gpus)
        self._backbone_name = ""
        self._transformer: CausalWanTransformer | None = None
        self._vae: WanVae | None = None

    def work(self, payload: RolloutTask, attempt: str) -> RolloutResult | Yielded:
        """Bring every missing horizon of a rollout to a commit, or yield."""
        (outcome,) = self.work_together([payload], [attempt])
        assert not isinstance(outcome, Parted), "there is no other"
        return outcome

    def work_together(
        self, payloads: Sequence[RolloutTask], attempts: Sequence[str]
    ) -> list[RolloutResult | Yielded | Parted]:
        """The same for rollouts of one backbone, method and length, in passes of `engine.prompts_per_pass` rows."""
        # The engine may call this in another thread than the constructor.
        make_reproducible(self.stage.threads)
        return _Attempt(self, payloads, attempts).run()

    def hold(self, name: str) -> BackboneConfig:
        """Release any backbone other than `name`, so that two are never in memory."""
        if name != self._backbone_name:
            self._backbone_name, self._transformer, self._vae = name, None, None
        return self.stage.backbones[name]

    def generator(self, weights_digest: str) -> CausalWanTransformer:
        """Transformer of the held backbone. WeightsError where this node's weights are not the run's."""
        if self._transformer is None:
            config = self.stage.backbones[self._backbone_name]
            if canonical_digest(weights_identity(config.weights)) != weights_digest:
                raise WeightsError(
                    f"backbones.{self._backbone_name}.weights: the files on node {platform.node()} are not those that "
                    "the run was started with. Put the same files on every node"
                )
            self._transformer = load_generator(config, self.device, self.stage.engine.kernels)
        return self._transformer

    def vae(self) -> WanVae:
        """VAE of the held backbone."""
        if self._vae is None:
            self._vae = load_vae(self.stage.backbones[self._backbone_name], self.device)
        return self._vae


class _MustLeaveError(Exception):
    """The worker must go; unwinds the block loop."""


def stored_pieces(inventory: Inventory, rollout: RolloutId) -> int:
    """Parts and commits of `rollout` on storage: grows with all progress that an attempt makes."""
    return len(inventory.part_records.get(rollout.path, ())) + len(inventory.commits.get(rollout.path, {}))


@dataclass
class _Element:
    """One of the rollouts that an attempt makes together."""

    task: RolloutTask
    attempt: str
    horizons: Sequence[int]
    """Those without a commit, ascending."""
    row: int
    device_kind: str
    parts: Sequence[StoredPart]
    """What it continues from."""
    stored: Sequence[FinishedBlock]
    """Their blocks."""
    notes: list[str]
    blocks_done: int = 0
    stored_bytes: int = 0


class _Attempt:
    """Rollouts of one backbone, method and length, as rows of the same passes."""

    def __init__(self, worker: RolloutWorker, tasks: Sequence[RolloutTask], attempts: Sequence[str]) -> None:
        self._worker, self._stage = worker, worker.stage
        self._run, self._device = worker.run, worker.device
        self._tasks, self._ids = tasks, attempts
        self._size = self._stage.engine.prompts_per_pass
        self._watch = Stopwatch()
        self._blocks_total = self._generated = 0
        self._sharing = len(tasks)
        """Rollouts that share the time that is spent."""

    def run(self) -> list[RolloutResult | Yielded | Parted]:
        began = time.perf_counter()
        self._backbone = self._worker.hold(self._tasks[0].rollout.backbone)
        fails_on = self._backbone.fail_on_prompt
        if fails_on is not None and any(fails_on in task.prompt for task in self._tasks):
            raise RuntimeError(f"fail_on_prompt: the prompt contains {fails_on!r}")
        self._n = self._backbone.sampler.frames_per_block
        dtype, head_dim = getattr(torch, self._backbone.dtype), self._backbone.transformer.head_dim
        kernels = self._stage.engine.kernels
        self._kinds = [
            row_kind(generator_kind(kernels, self._device, dtype, head_dim), row, self._size)
            for row in range(self._size)
        ]
        if (damaged := self._tasks[0].damaged) is not None:
            return [self._restore(self._tasks[0], damaged, began)]
        elements, outcomes = self._elements()
        with scratch_folder() as scratch:
            whole = not elements or self._commit_all(list(elements.values()), scratch)
        for i, element in elements.items():
            done = whole or element.blocks_done == self._blocks_total
            outcomes[i] = self._result(element) if done else self._left(element)
        spent = time.perf_counter() - began
        return [
            replace(outcome, seconds=spent) if isinstance(outcome, RolloutResult) else outcome
            for _, outcome in sorted(outcomes.items())
        ]

    def _result(self, element: _Element) -> RolloutResult:
        generated = self._blocks_total - len(element.stored)
        generating_s = sum(self._watch.timings_s.get(kind, 0.0) for kind in ("denoise", "context"))
        return RolloutResult(
            made=len(element.horizons),
            units=self._blocks_total,
            unit_seconds=generating_s / self._generated / self._sharing if generated else 0.0,
            stored_bytes=element.stored_bytes,
            committed=tuple(element.horizons),
            blocks_generated=generated,
            blocks_resumed=len(element.stored),
            notes=tuple(element.notes),
        )

    def _left(self, element: _Element) -> Yielded:
        return Yielded(f"its node is about to be taken away; it has stored {counted(element.blocks_done, 'block')}")

    def _restore(self, task: RolloutTask, damaged: Damaged, began: float) -> RolloutResult | Yielded:
        self._blocks_total = max(commit.latent_frames for commit in damaged.commits) // self._n

        def step(block: int, word: str) -> None:
            self._leave_if_asked()
            self._report(block, word)

        row = row_of(damaged.commits[-1].device_kind, self._size)
        with scratch_folder() as scratch:
            open_videos = partial(self._open_videos, scratch, task)
            start = partial(self._start, [task], [row])
            work = Restoration(self._run.storage, damaged, self._n, start, open_videos, step)
            try:
                restored = work.run()
            except _MustLeaveError:
                return Yielded("its node is about to be taken away; damaged files are not made again yet")
        seconds = time.perf_counter() - began
        return RolloutResult(made=0, units=self._blocks_total, seconds=seconds, restored=restored)

    def _elements(self) -> tuple[dict[int, _Element], dict[int, RolloutResult | Yielded | Parted]]:
        """Those with something left to do, by their place among the tasks, and what becomes of the others."""
        open_: dict[int, tuple[list[int], BegunRollout]] = {}
        outcomes: dict[int, RolloutResult | Yielded | Parted] = {}
        for i, task in enumerate(self._tasks):
            inventory = self._run.inventory(task.rollout)
            committed = inventory.valid_commits(task.rollout)
            horizons = [horizon for horizon in task.horizons if horizon not in committed]
            if not horizons:
                outcomes[i] = RolloutResult(made=0, units=0)
                continue
            if not open_:
                self._blocks_total = horizons[-1] // self._n
                self._report(0, "loading")
            elif horizons[-1] // self._n != self._blocks_total:
                outcomes[i] = Parted(f"it ends elsewhere than {self._tasks[min(open_)].rollout.path}")
                continue
            with self._watch.measure("store"):
                begun = BegunRollout.look(self._run, inventory, task.rollout, task.rollout_key, self._n)
            open_[i] = horizons, begun
        found: dict[int, _Element] = {}
        on_any = self._stage.resume.on == "any"
        rows = placed([begun.best_of(self._kinds) for _, begun in open_.values()], self._size)
        for (i, (horizons, begun)), row in zip(open_.items(), rows, strict=True):
            if row is None:
                outcomes[i] = Parted("it was begun in the same row of a pass as another rollout")
                continue
            kind = self._kinds[row]
            with self._watch.measure("store"):
                chain, notes = begun.chain(kind, horizons[-1], on_any=on_any)
            stored = [block for part in chain.parts for block in part.blocks][: self._blocks_total]
            if on_any and found and len(stored) != len(found[min(found)].stored):
                # Blocks that another kind of device made do not come out the same beside one that is behind.
                outcomes[i] = Parted("it continues from another block than the rollout beside it")
                continue
            found[i] = _Element(self._tasks[i], self._ids[i], horizons, row, kind, chain.parts, stored, notes)
        return found, outcomes

    def _commit_all(self, elements: Sequence[_Element], scratch: Path) -> bool:
        """Make blocks, and let the writers follow behind; False if the worker must leave before the end."""
        opened: list[HorizonVideos] = []
        writers: dict[str, BlockWriter] = {}
        try:
            for element in elements:
                folder = scratch / element.attempt
                folder.mkdir()
                videos = self._open_videos(folder, element.task, element.horizons)
                opened += [videos] if videos is not None else []
                writers[element.attempt] = writer = BlockWriter(
                    self._run,
                    element.task.rollout,
                    element.task.rollout_key,
                    element.attempt,
                    element.device_kind,
                    horizons=element.horizons,
                    part_blocks=self._stage.checkpoint_every_blocks,
                    fps=self._stage.video.fps,
                    videos=videos,
                )
                writer.reuse(element.parts)
            with BackgroundThread(BLOCKS_BEHIND * len(elements)) as background:
                whole = True
                try:
                    for element, block in self._blocks(elements):
                        shares = {kind: spent / self._sharing for kind, spent in self._watch.timings_s.items()}
                        background.do(writers[element.attempt].take, block, shares)
                        element.blocks_done = block.block + 1
                except _MustLeaveError:
                    for writer in writers.values():
                        background.do(writer.flush)
                    whole = False
                background.finish()
        finally:
            for videos in opened:
                videos.abort()
        for element in elements:
            element.notes += writers[element.attempt].notes
            element.stored_bytes = writers[element.attempt].stored_bytes
        return whole

    def _blocks(self, elements: Sequence[_Element]) -> Iterator[tuple[_Element, FinishedBlock]]:
        """Stored blocks, then generated ones; caches are rebuilt from the stored ones only if more are needed."""
        for element in elements:
            for block in element.stored:
                self._leave_if_asked()
                self._report(block.block, "storing")
                yield element, block
        unfinished = [element for element in elements if len(element.stored) < self._blocks_total]
        if not unfinished:
            return
        self._leave_if_asked()
        self._sharing = len(unfinished)
        with self._watch.measure("load"):
            rollout = self._start([element.task for element in unfinished], [element.row for element in unfinished])
        # A row that is ahead of another makes its next blocks once more, which takes no longer than waiting.
        common = min(len(element.stored) for element in unfinished)
        stored = list(zip(*(element.stored[:common] for element in unfinished), strict=True))
        for blocks, following in zip_longest(stored, stored[1:]):
            self._leave_if_asked()
            self._report(blocks[0].block, "replaying")
            with self._watch.measure("replay"):
                if following is not None:
                    rollout.expect(following)
                rollout.replay(blocks)
        self._report(common, "generating")
        self._generated = self._blocks_total - common
        try:
            for blocks in rollout.blocks(self._generated, behind=self._device.type == "cuda"):
                self._watch.timings_s.update(rollout.loop.timings_s)
                done = blocks[0].block + 1
                for element, block in zip(unfinished, blocks, strict=True):
                    if block.block >= len(element.stored):
                        yield element, block
                self._report(done, "generating")
                if done < self._blocks_total:
                    self._leave_if_asked()
        finally:
            # Histories grow until the end, so their notes are read last.
            notes = [*rollout.loop.notes, *kernel_notes(self._stage.engine.kernels, self._device)]
            notes += fp8.notes(self._backbone.products, self._device)
            if self._stage.video.enabled and self._tasks[0].decode:
                notes += norm_silu.notes(self._backbone.vae.fused_norm, self._device)
            unfinished[0].notes += dict.fromkeys(notes)

    def _leave_if_asked(self) -> None:
        if self._worker.host.must_leave():
            raise _MustLeaveError

    def _start(self, tasks: Sequence[RolloutTask], rows: Sequence[int]) -> JointRollout:
        config = self._backbone
        by_row = [tasks[i] for i in filled(rows, self._size)]
        method = resolve_method(self._stage.methods[tasks[0].rollout.method])
        latent = config.latent
        shape = (latent.channels, latent.height, latent.width)
        seed, prompts = self._stage.seed, [task.prompt for task in by_row]
        samples = [task.rollout.sample for task in by_row]
        expected = history_frames(config, method, self._blocks_total * self._n)
        loop = loop_of(method.policy)(
            self._worker.generator(tasks[0].weights_digest),
            config.sampler,
            method.policy,
            method.settings,
            torch.stack([self._text_features(task) for task in by_row]),
            KeyedNoise(seed, prompts, samples, (self._n, *shape), self._stage.noise),
            shape,
            weights=load_method_weights(method, self._device),
            make_bank=bank_of(method.history, tiers_of(self._stage.engine.bank, expected)),
            keys=[(seed, prompt, sample) for prompt, sample in zip(prompts, samples, strict=True)],
            total_blocks=self._blocks_total,
        )
        return JointRollout(loop, rows, self._size)

    def _text_features(self, task: RolloutTask) -> Tensor:
        rows = read_embedding(self._run.storage, task.text_digest, task.prompt)
        if rows is None:
            path = embedding_path(task.text_digest, task.prompt)
            raise RuntimeError(f"{path}: the text features are missing or damaged; the next start makes them again")
        return pad_text(rows, self._backbone.transformer.text_len)

    def _open_videos(self, scratch: Path, task: RolloutTask, horizons: Sequence[int]) -> HorizonVideos | None:
        video = self._stage.video
        if not (video.enabled and task.decode):
            return None
        with self._watch.measure("load"):
            vae = self._worker.vae()
        return HorizonVideos(scratch, vae, horizons, video)

    def _report(self, blocks: int, step: str) -> None:
        self._worker.host.report(WorkerState(self._tasks[0].rollout.path, blocks, self._blocks_total, step))
