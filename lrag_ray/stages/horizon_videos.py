"""Videos of a rollout: one decode of its latents, written to a file per horizon."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from lrag_ray.config.schema import VideoSection
from lrag_ray.store.address import Storage
from lrag_ray.store.records import FileRecord
from lrag_ray.video.decode import StreamingDecoder
from lrag_ray.video.mp4 import Mp4Writer
from lrag_ray.wan.vae import WanVae


class HorizonVideos:
    """One decode of the latents, written to a video file per horizon."""

    def __init__(self, folder: Path, vae: WanVae, horizons: Sequence[int], video: VideoSection) -> None:
        self._decoder = StreamingDecoder(vae, cold_chunk=video.cold_chunk)
        self.writers = {h: Mp4Writer(folder / f"video-{h}.mp4", fps=video.fps, crf=video.crf) for h in horizons}

    def add(self, latents: Tensor) -> None:
        """Decode the next latents [n, C, H, W], on the host, into every video that is still open."""
        frames = self._decoder.push(latents)
        for writer in self.writers.values():
            writer.write(frames)

    def finish(self, horizon: int) -> Mp4Writer:
        """Close the video of `horizon`."""
        writer = self.writers.pop(horizon)
        writer.close()
        return writer

    def abort(self) -> None:
        """Drop the videos that are still open."""
        for writer in self.writers.values():
            writer.abort()


def put_video(storage: Storage, file: Path, folder: str) -> FileRecord:
    """Store a finished video in `folder` of the run under its own name."""
    path = f"{folder}/{file.name}"
    with file.open("rb") as opened:
        sha256 = hashlib.file_digest(opened, "sha256").hexdigest()
    storage.put_file(file, path)
    return FileRecord(path=path, size_bytes=file.stat().st_size, sha256=sha256)
