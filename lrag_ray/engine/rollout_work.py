"""One attempt at one rollout: read what is stored, rebuild or generate, decode, store parts, commit horizons.

Knows nothing of Ray. All that it writes lies under its own attempt; only a commit, which is created once, makes it
count. Horizons that are committed already are neither decoded nor committed again.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from lrag_ray.config.methods import resolve_method
from lrag_ray.config.schema import BackboneConfig, RunConfig
from lrag_ray.engine.backbone import load_generator, load_retrieval_encoder, load_vae, weights_identity
from lrag_ray.engine.horizon_videos import HorizonVideos, put_video, value_bytes
from lrag_ray.engine.progress import Step, WorkerState
from lrag_ray.engine.run_identity import versions
from lrag_ray.engine.text import embedding_path, read_embedding
from lrag_ray.errors import WeightsError
from lrag_ray.rollout.noise import KeyedNoise
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.store.identity import canonical_digest
from lrag_ray.store.parts import FinishedBlock, PartChain, StoredPart, read_chain, write_part
from lrag_ray.store.records import Commit, PartRecord, RolloutId, now_utc
from lrag_ray.store.run_dir import RunDirectory
from lrag_ray.wan.text import pad_text
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.wan.vae import WanVae


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


@dataclass(frozen=True)
class RolloutResult:
    """What an attempt did."""

    committed: tuple[int, ...]
    blocks_generated: int
    blocks_resumed: int
    """Blocks taken from stored parts."""
    seconds: float
    notes: tuple[str, ...]
    """What a person should know: broken parts that were cut off, a commit of another attempt that differs."""


class Stopwatch:
    """Seconds per kind of work."""

    def __init__(self) -> None:
        self.timings_s: dict[str, float] = {}

    @contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Add the time of the block to `kind`."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.timings_s[kind] = self.timings_s.get(kind, 0.0) + time.perf_counter() - began


class PartLedger:
    """The parts that cover a rollout from frame 0 on: stored ones that are used again, and ones written here.

    A part ends after `every` blocks and at each horizon in `horizons`.
    """

    def __init__(
        self, write: Callable[[Sequence[FinishedBlock]], PartRecord], every: int, horizons: Sequence[int]
    ) -> None:
        self.parts: list[PartRecord] = []
        self._write = write
        self._every = every
        self._horizons = set(horizons)
        self._reused: dict[int, PartRecord] = {}
        self._pending: list[FinishedBlock] = []

    def reuse(self, part: StoredPart) -> None:
        """Take a stored part as it is, unless a horizon cuts it: then its blocks are written again in other parts."""
        if not any(part.record.first_frame < horizon < part.record.end_frame for horizon in self._horizons):
            self._reused.update((block.block, part.record) for block in part.blocks)

    def add(self, block: FinishedBlock) -> None:
        """The next block, whether it was stored before or not."""
        end = (block.block + 1) * block.latents.shape[0]
        if record := self._reused.get(block.block):
            if end == record.end_frame:
                self.parts.append(record)
            return
        self._pending.append(block)
        if len(self._pending) == self._every or end in self._horizons or block.block + 1 in self._reused:
            self.parts.append(self._write(self._pending))
            self._pending = []


class RolloutWorker:
    """Does rollouts one after the other and keeps the backbone that it loaded last."""

    def __init__(
        self, run: RunDirectory, config: RunConfig, device: torch.device, tell: Callable[[WorkerState], None]
    ) -> None:
        self._run = run
        self._config = config
        self._device = device
        self._tell = tell
        self._backbone_name = ""
        self._transformer: CausalWanTransformer | None = None
        self._vae: WanVae | None = None

    def work(self, task: RolloutTask, attempt: str) -> RolloutResult:
        """Bring every missing horizon of a rollout to a commit."""
        return _Attempt(self, task, attempt).run()

    def hold(self, name: str) -> BackboneConfig:
        """Let go of another backbone than `name`, so that two never lie in memory."""
        if name != self._backbone_name:
            self._backbone_name, self._transformer, self._vae = name, None, None
        return self._config.backbones[name]

    def generator(self, weights_digest: str) -> CausalWanTransformer:
        """Transformer of the held backbone. WeightsError where this node's weights are not the run's."""
        if self._transformer is None:
            config = self._config.backbones[self._backbone_name]
            if canonical_digest(weights_identity(config.weights)) != weights_digest:
                raise WeightsError(
                    f"backbones.{self._backbone_name}.weights: the files on node {platform.node()} are not those that "
                    "the run was started with. Mend: put the same files on every node"
                )
            self._transformer = load_generator(config, self._device)
        return self._transformer

    def vae(self) -> WanVae:
        """VAE of the held backbone."""
        if self._vae is None:
            self._vae = load_vae(self._config.backbones[self._backbone_name], self._device)
        return self._vae


class _Attempt:
    def __init__(self, worker: RolloutWorker, task: RolloutTask, attempt: str) -> None:
        self._worker = worker
        self._run, self._config, self._device = worker._run, worker._config, worker._device
        self._task = task
        self._id = attempt
        self._folder = f"{task.rollout.path}/attempt-{attempt}"
        self._device_kind = torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "cpu"
        self._watch = Stopwatch()
        self._notes: list[str] = []
        self._digest = hashlib.sha256()

    def run(self) -> RolloutResult:
        began = time.perf_counter()
        task = self._task
        self._backbone = self._worker.hold(task.rollout.backbone)
        if self._backbone.fail_on_prompt is not None and self._backbone.fail_on_prompt in task.prompt:
            raise RuntimeError(f"fail_on_prompt: the prompt contains {self._backbone.fail_on_prompt!r}")
        inventory = self._run.inventory(task.rollout)
        committed = inventory.valid_commits(task.rollout)
        horizons = [horizon for horizon in task.horizons if horizon not in committed]
        if not horizons:
            return RolloutResult((), 0, 0, time.perf_counter() - began, ())
        self._n = self._backbone.sampler.frames_per_block
        self._blocks_total = horizons[-1] // self._n
        self._tell(0, "loading")
        with self._watch.measure("store"):
            records, broken = self._run.part_records(inventory, task.rollout)
            chain = read_chain(self._run.storage, records, rollout_key=task.rollout_key, frames_per_block=self._n)
        self._notes += [f"{line}: cut back to frame {chain.end_frame}" for line in [*broken, *chain.broken]]
        stored = [block for part in chain.parts for block in part.blocks][: self._blocks_total]
        with tempfile.TemporaryDirectory(prefix="lrag-") as scratch:
            self._commit_all(horizons, chain, stored, Path(scratch))
        return RolloutResult(
            committed=tuple(horizons),
            blocks_generated=self._blocks_total - len(stored),
            blocks_resumed=len(stored),
            seconds=time.perf_counter() - began,
            notes=tuple(self._notes),
        )

    def _commit_all(
        self, horizons: Sequence[int], chain: PartChain, stored: Sequence[FinishedBlock], scratch: Path
    ) -> None:
        ledger = PartLedger(self._write_part, self._config.engine.checkpoint_every_blocks, horizons)
        for part in chain.parts:
            ledger.reuse(part)
        videos = self._open_videos(scratch, horizons)
        try:
            for block in self._blocks(stored):
                self._digest.update(value_bytes(block.latents))
                with self._watch.measure("store"):
                    ledger.add(block)
                if videos is not None:
                    with self._watch.measure("decode"):
                        videos.add(block.latents.to(self._device))
                end = (block.block + 1) * self._n
                if end in horizons:
                    self._commit(end, ledger.parts, videos)
        finally:
            if videos is not None:
                videos.abort()

    def _blocks(self, stored: Sequence[FinishedBlock]) -> Iterator[FinishedBlock]:
        """Stored blocks, then generated ones; caches are rebuilt from the stored ones only if more are needed."""
        for block in stored:
            self._tell(block.block, "storing")
            yield block
        left = self._blocks_total - len(stored)
        if not left:
            return
        with self._watch.measure("load"):
            rollout = self._start()
        if stored:
            self._tell(len(stored), "replaying")
            with self._watch.measure("replay"):
                rollout.replay(torch.cat([block.latents for block in stored])[None], [[b.state] for b in stored])
        self._tell(len(stored), "generating")
        for result in rollout.blocks(left):
            self._watch.timings_s.update(rollout.timings_s)
            state = {name: value.cpu() for name, value in result.state[0].items()}
            yield FinishedBlock(result.block, result.latents[0].cpu(), result.trace[0], state)
            self._tell(result.block + 1, "generating")

    def _start(self) -> Rollout:
        task, config = self._task, self._backbone
        rows = read_embedding(self._run.storage, task.text_digest, task.prompt)
        if rows is None:
            path = embedding_path(task.text_digest, task.prompt)
            raise RuntimeError(f"{path}: the text features are missing or damaged; the next start makes them again")
        method = resolve_method(self._config.methods[task.rollout.method])
        latent = config.latent
        shape = (latent.channels, latent.height, latent.width)
        seed, sample = self._config.run.seed, task.rollout.sample
        return Rollout(
            self._worker.generator(task.weights_digest),
            config.sampler,
            method.policy,
            method.settings,
            pad_text(rows, config.transformer.text_len)[None],
            KeyedNoise(seed, [task.prompt], [sample], (self._n, *shape)),
            shape,
            encoder=load_retrieval_encoder(method, self._device),
            keys=[(seed, task.prompt, sample)],
        )

    def _open_videos(self, scratch: Path, horizons: Sequence[int]) -> HorizonVideos | None:
        video = self._config.video
        if not video.enabled:
            return None
        with self._watch.measure("load"):
            vae = self._worker.vae()
        return HorizonVideos(scratch, vae, horizons, video)

    def _write_part(self, blocks: Sequence[FinishedBlock]) -> PartRecord:
        return write_part(
            self._run.storage,
            self._folder,
            blocks,
            rollout_key=self._task.rollout_key,
            device_kind=self._device_kind,
        )

    def _commit(self, horizon: int, parts: Sequence[PartRecord], videos: HorizonVideos | None) -> None:
        video, video_frames = None, 0
        with self._watch.measure("store"):
            if videos is not None:
                writer = videos.finish(horizon)
                video, video_frames = put_video(self._run.storage, writer.path, self._folder), writer.frames
        record = Commit(
            rollout=self._task.rollout,
            rollout_key=self._task.rollout_key,
            latent_frames=horizon,
            attempt=self._id,
            latent_parts=[part.latents for part in parts],
            trace_parts=[part.trace for part in parts],
            video=video,
            video_frames=video_frames,
            fps=self._config.video.fps,
            latents_digest=self._digest.hexdigest(),
            device_kind=self._device_kind,
            versions=versions(),
            timings_s={kind: round(seconds, 4) for kind, seconds in sorted(self._watch.timings_s.items())},
            created_at=now_utc(),
        )
        if not self._run.commit(record):
            self._compare_with_winner(record)

    def _compare_with_winner(self, record: Commit) -> None:
        """Another attempt committed first and stands; say so if it found other latents."""
        winner = self._run.inventory(record.rollout).valid_commits(record.rollout).get(record.latent_frames)
        if winner is not None and winner.latents_digest != record.latents_digest:
            self._notes.append(
                f"{record.rollout.path}: attempt {winner.attempt} ({winner.device_kind}) committed other latents for "
                f"{record.latent_frames} frames than attempt {record.attempt} ({record.device_kind}) made"
            )

    def _tell(self, blocks: int, step: Step) -> None:
        self._worker._tell(WorkerState(self._task.rollout, blocks, self._blocks_total, step))
