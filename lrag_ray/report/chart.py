"""Line charts as small inline SVGs that take their colours from the page (CSS classes line0, line1, …)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

STYLES = 12
"""Line styles that the style sheet knows; more curves begin again."""
_WIDTH, _HEIGHT = 340, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 8, 26
_TICKS = 4


class Curve(NamedTuple):
    """A named line; x ascending."""

    name: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]


def ticks(low: float, high: float, *, at_least: float) -> list[float]:
    """Round numbers around [low, high]; `at_least` is the least span, needed where the two may be equal."""
    span = max(high - low, at_least)
    magnitude = 10.0 ** math.floor(math.log10(span / _TICKS))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude * _TICKS >= span)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [index * step for index in range(first, max(last, first + 1) + 1)]


def _distinct(values: Sequence[float]) -> list[str]:
    """Numbers of four digits, or of more where two would read the same."""
    for digits in range(4, 17):
        labels = [f"{value:.{digits}g}" for value in values]
        if len(set(labels)) == len(labels):
            break
    return labels


def line_class(number: int) -> str:
    """CSS class of the curve at a position, for its line and its key."""
    return f"line{(number + 1) % STYLES}"


def line_chart(curves: Sequence[Curve], x_name: str, title: str) -> Markup | None:
    """The chart, or None where no curve has two points."""
    curves = [curve for curve in curves if len(curve.x) > 1]
    if not curves:
        return None
    low = float(min(curve.y.min() for curve in curves))
    high = float(max(curve.y.max() for curve in curves))
    y_ticks = ticks(low, high, at_least=max(abs(high), abs(low), 1e-12) * 1e-3)
    begin = float(min(curve.x[0] for curve in curves))
    end = float(max(curve.x[-1] for curve in curves))
    whole = all(float(value).is_integer() for curve in curves for value in curve.x)
    x_ticks = [
        tick
        for tick in ticks(begin, end, at_least=1 if whole else 0)
        if begin <= tick <= end and (not whole or tick.is_integer())
    ]
    y_labels = _distinct(y_ticks)
    bottom, top = min(low, y_ticks[0]), max(high, y_ticks[-1])

    def x(value: float) -> str:
        return f"{_LEFT + (_WIDTH - _LEFT - _RIGHT) * (value - begin) / (end - begin):.1f}"

    def y(value: float) -> str:
        return f"{_TOP + (_HEIGHT - _TOP - _BOTTOM) * (top - value) / (top - bottom):.1f}"

    parts = [
        Markup('<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/><text class="y" x="{}" y="{}">{}</text>').format(
            _LEFT, _WIDTH - _RIGHT, y(tick), y(tick), _LEFT - 6, y(tick), label
        )
        for tick, label in zip(y_ticks, y_labels, strict=True)
    ]
    parts += [
        Markup('<text class="x" x="{}" y="{}">{}</text>').format(x(tick), _HEIGHT - 6, f"{tick:g}") for tick in x_ticks
    ]
    for number, curve in enumerate(curves):
        path = "M" + "L".join(f"{x(float(a))} {y(float(b))}" for a, b in zip(curve.x, curve.y, strict=True))
        line = Markup('<path class="line {}" d="{}"><title>{}</title></path>')
        parts.append(line.format(line_class(number), path, curve.name))
    ends = ", ".join(f"{curve.name} from {curve.y[0]:.4g} to {curve.y[-1]:.4g}" for curve in curves)
    return Markup('<svg class="drift" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        _WIDTH, _HEIGHT, f"{title} by {x_name}: {ends}.", Markup().join(parts)
    )
