"""Score rows as parquet files, and where they are below a run.

::

    scores/vbench_long-<mode>/<backbone>/<method>/<prompt_id>-<sample>/rows-<token>.parquet
    scores/vbench_long-<mode>/controls/frozen/<backbone>/<prompt_id>-<sample>/rows-<token>.parquet

Files are created once and hold the rows of several clips each. Rows with one `RowKey` may be in two files (a killed
worker and its successor): they say the same, and the first counts.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa

from lrag_ray.scoring.vbench_long.names import Mode
from lrag_ray.scoring.vbench_long.rows import ScoreRow
from lrag_ray.store.parquet import read_parquet, write_parquet

UNTRAINED = "random-"
"""Digests of networks begin so where their weights were drawn at random: the scores mean nothing."""

_SCHEMA = pa.schema(
    {
        "video": pa.string(),
        "kind": pa.string(),
        "dimension": pa.string(),
        "first_frame": pa.int32(),
        "frame_count": pa.int32(),
        "fps": pa.int32(),
        "score": pa.float64(),
        "per_frame": pa.list_(pa.float64()),
        "reason": pa.string(),
        "mode": pa.string(),
        "device": pa.string(),
        "precision": pa.string(),
        "torch": pa.string(),
        "networks": pa.string(),
    }
)


def rows_to_parquet(rows: Sequence[ScoreRow], path: str = "", ends: Sequence[str] = ()) -> bytes:
    """Rows as a sealed parquet file, which may be empty: one column per field of `ScoreRow`; see `write_parquet`."""
    return write_parquet(pa.Table.from_pylist([row.as_dict() for row in rows], schema=_SCHEMA), path, ends)


def rows_from_parquet(data: bytes) -> list[ScoreRow]:
    """Rows of a score file.

    Raises:
        pyarrow.ArrowException: it is not a parquet file, or its columns are others.
    """
    rows = read_parquet(data, _SCHEMA).to_pylist()
    return [ScoreRow(**{**row, "per_frame": tuple(row["per_frame"])}) for row in rows]


def folder(mode: Mode) -> str:
    """Where the scores of a mode are, relative to the run: modes never share a table."""
    return f"scores/vbench_long-{mode}"


def rollout_folder(mode: Mode, rollout_path: str) -> str:
    """Where the row files of a rollout are; `rollout_path` is ``rollouts/<backbone>/<method>/<prompt_id>-<sample>``."""
    return f"{folder(mode)}/{rollout_path.removeprefix('rollouts/')}"


def frozen_folder(mode: Mode, backbone: str, prompt_id: str, sample: int) -> str:
    """Where the row files of a frozen control are."""
    return f"{folder(mode)}/controls/frozen/{backbone}/{prompt_id}-{sample}"


def video_identity(rollout_path: str, video_sha256: str) -> str:
    """`ScoreRow.video` of a rollout's file."""
    return f"{rollout_path}@{video_sha256}"


def frozen_identity(backbone: str, prompt_id: str, sample: int) -> str:
    """`ScoreRow.video` of a frozen control: the first frame of a rollout, held."""
    return f"frozen:{backbone}/{prompt_id}-{sample}"


def is_untrained(row: ScoreRow) -> bool:
    """Whether a network behind the row has random weights."""
    return f":{UNTRAINED}" in row.networks
