"""What a VBench-Long worker does with one video: keep the networks, score what is missing, commit rows as they come."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path

import pyarrow as pa
import torch

from lrag_ray.scoring.suite import KeepGoing, StoppedError, UnscorableError
from lrag_ray.scoring.vbench_long.frames import decode, probe
from lrag_ray.scoring.vbench_long.frozen import score_frozen
from lrag_ray.scoring.vbench_long.networks import BatchSizes, Networks
from lrag_ray.scoring.vbench_long.parquet import UNTRAINED, rows_from_parquet, rows_to_parquet
from lrag_ray.scoring.vbench_long.random_weights import RandomWeights
from lrag_ray.scoring.vbench_long.rows import ScoreRow
from lrag_ray.scoring.vbench_long.score import VideoSource, score_video
from lrag_ray.scoring.vbench_long.settings import VbenchSettings
from lrag_ray.store.address import Storage
from lrag_ray.store.local_copy import local_copy
from lrag_ray.store.scratch import scratch_folder
from lrag_ray.video.mp4 import VideoError


@dataclass(frozen=True)
class VbenchTask:
    """A video to score, and where its rows go."""

    path: str
    """In the storage of the videos, or on this machine where there is none."""
    name: str
    """As people see it."""
    sha256: str | None
    """Of the file as it was committed; None where that is not known."""
    video: str
    """Identity, see `ScoreRow.video`."""
    folder: str
    """Where the row files of the video are stored."""
    last_file: str
    """Name of the row file that comes last and says that all that was wanted is there."""
    durations: tuple[int, ...] = ()
    """Frame counts that are still open; empty for the whole video."""
    durations_s: tuple[float, ...] = ()
    """Instead of `durations`, where the length is not known: seconds of prefixes that count beside the whole video."""
    frozen: bool = False
    """Score the first frame, held, instead of the video."""
    flow: bool = False
    """See `VideoSource`."""


@dataclass(frozen=True)
class RowFiles:
    """How often rows are committed."""

    clips: int = 4
    """Most clips in a file."""
    seconds: float = 60.0
    """Longest time for which a worker keeps finished rows to itself."""


class VbenchWorker:
    """Scores one video at a time."""

    def __init__(
        self,
        rows: Storage,
        videos: Storage | None,
        settings: VbenchSettings,
        *,
        threads: int = 1,
        device: str = "cpu",
        files: RowFiles = RowFiles(),
    ) -> None:
        torch.set_num_threads(threads)
        self._rows, self._videos, self._settings, self._files = rows, videos, settings, files
        place = torch.device(device)
        self._networks = Networks(
            RandomWeights() if settings.untrained else settings.files,
            place,
            precision=settings.precision,
            batch=BatchSizes.for_device(place, settings.batch_frames, settings.batch_pairs),
        )

    def score(self, payload: VbenchTask, keep_going: KeepGoing) -> None:
        """Score what has no row yet. A video that cannot be read is recorded as such and then refused."""
        with scratch_folder() as scratch:
            path = Path(payload.path)
            if self._videos is not None:
                # Damage on the way or in the store is not the video's fault: it fails the attempt alone.
                path = local_copy(self._videos, payload.path, payload.sha256, scratch)
            rows = self._scored(payload, path)
            portable = (replace(row, reason=_portable(row.reason, path, payload.name)) for row in rows)
            self._commit(payload, portable, keep_going)

    def _scored(self, task: VbenchTask, path: Path) -> Iterator[ScoreRow]:
        done = {row.key for row in stored_rows(self._rows, task.folder)}
        settings = self._settings
        if task.frozen:
            score = partial(score_frozen, path, task.video)
        else:
            durations = task.durations or _prefixes(path, task.durations_s)
            score = partial(score_video, VideoSource(path, task.video, durations, task.flow))
        return score(
            self._networks,
            dimensions=settings.dimensions,
            mode=settings.mode,
            early_stop=settings.early_stop,
            done=done,
        )

    def _commit(self, task: VbenchTask, rows: Iterable[ScoreRow], keep_going: KeepGoing) -> None:
        """Write rows in files of whole clips; the last one, which may be empty, under the name that ends the task.

        When told to stop, it ends between two dimensions.
        """
        kept: list[ScoreRow] = []
        clips, since, failure = 0, time.monotonic(), ""
        for (kind, *_), clip in groupby(rows, key=lambda row: (row.kind, row.first_frame, row.frame_count)):
            for row in clip:
                kept.append(self._marked(row))
                failure = row.reason if row.kind == "failure" else failure
                if not keep_going():
                    self._keep(task, kept)
                    raise StoppedError
            clips += kind != "flow"
            if clips == self._files.clips or time.monotonic() - since >= self._files.seconds:
                self._keep(task, kept)
                kept, clips, since = [], 0, time.monotonic()
        last = f"{task.folder}/{task.last_file}"
        written = [path.rpartition("/")[2] for path in self._rows.list_files(task.folder) if path.endswith(".parquet")]
        self._rows.create(last, rows_to_parquet(kept, last, written))
        if failure:
            raise UnscorableError(failure)

    def _keep(self, task: VbenchTask, rows: Sequence[ScoreRow]) -> None:
        path = f"{task.folder}/rows-{secrets.token_hex(8)}.parquet"
        self._rows.create(path, rows_to_parquet(rows, path))

    def _marked(self, row: ScoreRow) -> ScoreRow:
        return replace(row, networks=row.networks.replace(":", f":{UNTRAINED}")) if self._settings.untrained else row


def prefix_frames(duration_s: float, fps: int) -> int:
    """Frames of a video, at its truncated rate, that belong to a shorter duration."""
    return round(duration_s * fps)


def _prefixes(path: Path, durations_s: Sequence[float]) -> tuple[int, ...]:
    """Frame counts of the prefixes and of the whole video; empty without prefixes, or for what cannot be read."""
    try:
        if not durations_s or not (fps := int(probe(path).fps)):
            return ()
        frames = sum(1 for _ in decode(path))
    except VideoError:
        # Said again, and recorded, when the video is scored.
        return ()
    return tuple(sorted({frames, *(count for s in durations_s if 0 < (count := prefix_frames(s, fps)) < frames)}))


def _portable(reason: str, path: Path, name: str) -> str:
    """A reason without the path on the worker's machine, in characters that a file can hold."""
    return reason.replace(str(path), name).encode("utf-8", "backslashreplace").decode()


def stored_rows(storage: Storage, folder: str) -> list[ScoreRow]:
    """All rows below a folder; files that are not score files are left out."""
    return [row for rows in read_row_files(storage, storage.list_files(folder)).values() for row in rows]


def read_row_files(storage: Storage, paths: Iterable[str]) -> dict[str, list[ScoreRow]]:
    """Rows by file; files that are not score files are left out."""
    found = {}
    for path, data in storage.read_many([path for path in paths if path.endswith(".parquet")]).items():
        try:
            found[path] = rows_from_parquet(data)
        except pa.ArrowException:
            # Missing from every table, where the counts show it, and scored again.
            continue
    return found
