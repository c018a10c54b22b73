"""The report as one static HTML page: no external asset, links relative to the page, every text escaped.

The page is in the report's folder (RUN/summary for one run) and plays from a folder and from a bucket alike. Its
script only adds comfort (duration choice, search, synchronous play and seek); without it every video still has its own
controls.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup

from lrag_ray.printable import quantity
from lrag_ray.report import tables
from lrag_ray.report.ablations import sweep_figures
from lrag_ray.report.collect import ReportData
from lrag_ray.report.costs import KINDS, cost_tables
from lrag_ray.report.drift_svg import drift_figures
from lrag_ray.report.ends import ENDS_S, ends_tables
from lrag_ray.report.environment import asset, page_environment, style_sheet
from lrag_ray.report.headline import headline
from lrag_ray.report.judged import Judged
from lrag_ray.report.methods import ContextSheet, method_notes
from lrag_ray.report.players import MAPS, Link, rows
from lrag_ray.report.prompt_columns import MOST_SHOWN, prompt_columns
from lrag_ray.report.strips import StripSheet
from lrag_ray.scoring.bootstrap import LEAST_PROMPTS, LEVEL
from lrag_ray.scoring.flow_discontinuity import FLOW_DISCONTINUITY
from lrag_ray.scoring.ranks import RankBlock

_FILES = {
    "ranks.csv": "means, places and average ranks of every table",
    "differences.csv": "method minus reference with both ends of the interval, and the noise between samples",
    "table.tex": "the rank tables as one LaTeX table",
    "videos.csv": "the scores of every video beside its prompt and the columns of the prompt table",
    "scores.parquet": "what they are made of, one row per clip or video",
    "judge.csv": "means of judges' answers with both ends of the interval",
    "ends.csv": "first and last seconds, and flow discontinuity at block boundaries, with their intervals",
    "drift.csv": "the drift curves with their bands",
    "drift.parquet": "the same",
}
"""What is beside the page."""


class RankCell(NamedTuple):
    """An average rank in the overview."""

    average_rank: float | None
    place: tables.Place | None
    first: bool
    """Whether a backbone's columns begin here."""


class Overview(NamedTuple):
    """The average ranks of all blocks in one table."""

    groups: Mapping[str, Sequence[str]]
    """Labels of the durations by backbone."""
    rows: Mapping[str, Sequence[RankCell]]
    """Cells by method, in the order of the columns."""


def overview(data: ReportData) -> Overview | None:
    """Average ranks by method, backbone and duration; None where one block shows them as well."""
    if sum(any(row.average_rank is not None for row in block.rows) for block in data.blocks) < 2:
        return None
    groups: dict[str, list[str]] = {}
    rows: dict[str, list[RankCell]] = {name: [] for name in data.identity.methods}
    for block in data.blocks:
        first = block.backbone not in groups
        groups.setdefault(block.backbone, []).append(f"{data.duration_s(block.backbone, block.latent_frames):g} s")
        ranks = {row.method: row.average_rank for row in block.rows}
        marks = tables.places(block, data.suite.measures)
        for method, cells in rows.items():
            cells.append(RankCell(ranks.get(method), marks.get((method, tables.AVERAGE)), first))
    return Overview(groups, rows)


def render_page(data: ReportData, strips: Sequence[StripSheet], contexts: Sequence[ContextSheet], link: Link) -> str:
    """HTML of the whole report; `link` gives the addresses of the videos."""
    style, script = style_sheet(), asset("report.js")
    environment = page_environment()
    suite = data.suite
    environment.filters["number"] = tables.number
    environment.filters["signed"] = tables.signed
    environment.filters["interval"] = tables.interval
    environment.globals["against"] = tables.against
    environment.filters["percent"] = tables.percent
    environment.filters["quantity"] = quantity
    environment.filters["rank_number"] = tables.rank_number
    environment.filters["arrow"] = tables.arrow
    environment.filters["between"] = tables.between
    environment.filters["favours"] = tables.favours
    environment.filters["pretty"] = lambda value: json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False)
    return environment.get_template("report.html.j2").render(
        data=data,
        suite=suite,
        banner=suite.banner(data.scores),
        warnings=tables.warnings(data),
        level=f"{LEVEL:.0%}",
        least_prompts=LEAST_PROMPTS,
        headline=headline(data),
        overview=overview(data),
        sweeps=sweep_figures(data),
        costs=cost_tables(data),
        cost_kinds=KINDS,
        ends=ends_tables(data),
        ends_s=ENDS_S,
        flow_measure=FLOW_DISCONTINUITY,
        measures={measure.name: measure for measure in suite.measures},
        sort=_sorted_by(data),
        blocks=[
            {
                "block": block,
                "marks": tables.places(block, suite.measures),
                "note": tables.comparison_note(block),
                "interval_note": tables.interval_note(block.prompts),
                "has_intervals": block.prompts >= LEAST_PROMPTS,
                "frozen": data.frozen_means(block),
                "frozen_note": tables.frozen_note(data, block),
                "statistics": statistics,
                "means": {row.method: row.means for row in block.rows},
                "video_means_differ": video_means_differ(block),
            }
            for block, statistics in zip(data.blocks, data.statistics, strict=True)
        ],
        average=tables.AVERAGE,
        noise_floor=tables.noise_floor,
        drift=drift_figures(data),
        files={name: what for name, what in _FILES.items() if _is_written(name, data)},
        judged=[_judged_view(data, each) for each in data.judged],
        strips=strips,
        methods=method_notes(data),
        contexts=contexts,
        rows=rows(data, link),
        maps=MAPS,
        columns_left_out=max(0, len(prompt_columns(data.identity)) - MOST_SHOWN),
        samples=data.identity.samples,
        durations=_duration_choices(data),
        failures=[failure for source in data.sources for failure in source.status.failures],
        problems=[problem for source in data.sources for problem in source.status.problems],
        # Only our own files are marked safe; the policy lets nothing else run, whatever a prompt or a name holds.
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _sorted_by(data: ReportData) -> dict[str, str]:
    """Methods whose difference the page offers first: the leader and the next, else what retrieval brings."""
    compared = [contrast for statistics in data.statistics for contrast in statistics.contrasts]
    names = list(data.identity.methods)
    if compared:
        return {"one": compared[-1].method, "other": compared[-1].reference}
    return {"one": names[-1], "other": names[0]} if names else {"one": "", "other": ""}


def _is_written(name: str, data: ReportData) -> bool:
    if name == "ends.csv":
        return bool(ends_tables(data))
    return bool(data.judged) if name == "judge.csv" else bool(data.drift) or not name.startswith("drift")


def _judged_view(data: ReportData, judged: Judged) -> dict[str, Any]:
    """Tables of one suite: per measure methods in rows, cells in columns."""
    cells = [(block.backbone, block.latent_frames) for block in judged.blocks]
    banner = judged.suite.banner(judged.scores)
    return {
        "title": judged.suite.title,
        "note": banner.text if banner else judged.suite.note,
        "remarks": judged.suite.warnings(judged.scores),
        "columns": [f"{backbone}, {data.duration_s(backbone, frames):g} s" for backbone, frames in cells],
        "tables": [
            (measure, {m: [row.get(cell) for cell in cells] for m, row in judged.means(measure).items()})
            for measure in judged.suite.measures
        ],
        "failures": judged.scores.failures if judged.suite is not data.suite else {},
    }


def video_means_differ(block: RankBlock) -> bool:
    """Whether the mean of per-video means says anything that the ranked mean does not."""
    return any(abs(row.means[name] - row.video_means[name]) > 1e-9 for row in block.rows for name in row.means)


def _duration_choices(data: ReportData) -> dict[int, str]:
    """Labels of all durations that have a video, shortest first."""
    seconds = {video.latent_frames: video.duration_s for shown in data.rollouts.values() for video in shown.videos}
    return {frames: f"{seconds[frames]:g} s" for frames in sorted(seconds)}
