"""Drift curves as small inline SVGs that take their colours from the page: one panel per dimension.

A method keeps its colour and its dashes in all panels (CSS classes line0 .. and band0 ..), so that it can be recognised
without colour too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lrag_ray.report.collect import ReportData
from lrag_ray.report.tables import number
from lrag_ray.scoring.drift import DriftPoint
from lrag_ray.scoring.measure import Measure

STYLES = 12
"""Line styles that the style sheet knows; more methods begin again."""
_WIDTH, _HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 10, 8, 26
_TICKS = 4


@dataclass(frozen=True)
class DriftPanel:
    """Curves of one dimension."""

    title: str
    svg: Markup


@dataclass(frozen=True)
class DriftFigure:
    """All panels of one backbone at its longest duration."""

    backbone: str
    duration_s: float
    prompts: int
    styles: Mapping[str, int]
    """Number of the line style by method."""
    panels: Sequence[DriftPanel]


def drift_figures(data: ReportData) -> list[DriftFigure]:
    """One figure per backbone: shorter durations show the same clips, since scores are those within the clip."""
    styles = {method: i % STYLES for i, method in enumerate(data.identity.methods)}
    longest: dict[str, int] = {}
    for point in data.drift:
        longest[point.backbone] = max(longest.get(point.backbone, 0), point.latent_frames)
    figures = []
    for backbone, latent_frames in longest.items():
        curves: dict[str, dict[str, list[DriftPoint]]] = {}
        for point in data.drift:
            if (point.backbone, point.latent_frames) == (backbone, latent_frames):
                curves.setdefault(point.measure, {}).setdefault(point.method, []).append(point)
        shown = next(iter(next(iter(curves.values())).values()))
        if len(shown) < 2:
            continue
        figures.append(
            DriftFigure(
                backbone=backbone,
                duration_s=data.duration_s(backbone, latent_frames),
                prompts=shown[0].prompts,
                styles={method: styles[method] for method in data.methods[backbone]},
                panels=[
                    DriftPanel(measure.title, _panel(measure, curves[measure.name], styles))
                    for measure in data.suite.measures
                    if measure.name in curves
                ],
            )
        )
    return figures


Curves = Mapping[str, Sequence[DriftPoint]]
"""Points in order of time, by method."""


def _panel(measure: Measure, curves: Curves, styles: Mapping[str, int]) -> Markup:
    points = [point for curve in curves.values() for point in curve]
    low = min(point.in_clip.mean if point.in_clip.lower is None else point.in_clip.lower for point in points)
    high = max(point.in_clip.mean if point.in_clip.upper is None else point.in_clip.upper for point in points)
    y_ticks = _ticks(low, high, at_least=1e-3)
    end = max(point.start_s for point in points)
    x_ticks = [tick for tick in _ticks(0, end, at_least=1) if tick <= end]
    bottom, top = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x(seconds: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - _RIGHT) * seconds / end:.1f}"

    def y(value: float) -> str:
        return f"{_TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - value) / (top - bottom):.1f}"

    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="y" x="{}" y="{}">{}</text>').format(
            _LEFT, _WIDTH - _RIGHT, y(tick), y(tick), _LEFT - 6, y(tick), _tick_label(tick, y_ticks, measure)
        )
        for tick in y_ticks
    ]
    parts += [
        Markup('<text class="x" x="{}" y="{}">{} s</text>').format(x(tick), _HEIGHT - 6, f"{tick:g}")
        for tick in x_ticks
    ]
    for method, curve in curves.items():
        band = [point for point in curve if point.in_clip.lower is not None and point.in_clip.upper is not None]
        there = [f"{x(point.start_s)} {y(point.in_clip.upper or 0.0)}" for point in band]
        back = [f"{x(point.start_s)} {y(point.in_clip.lower or 0.0)}" for point in reversed(band)]
        if band:
            path = "M" + "L".join([*there, *back]) + "z"
            parts.append(Markup('<path class="band band{}" d="{}"/>').format(styles[method], path))
    for method, curve in curves.items():
        path = "M" + "L".join(f"{x(point.start_s)} {y(point.in_clip.mean)}" for point in curve)
        line = Markup('<path class="line line{}" d="{}"><title>{}</title></path>')
        parts.append(line.format(styles[method], path, method))
    return Markup('<svg class="drift" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, _summary(measure, curves), Markup().join(parts)
    )


def _ticks(low: float, high: float, *, at_least: float) -> list[float]:
    """Round numbers around [low, high]."""
    span = max(high - low, at_least)
    magnitude = 10.0 ** math.floor(math.log10(span / _TICKS))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude * _TICKS >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _tick_label(tick: float, ticks: Iterable[float], measure: Measure) -> str:
    scale = 100 if measure.unit == "percent" else 1
    values = [scale * each for each in ticks]
    digits = next((n for n in range(4) if all(abs(round(v, n) - v) < 1e-6 for v in values)), 4)
    return f"{scale * tick:.{digits}f}"


def _summary(measure: Measure, curves: Curves) -> str:
    changes = (
        f"{method} from {number(curve[0].in_clip.mean, measure)} to {number(curve[-1].in_clip.mean, measure)}"
        for method, curve in curves.items()
    )
    return f"{measure.title} of clips over the time of the video: {', '.join(changes)}."
