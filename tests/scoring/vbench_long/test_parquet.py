"""Rows survive a file exactly; what is not a score file is refused, also another suite's."""

from __future__ import annotations

from dataclasses import replace

import pyarrow as pa
import pytest

from lrag_ray.scoring import video_rows
from lrag_ray.scoring.preview.suite import PREVIEW
from lrag_ray.scoring.vbench_long.parquet import is_untrained, rows_from_parquet, rows_to_parquet
from lrag_ray.scoring.vbench_long.rows import ScoreRow

ROW = ScoreRow(
    video="rollouts/tiny/base/00000-ab-0@" + "f" * 64,
    kind="clip",
    dimension="imaging_quality",
    first_frame=32,
    frame_count=32,
    fps=16,
    score=53.12345678901234,
    per_frame=(53.1, 53.14691357802468),
    reason="",
    mode="direct",
    device="cpu",
    precision="official",
    torch="2.12.1",
    networks="musiq_spaq:0123",
)


def test_rows_come_back_as_they_were() -> None:
    failure = replace(ROW, kind="failure", dimension="", score=None, per_frame=(), reason="näh, empty", networks="")
    assert rows_from_parquet(rows_to_parquet([ROW, failure])) == [ROW, failure]
    assert rows_from_parquet(rows_to_parquet([])) == []


def test_what_is_no_score_file_is_refused() -> None:
    for data in (b"", b"not parquet", video_rows.to_parquet([], PREVIEW)):
        with pytest.raises(pa.ArrowException):
            rows_from_parquet(data)


def test_untrained_scores_can_be_told() -> None:
    assert not is_untrained(ROW)
    assert is_untrained(replace(ROW, networks="amt_s:random-0123"))
