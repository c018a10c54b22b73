"""Rank tables for machines (CSV, parquet) and for the terminal."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum

from rich.table import Table
from rich.text import Text

from lrag_ray.report.collect import ReportData
from lrag_ray.scoring.measure import Measure
from lrag_ray.scoring.ranks import RankBlock
from lrag_ray.scoring.table import to_parquet

AVERAGE = "average_rank"
"""Key of the average rank beside the measures' names."""


class Place(IntEnum):
    """How a value is marked in its column."""

    BEST = 1
    SECOND = 2
    OTHER = 3


def ranks_csv(data: ReportData) -> str:
    """All blocks as one CSV: unrounded means, places and the average rank, one line per method."""
    names = [measure.name for measure in data.suite.measures]
    fixed = ["suite", "backbone", "backbone_label", "duration_s", "latent_frames", "prompts", "videos_per_method"]
    fixed += ["prompts_left_out", "method", AVERAGE]
    out = io.StringIO()
    writer = csv.DictWriter(out, [*fixed, *names, *(f"rank_{name}" for name in names)], lineterminator="\n")
    writer.writeheader()
    for block in data.blocks:
        shared = {
            "suite": data.suite.name,
            "backbone": block.backbone,
            "backbone_label": data.identity.backbones[block.backbone].label,
            "duration_s": data.duration_s(block.backbone, block.latent_frames),
            "latent_frames": block.latent_frames,
            "prompts": block.prompts,
            "videos_per_method": block.videos,
            "prompts_left_out": block.prompts_left_out,
        }
        for row in block.rows:
            ranks = {f"rank_{name}": rank for name, rank in row.ranks.items()}
            writer.writerow(shared | {"method": row.method, AVERAGE: row.average_rank} | dict(row.means) | ranks)
    return out.getvalue()


def scores_parquet(data: ReportData) -> bytes:
    """All videos' values as one parquet file."""
    return to_parquet(data.scores, data.suite)


def places(block: RankBlock, measures: Sequence[Measure]) -> Mapping[tuple[str, str], Place]:
    """Best and second of every column, by (method, measure name or `AVERAGE`). A tie for a place shares its mark.

    Nothing is marked where there is nothing to compare, or where all are equal.
    """
    marks: dict[tuple[str, str], Place] = {}
    compared = [row for row in block.rows if row.average_rank is not None]
    if len(compared) < 2:
        return marks
    for column in [*(measure.name for measure in measures), AVERAGE]:
        values = {
            row.method: row.average_rank or math.inf if column == AVERAGE else row.ranks[column] for row in compared
        }
        distinct = sorted(set(values.values()))
        if len(distinct) < 2:
            continue
        for method, value in values.items():
            marks[method, column] = Place(min(distinct.index(value) + 1, Place.OTHER))
    return marks


def arrow(measure: Measure) -> str:
    """Direction of a measure as tables show it."""
    return "↑" if measure.higher_is_better else "↓"


def number(value: float | None) -> str:
    """A mean as people read it: four significant digits."""
    return "–" if value is None else f"{value:#.4g}"


def rank_number(value: float | None) -> str:
    """An average rank as the paper prints it."""
    return "–" if value is None else f"{value:.2f}"


def comparison_note(block: RankBlock) -> str:
    """What a table is over, in words."""
    if not block.prompts:
        missing = ", ".join(row.method for row in block.rows if not row.videos_scored)
        why = f"no scores yet for {missing}" if missing else "no prompt has complete scores for all methods"
        return f"Not ranked: {why}."
    note = f"Over the {_count(block.prompts, 'prompt')} that all methods have"
    if block.videos != block.prompts:
        note += f" ({_count(block.videos, 'video')} per method)"
    if block.prompts_left_out:
        note += f"; {_count(block.prompts_left_out, 'prompt')} left out because some methods lack them"
    return f"{note}."


def terminal_tables(data: ReportData) -> Iterable[Table]:
    """One Rich table per block: methods in columns, because terminals are narrow and methods few."""
    for block in data.blocks:
        label = data.identity.backbones[block.backbone].label
        duration_s = data.duration_s(block.backbone, block.latent_frames)
        table = Table(
            title=Text(f"{block.backbone}{f' ({label})' if label else ''}, {duration_s:g} s"),
            caption=Text(f"{data.suite.name} suite, not VBench. {comparison_note(block)}"),
        )
        table.add_column("measure")
        for row in block.rows:
            table.add_column(Text(row.method), justify="right")
        marks = places(block, data.suite.measures)
        for measure in data.suite.measures:
            name = measure.name
            cells = [_marked(number(row.means.get(name)), marks.get((row.method, name))) for row in block.rows]
            table.add_row(f"{measure.title} {arrow(measure)}", *cells)
        table.add_section()
        ranks = [_marked(rank_number(row.average_rank), marks.get((row.method, AVERAGE))) for row in block.rows]
        table.add_row("Average rank ↓", *ranks)
        yield table


def _marked(text: str, place: Place | None) -> Text:
    return Text(text, style={Place.BEST: "bold", Place.SECOND: "underline"}.get(place or Place.OTHER, ""))


def _count(number_of: int, what: str) -> str:
    return f"{number_of} {what}{'' if number_of == 1 else 's'}"
