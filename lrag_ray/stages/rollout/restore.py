"""Damaged files of a rollout's commits, made again in their place.

A rollout makes the same bytes every time, and the commit knows their checksum. So what is damaged is generated again
from the intact parts around it, and a file is replaced only by the very bytes that were committed: commits and all
other files stay as they are, and two drivers that do it at once write the same. What does not come out with the
recorded checksum is left as it is and reported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from lrag_ray.stages.horizon_videos import HorizonVideos
from lrag_ray.stages.rollout.joint import JointRollout
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import sha256_of
from lrag_ray.store.parts import (
    BrokenPartError,
    FinishedBlock,
    latent_bytes,
    read_part,
    trace_bytes,
    value_bytes,
)
from lrag_ray.store.records import Commit, FileRecord, LatentPart, PartRecord


@dataclass(frozen=True)
class Damaged:
    """What is to be made again of one rollout."""

    commits: tuple[Commit, ...]
    """The commits that name any of it; all of one rollout key."""
    paths: frozenset[str]
    """Their damaged files."""


@dataclass(frozen=True)
class Restored:
    """What became of it."""

    paths: tuple[str, ...]
    """Files that are whole again."""
    other_latents: tuple[int, ...]
    """Horizons in latent frames whose latents came out as others than were committed: nothing of them was written."""


class Restoration:
    """Makes the damaged files of one rollout again."""

    def __init__(
        self,
        storage: Storage,
        damaged: Damaged,
        frames_per_block: int,
        start: Callable[[], JointRollout],
        open_videos: Callable[[Sequence[int]], HorizonVideos | None],
        step: Callable[[int, str], None],
    ) -> None:
        """`start` prepares the rollout at its first block, `open_videos` a decode for some horizons, and `step` is
        told the block and what is done with it; it may raise to end the work between two blocks."""
        self._storage = storage
        self._damaged, self._n = damaged, frames_per_block
        self._start, self._open_videos, self._step = start, open_videos, step

    def run(self) -> Restored:
        """Make them again and put back those that have their recorded checksum."""
        commits = {commit.latent_frames: commit for commit in self._damaged.commits}
        parts = _distinct_parts(self._damaged.commits)
        pieces = {file.path: (part, file) for part, trace in parts for file in (part, trace)}
        pieces = {path: piece for path, piece in pieces.items() if path in self._damaged.paths}
        videos = {
            frames: commit.video
            for frames, commit in commits.items()
            if commit.video is not None and commit.video.path in self._damaged.paths
        }
        # The digest of a commit tells whether the latents are the same, and it is over all of them.
        end = max(commits) if pieces else max(videos, default=0)
        decode = self._open_videos(sorted(videos)) if videos else None
        blocks: list[FinishedBlock] = []
        other, made, digest = [], {}, hashlib.sha256()
        try:
            for block in self._blocks(self._stored(parts), end // self._n):
                blocks.append(block)
                digest.update(value_bytes(block.latents))
                frames = len(blocks) * self._n
                if decode is not None and decode.writers:
                    decode.add(block.latents)
                    if frames in videos:
                        made[frames] = decode.finish(frames).path
                if frames in commits and digest.hexdigest() != commits[frames].latents_digest:
                    other.append(frames)
        finally:
            if decode is not None:
                decode.abort()
        if other:
            return Restored((), tuple(other))
        restored = []
        for path, (part, file) in pieces.items():
            span = blocks[part.first_frame // self._n : (part.first_frame + part.frames) // self._n]
            data = latent_bytes(span) if file is part else trace_bytes(span)
            if hashlib.sha256(data).hexdigest() == file.sha256:
                self._storage.write(path, data)
                restored.append(path)
        for frames, local in made.items():
            if sha256_of(local) == videos[frames].sha256:
                self._storage.put_file(local, videos[frames].path)
                restored.append(videos[frames].path)
        return Restored(tuple(sorted(restored)), ())

    def _stored(self, parts: Sequence[tuple[LatentPart, FileRecord]]) -> dict[int, FinishedBlock]:
        """Blocks of intact parts, by index."""
        found = {}
        for latents, trace in parts:
            record = PartRecord(rollout_key="", attempt="", latents=latents, trace=trace, device_kind="")
            with suppress(BrokenPartError):
                found.update({block.block: block for block in read_part(self._storage, record, self._n).blocks})
        return found

    def _blocks(self, stored: Mapping[int, FinishedBlock], count: int) -> Iterator[FinishedBlock]:
        """Stored blocks, and generated ones in their gaps; caches are rebuilt up to the last gap."""
        last_gap = max((index for index in range(count) if index not in stored), default=-1)
        rollout = self._start() if last_gap >= 0 else None
        for index in range(count):
            self._step(index, "restoring" if index in stored else "generating")
            if index in stored:
                if rollout is not None and index < last_gap:
                    rollout.replay([stored[index]])
                yield stored[index]
            elif rollout is not None:
                ((block,),) = rollout.blocks(1)
                yield block


def _distinct_parts(commits: Sequence[Commit]) -> list[tuple[LatentPart, FileRecord]]:
    """Latent and trace files of all commits, each pair once."""
    pairs = (pair for commit in commits for pair in zip(commit.latent_parts, commit.trace_parts, strict=True))
    return list({latents.path: (latents, trace) for latents, trace in pairs}.values())
