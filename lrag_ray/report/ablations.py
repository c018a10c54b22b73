"""Scores against one setting, where methods of a run differ in that one number."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from lrag_ray.report.chart import STYLES, Curve, line_chart
from lrag_ray.report.collect import ReportData
from lrag_ray.report.tables import AVERAGE
from lrag_ray.store.identity import MethodIdentity


@dataclass(frozen=True)
class Sweep:
    """Methods of one policy that differ in one setting alone."""

    policy: str
    setting: str
    methods: Mapping[str, float]
    """Value of the setting by method, ascending."""


@dataclass(frozen=True)
class SweepFigure:
    """The curves of one sweep on one backbone, a curve per duration."""

    sweep: Sweep
    backbone: str
    styles: Mapping[str, int]
    """Number of the line style by duration."""
    panels: Sequence[tuple[str, Markup]]
    """Title and chart."""


def sweeps(methods: Mapping[str, MethodIdentity]) -> list[Sweep]:
    """All of them; a method may be part of several."""
    found: dict[tuple[str, str, str], dict[str, float]] = {}
    for name, method in methods.items():
        for setting, value in method.settings.items():
            if isinstance(value, bool) or not isinstance(value, int | float):
                continue
            rest = {key: other for key, other in method.settings.items() if key != setting}
            same = (method.method, setting, json.dumps(rest, sort_keys=True))
            found.setdefault(same, {})[name] = float(value)
    return [
        Sweep(policy, setting, dict(sorted(values.items(), key=lambda item: item[1])))
        for (policy, setting, _), values in found.items()
        if len(set(values.values())) > 1
    ]


def sweep_figures(data: ReportData) -> list[SweepFigure]:
    """One figure per sweep and backbone: average rank and every measure against the setting."""
    figures = []
    for sweep in sweeps(data.identity.methods):
        for backbone in data.methods:
            curves: dict[str, list[Curve]] = {}
            labels = []
            for block in (block for block in data.blocks if block.backbone == backbone):
                labels.append(f"{data.duration_s(backbone, block.latent_frames):g} s")
                rows = {row.method: row for row in block.compared}
                there = [(value, rows[name]) for name, value in sweep.methods.items() if name in rows]
                if len(there) < 2:
                    continue
                x = np.array([value for value, _ in there])
                ranks = [row.average_rank for _, row in there if row.average_rank is not None]
                if len(ranks) == len(there):
                    curves.setdefault(AVERAGE, []).append(Curve(labels[-1], x, np.array(ranks)))
                for measure in data.suite.measures:
                    y = np.array([row.means[measure.name] for _, row in there])
                    scale = 100 if measure.unit == "percent" else 1
                    curves.setdefault(measure.name, []).append(Curve(labels[-1], x, scale * y))
            titles = {AVERAGE: "Average rank ↓"} | {
                measure.name: f"{measure.title} {'↑' if measure.higher_is_better else '↓'}"
                for measure in data.suite.measures
            }
            panels = [
                (title, chart)
                for name, title in titles.items()
                if name in curves and (chart := line_chart(curves[name], sweep.setting, title)) is not None
            ]
            if panels:
                styles = {label: (number + 1) % STYLES for number, label in enumerate(labels)}
                figures.append(SweepFigure(sweep, backbone, styles, panels))
    return figures
