"""What becomes of finished blocks: parts, videos, and a commit at each horizon, in this order."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from lrag_ray.errors import StorageError
from lrag_ray.stages.horizon_videos import HorizonVideos, put_video
from lrag_ray.store.parts import FinishedBlock, StoredPart, value_bytes, write_part
from lrag_ray.store.records import Commit, PartRecord, RolloutId, now_utc
from lrag_ray.store.rollouts import RolloutRun
from lrag_ray.store.versions import versions


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
            self.flush()

    def flush(self) -> None:
        """Write the open part, however short."""
        if self._pending:
            self.parts.append(self._write(self._pending))
            self._pending = []


class BlockWriter:
    """Takes the blocks of one attempt in order; may do so in another thread than the one that makes them."""

    def __init__(
        self,
        run: RolloutRun,
        rollout: RolloutId,
        rollout_key: str,
        attempt: str,
        device_kind: str,
        *,
        horizons: Sequence[int],
        part_blocks: int,
        fps: int,
        videos: HorizonVideos | None,
    ) -> None:
        """`horizons` are committed when they are reached; a part ends after `part_blocks` blocks."""
        self.notes: list[str] = []
        """What a person should know."""
        self.stored_bytes = 0
        """Bytes of the parts and videos written so far."""
        self._run = run
        self._rollout, self._rollout_key, self._attempt = rollout, rollout_key, attempt
        self._folder = f"{rollout.path}/attempt-{attempt}"
        self._device_kind = device_kind
        self._horizons = set(horizons)
        self._ledger = PartLedger(self._write_part, part_blocks, horizons)
        self._fps = fps
        self._videos = videos
        self._digest = hashlib.sha256()
        self._watch = Stopwatch()

    def reuse(self, parts: Sequence[StoredPart]) -> None:
        """Parts of earlier attempts that need not be written again; `take` is given their blocks all the same."""
        for part in parts:
            self._ledger.reuse(part)

    def take(self, block: FinishedBlock, timings_s: Mapping[str, float]) -> None:
        """Store, decode and, at a horizon, commit; `timings_s` is what was spent on making the blocks so far."""
        self._digest.update(value_bytes(block.latents))
        with self._watch.measure("store"):
            self._ledger.add(block)
        if self._videos is not None:
            with self._watch.measure("decode"):
                self._videos.add(block.latents)
        end = (block.block + 1) * block.latents.shape[0]
        if end in self._horizons:
            self._commit(end, timings_s)

    def flush(self) -> None:
        """Write what belongs to no part yet."""
        self._ledger.flush()

    def _write_part(self, blocks: Sequence[FinishedBlock]) -> PartRecord:
        part = write_part(
            self._run.storage, self._folder, blocks, rollout_key=self._rollout_key, device_kind=self._device_kind
        )
        self.stored_bytes += part.latents.size_bytes + part.trace.size_bytes
        return part

    def _commit(self, horizon: int, timings_s: Mapping[str, float]) -> None:
        video, video_frames = None, 0
        with self._watch.measure("store"):
            if self._videos is not None:
                writer = self._videos.finish(horizon)
                video, video_frames = put_video(self._run.storage, writer.path, self._folder), writer.frames
                self.stored_bytes += video.size_bytes
        own = self._watch.timings_s
        record = Commit(
            rollout=self._rollout,
            rollout_key=self._rollout_key,
            latent_frames=horizon,
            attempt=self._attempt,
            latent_parts=[part.latents for part in self._ledger.parts],
            trace_parts=[part.trace for part in self._ledger.parts],
            video=video,
            video_frames=video_frames,
            fps=self._fps,
            latents_digest=self._digest.hexdigest(),
            device_kind=self._device_kind,
            versions=versions(),
            timings_s={
                kind: round(timings_s.get(kind, 0.0) + own.get(kind, 0.0), 4) for kind in sorted({*timings_s, *own})
            },
            created_at=now_utc(),
        )
        if not self._run.commit(record):
            self._compare_with_winner(record)

    def _compare_with_winner(self, record: Commit) -> None:
        """Another attempt committed first and stands; say so if it found other latents."""
        winner = self._run.inventory(record.rollout).valid_commits(record.rollout).get(record.latent_frames)
        if winner is None:
            raise StorageError(
                f"{self._run.uri}/{record.rollout.path} has a commit for {record.latent_frames} frames that does not "
                "count, so this one cannot be made. The next start sets it aside and makes it again from the parts"
            )
        if winner.latents_digest != record.latents_digest:
            self.notes.append(
                f"{record.rollout.path}: attempt {winner.attempt} ({winner.device_kind}) committed other latents for "
                f"{record.latent_frames} frames than attempt {record.attempt} ({record.device_kind}) made"
            )
