"""One attempt at one rollout: read what is stored, rebuild or generate, decode, store parts, commit horizons.

All that it writes is stored under its own attempt; only a commit, which is created once, makes it count. Horizons that
are committed already are neither decoded nor committed again.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path

import torch

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
from lrag_ray.retrieval.similarity import HostCopy
from lrag_ray.rollout.loop import RolloutLoop
from lrag_ray.rollout.loops import loop_of
from lrag_ray.rollout.noise import KeyedNoise, NoiseVersion
from lrag_ray.rollout.types import BlockResult
from lrag_ray.stages.backbone import device_for, load_generator, load_method_weights, load_vae, weights_identity
from lrag_ray.stages.horizon_videos import HorizonVideos
from lrag_ray.stages.numerics import make_reproducible
from lrag_ray.stages.rollout.background import BackgroundThread
from lrag_ray.stages.rollout.block_writer import BlockWriter, Stopwatch
from lrag_ray.stages.rollout.restore import Damaged, Restoration, Restored
from lrag_ray.stages.spec import Host, Resources, Result, Stage, Task, WorkerState, Yielded
from lrag_ray.store.embeddings import embedding_path, read_embedding
from lrag_ray.store.identity import canonical_digest
from lrag_ray.store.parts import FinishedBlock, PartChain, read_chain
from lrag_ray.store.records import PartRecord, RolloutId
from lrag_ray.store.rollouts import Inventory, RolloutRun
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.store.shared import require_run
from lrag_ray.wan.devices import generator_kind, kernel_notes, same_kind
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
    Set up: sees the run and fixes torch's numerics; a backbone is loaded with its first rollout. Does: one rollout to
    its missing commits. Returns: `RolloutResult`, or yields between two blocks.
    """

    name = "rollouts"
    memory_use = "the history of this rollout"

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
    """Does rollouts one after the other and keeps the backbone that it loaded last."""

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
        # The engine may call this in another thread than the constructor.
        make_reproducible(self.stage.threads)
        return _Attempt(self, payload, attempt).run()

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


def read_behind(results: Iterator[BlockResult], *, behind: bool) -> Iterator[FinishedBlock]:
    """Blocks in host memory. With `behind`, one is read when the next has been launched, so that the device, whose
    times are known by then, never waits for the host."""
    waiting: list[tuple[BlockResult, HostCopy, dict[str, HostCopy]]] = []
    for result in results:
        state = {name: HostCopy(value) for name, value in result.state[0].items()}
        waiting.append((result, HostCopy(result.latents[0]), state))
        if len(waiting) > behind:
            yield _finished(*waiting.pop(0))
    for last in waiting:
        yield _finished(*last)


def _finished(result: BlockResult, latents: HostCopy, state: dict[str, HostCopy]) -> FinishedBlock:
    kept = {name: value.read() for name, value in state.items()}
    return FinishedBlock(result.block, latents.read(), result.trace[0], kept)


class _MustLeaveError(Exception):
    """The worker must go; unwinds the block loop."""


def stored_pieces(inventory: Inventory, rollout: RolloutId) -> int:
    """Parts and commits of `rollout` on storage: grows with all progress that an attempt makes."""
    return len(inventory.part_records.get(rollout.path, ())) + len(inventory.commits.get(rollout.path, {}))


class _Attempt:
    def __init__(self, worker: RolloutWorker, task: RolloutTask, attempt: str) -> None:
        self._worker, self._stage = worker, worker.stage
        self._run, self._device = worker.run, worker.device
        self._task = task
        self._id = attempt
        self._watch = Stopwatch()
        self._notes: list[str] = []
        self._blocks_done = self._stored_bytes = 0

    def run(self) -> RolloutResult | Yielded:
        began = time.perf_counter()
        task = self._task
        self._backbone = self._worker.hold(task.rollout.backbone)
        if self._backbone.fail_on_prompt is not None and self._backbone.fail_on_prompt in task.prompt:
            raise RuntimeError(f"fail_on_prompt: the prompt contains {self._backbone.fail_on_prompt!r}")
        self._n = self._backbone.sampler.frames_per_block
        dtype, head_dim = getattr(torch, self._backbone.dtype), self._backbone.transformer.head_dim
        self._device_kind = generator_kind(self._stage.engine.kernels, self._device, dtype, head_dim)
        if task.damaged is not None:
            return self._restore(task.damaged, began)
        inventory = self._run.inventory(task.rollout)
        committed = inventory.valid_commits(task.rollout)
        horizons = [horizon for horizon in task.horizons if horizon not in committed]
        if not horizons:
            return RolloutResult(made=0, units=0, seconds=time.perf_counter() - began)
        self._blocks_total = horizons[-1] // self._n
        self._report(0, "loading")
        with self._watch.measure("store"):
            chain = self._chain(inventory, horizons[-1])
        stored = [block for part in chain.parts for block in part.blocks][: self._blocks_total]
        with scratch_folder() as scratch:
            whole = self._commit_all(horizons, chain, stored, scratch)
        if not whole:
            return Yielded(f"its node is about to be taken away; it has stored {counted(self._blocks_done, 'block')}")
        generated = self._blocks_total - len(stored)
        generating_s = sum(self._watch.timings_s.get(kind, 0.0) for kind in ("denoise", "context"))
        return RolloutResult(
            made=len(horizons),
            units=self._blocks_total,
            unit_seconds=generating_s / generated if generated else 0.0,
            stored_bytes=self._stored_bytes,
            committed=tuple(horizons),
            blocks_generated=generated,
            blocks_resumed=len(stored),
            seconds=time.perf_counter() - began,
            notes=tuple(self._notes),
        )

    def _restore(self, damaged: Damaged, began: float) -> RolloutResult | Yielded:
        self._blocks_total = max(commit.latent_frames for commit in damaged.commits) // self._n

        def step(block: int, word: str) -> None:
            self._leave_if_asked()
            self._report(block, word)

        with scratch_folder() as scratch:
            open_videos = partial(self._open_videos, scratch)
            work = Restoration(self._run.storage, damaged, self._n, self._start, open_videos, step)
            try:
                restored = work.run()
            except _MustLeaveError:
                return Yielded("its node is about to be taken away; damaged files are not made again yet")
        seconds = time.perf_counter() - began
        return RolloutResult(made=0, units=self._blocks_total, seconds=seconds, restored=restored)

    def _chain(self, inventory: Inventory, end_frame: int) -> PartChain:
        """What to continue from."""
        records, broken = self._run.part_records(inventory, self._task.rollout)
        records = [record for record in records if record.rollout_key == self._task.rollout_key]
        own = [record for record in records if same_kind(record.device_kind, self._device_kind)]
        if self._stage.resume.on == "any":
            own = records
        chain = self._read_chain(own)
        foreign = [record for record in records if record not in own]
        if chain.end_frame < end_frame and max((record.end_frame for record in foreign), default=0) > chain.end_frame:
            whole = self._read_chain(records)
            if whole.end_frame >= end_frame:
                # Nothing is left to generate, so no rollout is continued on another kind of device.
                chain = whole
            else:
                kinds = ", ".join(sorted({record.device_kind for record in foreign}))
                self._notes.append(
                    f"{self._task.rollout.path}: parts made on {kinds} are left unused, this is {self._device_kind} "
                    "(resume.on: any continues from them)"
                )
        self._notes += [f"{line}: cut back to frame {chain.end_frame}" for line in [*broken, *chain.broken]]
        return chain

    def _read_chain(self, records: Sequence[PartRecord]) -> PartChain:
        key, storage = self._task.rollout_key, self._run.storage
        return read_chain(storage, records, rollout_key=key, frames_per_block=self._n)

    def _commit_all(
        self, horizons: Sequence[int], chain: PartChain, stored: Sequence[FinishedBlock], scratch: Path
    ) -> bool:
        """Make blocks, and let the writer follow behind; False if the worker must leave before the end."""
        videos = self._open_videos(scratch, horizons)
        writer = BlockWriter(
            self._run,
            self._task.rollout,
            self._task.rollout_key,
            self._id,
            self._device_kind,
            horizons=horizons,
            part_blocks=self._stage.checkpoint_every_blocks,
            fps=self._stage.video.fps,
            videos=videos,
        )
        writer.reuse(chain.parts)
        try:
            with BackgroundThread(BLOCKS_BEHIND) as background:
                try:
                    for block in self._blocks(stored):
                        background.do(writer.take, block, dict(self._watch.timings_s))
                        self._blocks_done = block.block + 1
                    whole = True
                except _MustLeaveError:
                    background.do(writer.flush)
                    whole = False
                background.finish()
        finally:
            if videos is not None:
                videos.abort()
        self._notes += writer.notes
        self._stored_bytes = writer.stored_bytes
        return whole

    def _blocks(self, stored: Sequence[FinishedBlock]) -> Iterator[FinishedBlock]:
        """Stored blocks, then generated ones; caches are rebuilt from the stored ones only if more are needed."""
        for block in stored:
            self._leave_if_asked()
            self._report(block.block, "storing")
            yield block
        left = self._blocks_total - len(stored)
        if not left:
            return
        self._leave_if_asked()
        with self._watch.measure("load"):
            rollout = self._start()
        for block, following in zip_longest(stored, stored[1:]):
            self._leave_if_asked()
            self._report(block.block, "replaying")
            with self._watch.measure("replay"):
                if following is not None:
                    rollout.expect([row.frame for row in following.trace if row.kind == "retrieved"])
                rollout.replay(block.latents[None], [[block.state]])
        self._report(len(stored), "generating")
        try:
            for block in read_behind(rollout.blocks(left), behind=self._device.type == "cuda"):
                self._watch.timings_s.update(rollout.timings_s)
                yield block
                self._report(block.block + 1, "generating")
                if block.block + 1 < self._blocks_total:
                    self._leave_if_asked()
        finally:
            # Histories grow until the end, so their notes are read last.
            self._notes += [*rollout.notes, *kernel_notes(self._stage.engine.kernels, self._device)]

    def _leave_if_asked(self) -> None:
        if self._worker.host.must_leave():
            raise _MustLeaveError

    def _start(self) -> RolloutLoop:
        task, config = self._task, self._backbone
        rows = read_embedding(self._run.storage, task.text_digest, task.prompt)
        if rows is None:
            path = embedding_path(task.text_digest, task.prompt)
            raise RuntimeError(f"{path}: the text features are missing or damaged; the next start makes them again")
        method = resolve_method(self._stage.methods[task.rollout.method])
        latent = config.latent
        shape = (latent.channels, latent.height, latent.width)
        seed, sample = self._stage.seed, task.rollout.sample
        expected = history_frames(config, method, self._blocks_total * self._n)
        return loop_of(method.policy)(
            self._worker.generator(task.weights_digest),
            config.sampler,
            method.policy,
            method.settings,
            pad_text(rows, config.transformer.text_len)[None],
            KeyedNoise(seed, [task.prompt], [sample], (self._n, *shape), self._stage.noise),
            shape,
            weights=load_method_weights(method, self._device),
            make_bank=bank_of(method.history, tiers_of(self._stage.engine.bank, expected)),
            keys=[(seed, task.prompt, sample)],
            total_blocks=self._blocks_total,
        )

    def _open_videos(self, scratch: Path, horizons: Sequence[int]) -> HorizonVideos | None:
        video = self._stage.video
        if not (video.enabled and self._task.decode):
            return None
        with self._watch.measure("load"):
            vae = self._worker.vae()
        return HorizonVideos(scratch, vae, horizons, video)

    def _report(self, blocks: int, step: str) -> None:
        self._worker.host.report(WorkerState(self._task.rollout.path, blocks, self._blocks_total, step))
