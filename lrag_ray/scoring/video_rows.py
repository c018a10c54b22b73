"""Score files: one parquet row per video and suite, named so that finding what is not yet scored needs no reading.

``scores/<suite>/<version>/<backbone>/<method>/<prompt_id>-<sample>/<latent_frames>-<video sha256, 16 digits>.parquet``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import pyarrow as pa

from lrag_ray.scoring.measure import Measure
from lrag_ray.store.parquet import read_parquet, write_parquet


class StoredAs(Protocol):
    """What the files depend on of a suite."""

    @property
    def folder(self) -> str:
        """Where its files are, relative to the run."""

    @property
    def measures(self) -> Sequence[Measure]:
        """Its columns."""

    @property
    def unranked(self) -> Sequence[Measure]:
        """Further columns, which older files may lack."""


@dataclass(frozen=True)
class ScoreTarget:
    """A video at a duration, before it is scored."""

    rollout_path: str
    """``rollouts/<backbone>/<method>/<prompt_id>-<sample>``."""
    backbone: str
    method: str
    prompt_id: str
    sample: int
    latent_frames: int
    """The duration."""
    video_path: str
    """Relative to the run; may be longer than the duration."""
    video_sha256: str
    video_frames: int
    """Frames from the start of the video that belong to the duration."""
    fps: int
    frames_per_block: int = 0
    """Latent frames of a block, 0 where not known; like `cold_chunk` not in score files, since the run knows it."""
    cold_chunk: int | None = None
    """Latent frames of the chunks that were decoded like new videos."""
    prompt: str = ""
    """Its text, for suites that compare with it; not in score files either."""

    def score_path(self, suite: StoredAs) -> str:
        """Where its score file is, relative to the run."""
        folder = self.rollout_path.removeprefix("rollouts/")
        return f"{suite.folder}/{folder}/{self.latent_frames}-{self.video_sha256[:16]}.parquet"


@dataclass(frozen=True)
class VideoRow:
    """The result for one target: values, or the reason why there are none."""

    target: ScoreTarget
    values: Mapping[str, float]
    """By measure name; empty where the video could not be scored."""
    reason: str | None
    """Why not, or None."""
    versions: str
    """Program versions that computed it."""
    scored_at: str
    """UTC, ISO 8601."""


_TARGET_COLUMNS: dict[str, pa.DataType] = {
    "rollout_path": pa.string(),
    "backbone": pa.string(),
    "method": pa.string(),
    "prompt_id": pa.string(),
    "sample": pa.int32(),
    "latent_frames": pa.int32(),
    "video_path": pa.string(),
    "video_sha256": pa.string(),
    "video_frames": pa.int32(),
    "fps": pa.int32(),
}
_RESULT_COLUMNS = {"reason": pa.string(), "versions": pa.string(), "scored_at": pa.string()}


def to_table(rows: Sequence[VideoRow], suite: StoredAs) -> pa.Table:
    """Rows as a table: target, reason and provenance, and a float64 column per measure (null where failed)."""
    columns: dict[str, list[object]] = {name: [getattr(row.target, name) for row in rows] for name in _TARGET_COLUMNS}
    columns |= {name: [getattr(row, name) for row in rows] for name in _RESULT_COLUMNS}
    columns |= {measure.name: [row.values.get(measure.name) for row in rows] for measure in _measures(suite)}
    return pa.table(columns, schema=_schema(suite))


def to_parquet(rows: Sequence[VideoRow], suite: StoredAs, path: str = "") -> bytes:
    """`to_table` as a sealed parquet file for `path`."""
    return write_parquet(to_table(rows, suite), path)


def from_parquet(data: bytes, suite: StoredAs) -> list[VideoRow]:
    """Rows of a score file. Raises pyarrow.ArrowInvalid where it is not one."""
    names = [measure.name for measure in _measures(suite)]
    optional = [measure.name for measure in suite.unranked]
    return [
        VideoRow(
            target=ScoreTarget(**{name: record[name] for name in _TARGET_COLUMNS}),
            values={name: record[name] for name in names if record[name] is not None},
            **{name: record[name] for name in _RESULT_COLUMNS},
        )
        for record in read_parquet(data, _schema(suite), optional=optional).to_pylist()
    ]


def _measures(suite: StoredAs) -> list[Measure]:
    return [*suite.measures, *suite.unranked]


def _schema(suite: StoredAs) -> pa.Schema:
    measures = {measure.name: pa.float64() for measure in _measures(suite)}
    return pa.schema(list((_TARGET_COLUMNS | _RESULT_COLUMNS | measures).items()))
