"""The report for machines: CSV and parquet, values unrounded and as stored."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lrag_ray.report.collect import ReportData
from lrag_ray.report.csv_text import csv_text
from lrag_ray.report.ends import EndsTable
from lrag_ray.report.prompt_columns import ORIGINAL, PREFIX
from lrag_ray.report.tables import AVERAGE
from lrag_ray.scoring.bootstrap import Interval
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY
from lrag_ray.scoring.ranks import RankBlock

FROZEN = "control:frozen"
"""Name of the held first frame in the column of methods; no method can be called so."""


def ranks_csv(data: ReportData) -> str:
    """All blocks: unrounded means, places and the average rank, one line per method, and the control without places.

    The counts of the control and of a method left out of the ranks are their own.
    """
    names = [measure.name for measure in data.suite.measures]
    lines = []
    for block in data.blocks:
        shared = _block_columns(data, block) | {
            "prompts_left_out": block.prompts_left_out,
        }
        for row in block.rows:
            ranks = {f"rank_{name}": rank for name, rank in row.ranks.items()}
            video_means = {f"video_mean_{name}": mean for name, mean in row.video_means.items()}
            counts = {"prompts": row.prompts, "videos_per_method": row.videos}
            lines.append(
                shared
                | counts
                | {"method": row.method, AVERAGE: row.average_rank}
                | dict(row.means)
                | ranks
                | video_means
            )
        if frozen := data.frozen_means(block):
            units = data.frozen_units(block)
            counts = {"prompts": len({prompt for prompt, _ in units}), "videos_per_method": len(units)}
            lines.append(shared | counts | {"method": FROZEN} | frozen)
    columns = [*_BLOCK_COLUMNS, "prompts", "videos_per_method", "prompts_left_out", "method", AVERAGE, *names]
    columns += [f"rank_{name}" for name in names] + [f"video_mean_{name}" for name in names]
    return csv_text(columns, lines)


def differences_csv(data: ReportData) -> str:
    """All contrasts: difference, ends of its interval, and the noise between samples of the method."""
    lines = [
        _block_columns(data, block)
        | {
            "prompts": block.prompts,
            "method": contrast.method,
            "reference": contrast.reference,
            "measure": name,
            "difference": found.mean,
            "lower": found.lower,
            "upper": found.upper,
            "sample_deviation": statistics.noise.get((contrast.method, name)),
        }
        for block, statistics in zip(data.blocks, data.statistics, strict=True)
        for contrast in statistics.contrasts
        for name, found in contrast.intervals.items()
    ]
    columns = ["prompts", "method", "reference", "measure", "difference", "lower", "upper", "sample_deviation"]
    return csv_text([*_BLOCK_COLUMNS, *columns], lines)


def drift_table(data: ReportData) -> pa.Table:
    """All drift curves: one row per cell, dimension and clip."""
    blocks = {(block.backbone, block.latent_frames): _block_columns(data, block) for block in data.blocks}
    rows = [
        blocks[point.backbone, point.latent_frames]
        | {
            "method": point.method,
            "measure": point.measure,
            "clip": point.clip,
            "start_s": point.start_s,
            "prompts": point.prompts,
            "in_clip": point.in_clip.mean,
            "in_clip_lower": point.in_clip.lower,
            "in_clip_upper": point.in_clip.upper,
            "final": point.final,
        }
        for point in data.drift
    ]
    return pa.Table.from_pylist(rows, schema=_DRIFT_SCHEMA)


def drift_csv(data: ReportData) -> str:
    """`drift_table` as CSV."""
    return csv_text(_DRIFT_SCHEMA.names, drift_table(data).to_pylist())


def drift_parquet(data: ReportData) -> bytes:
    """`drift_table` as parquet."""
    return _parquet(drift_table(data))


def ends_csv(data: ReportData, tables: Sequence[EndsTable]) -> str:
    """Drift as papers report it, one line per method and value: first, last and change, and flow discontinuity."""
    lines = []
    for table in tables:
        for method in table.methods:
            values = [
                (each.measure, what, value)
                for each in table.rows.get(method, ())
                for what, value in (
                    ("first", Interval(each.first, None, None)),
                    ("last", Interval(each.last, None, None)),
                    ("change", each.change),
                )
            ]
            values += [(FLOW_DISCONTINUITY.name, "mean", found) for found in [table.flow.get(method)] if found]
            lines += [
                _block_columns(data, table.block)
                | {"prompts": table.block.prompts, "method": method, "measure": measure, "value": what}
                | value._asdict()
                for measure, what, value in values
            ]
    return csv_text([*_BLOCK_COLUMNS, "prompts", "method", "measure", "value", *Interval._fields], lines)


def videos_csv(data: ReportData) -> str:
    """One line per video and duration: its prompt with the other columns of the prompt table, and its scores."""
    labels = ["suite", "mode", "backbone", "method", "duration_s", "latent_frames", "prompt_id", "sample"]
    lines = [
        {
            "suite": data.suite.name,
            "mode": data.suite.mode,
            "backbone": video.backbone,
            "method": video.method,
            "duration_s": data.duration_s(video.backbone, video.latent_frames),
            "latent_frames": video.latent_frames,
            "prompt_id": video.prompt_id,
            "sample": video.sample,
        }
        | _prompt_cells(data, video.prompt_id)
        | dict(video.values)
        for video in data.scores.videos
    ]
    measures = [measure.name for measure in (*data.suite.measures, *data.suite.unranked)]
    return csv_text([*labels, *_prompt_names(data), *measures], lines)


def scores_parquet(data: ReportData) -> bytes:
    """Everything behind the tables: one row per video, or per clip where the suite has clips.

    Beside each stands its prompt with the other columns of the prompt table.
    """
    table = data.suite.table(data.scores)
    if "prompt_id" in table.column_names:
        cells = [_prompt_cells(data, prompt_id) for prompt_id in table["prompt_id"].to_pylist()]
        for name in _prompt_names(data):
            if name not in table.column_names:
                table = table.append_column(name, pa.array((row.get(name) for row in cells), pa.string()))
    return _parquet(table)


def _prompt_names(data: ReportData) -> list[str]:
    names = dict.fromkeys(name for columns in data.prompt_columns.values() for name in columns)
    original = [ORIGINAL] if any(prompt.original for prompt in data.identity.prompts.values()) else []
    return ["prompt", *original, *(f"{PREFIX}{name}" for name in names)]


def _prompt_cells(data: ReportData, prompt_id: str) -> dict[str, Any]:
    columns = {f"{PREFIX}{name}": value for name, value in data.prompt_columns[prompt_id].items()}
    prompt = data.identity.prompts[prompt_id]
    return {"prompt": prompt.text, **({ORIGINAL: prompt.original} if prompt.original else {}), **columns}


_BLOCK_COLUMNS = ["suite", "mode", "backbone", "backbone_label", "duration_s", "latent_frames"]

_DRIFT_SCHEMA = pa.schema(
    {
        "suite": pa.string(),
        "mode": pa.string(),
        "backbone": pa.string(),
        "backbone_label": pa.string(),
        "duration_s": pa.float64(),
        "latent_frames": pa.int32(),
        "method": pa.string(),
        "measure": pa.string(),
        "clip": pa.int32(),
        "start_s": pa.float64(),
        "prompts": pa.int32(),
        "in_clip": pa.float64(),
        "in_clip_lower": pa.float64(),
        "in_clip_upper": pa.float64(),
        "final": pa.float64(),
    }
)


def _block_columns(data: ReportData, block: RankBlock) -> dict[str, Any]:
    return {
        "suite": data.suite.name,
        "mode": data.suite.mode,
        "backbone": block.backbone,
        "backbone_label": data.identity.backbones[block.backbone].label,
        "duration_s": data.duration_s(block.backbone, block.latent_frames),
        "latent_frames": block.latent_frames,
    }


def _parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink)
    return sink.getvalue()
