"""The report as one static HTML page: no external asset, links relative to the run, every text escaped.

The page lies at RUN/summary/report.html and plays from a folder and from a bucket alike. Its script only adds comfort
(duration choice, synchronous play and seek); without it every video still has its own controls.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from lrag_ray.report import tables
from lrag_ray.report.collect import ReportData
from lrag_ray.report.trace_svg import TraceFigure, trace_figure
from lrag_ray.store.records import RolloutId
from lrag_ray.store.videos import CommittedVideo


@dataclass(frozen=True)
class Player:
    """One rollout's videos in a prompt's row."""

    method: str
    sources: Mapping[str, str]
    """Relative address by latent frames."""
    seconds: Mapping[str, float]
    """Where playing stops, by latent frames: a file may be longer than its duration."""
    figure: TraceFigure | None
    device_kind: str


@dataclass(frozen=True)
class Row:
    """The videos of one prompt, sample and backbone side by side."""

    anchor: str
    prompt: str
    prompt_index: int
    sample: int
    backbone: str
    durations: Mapping[str, str]
    """Label by latent frames."""
    players: Sequence[Player | None]
    """One per method of the run; None where there is no video."""


def render_page(data: ReportData) -> str:
    """HTML of the whole report."""
    style, script = _asset("report.css"), _asset("report.js")
    environment = Environment(
        loader=PackageLoader("lrag_ray.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": tables.number, "rank_number": tables.rank_number, "arrow": tables.arrow}
    return environment.get_template("report.html.j2").render(
        data=data,
        blocks=[
            (block, tables.places(block, data.suite.measures), tables.comparison_note(block)) for block in data.blocks
        ],
        average=tables.AVERAGE,
        rows=_rows(data),
        samples=data.identity.samples,
        durations=_duration_choices(data),
        # Only our own files are marked safe; the policy lets nothing else run, whatever a prompt or a name holds.
        style=Markup(style),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        pretty=lambda value: json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False),
    )


def _asset(name: str) -> str:
    return files("lrag_ray.report").joinpath(name).read_text(encoding="utf-8")


def _duration_choices(data: ReportData) -> dict[int, str]:
    """Labels of all durations that have a video, shortest first."""
    seconds = {video.latent_frames: video.duration_s for group in data.videos.values() for video in group}
    return {frames: f"{seconds[frames]:g} s" for frames in sorted(seconds)}


def _rows(data: ReportData) -> list[Row]:
    rows = []
    for prompt_id, prompt in data.identity.prompts.items():
        for sample in range(data.identity.samples):
            for backbone in data.identity.backbones:
                rollouts = [
                    RolloutId(backbone=backbone, method=method, prompt_id=prompt_id, sample=sample)
                    for method in data.identity.methods
                ]
                shown = {rollout: data.videos[rollout] for rollout in rollouts if rollout in data.videos}
                if not shown:
                    continue
                durations = {v.latent_frames: f"{v.duration_s:g} s" for group in shown.values() for v in group}
                rows.append(
                    Row(
                        anchor=f"{backbone}-{prompt_id}-{sample}",
                        prompt=prompt.text,
                        prompt_index=prompt.index,
                        sample=sample,
                        backbone=backbone,
                        durations={str(frames): durations[frames] for frames in sorted(durations)},
                        players=[_player(data, rollout) if rollout in shown else None for rollout in rollouts],
                    )
                )
    return rows


def _player(data: ReportData, rollout: RolloutId) -> Player:
    videos = data.videos[rollout]
    trace = data.traces.get(rollout)
    return Player(
        method=rollout.method,
        sources={str(video.latent_frames): _address(video) for video in videos},
        seconds={str(video.latent_frames): video.frames / video.fps for video in videos},
        figure=trace_figure(trace) if trace else None,
        device_kind=videos[-1].commit.device_kind,
    )


def _address(video: CommittedVideo) -> str:
    """Address of a video relative to ``summary/``."""
    return f"../{quote(video.video.path)}"
