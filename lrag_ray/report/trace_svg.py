"""The map of a rollout's trace as a small inline SVG that takes its colours from the page.

The picture is that of `lrag_ray.report.trace_map`: query blocks from left to right, attended latent frames from bottom
to top. Frames that carry a value (similarity of retrieved ones, attended share of compressed ones) are drawn in
`LEVELS` steps between the least and the greatest value of the rollout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from lrag_ray.context.trace import RowKind, TraceRow
from lrag_ray.report.trace_map import TraceMap, trace_map

LEVELS = 5
"""Colour steps of a value; CSS classes v0 (least) .. v4."""
_KIND_CLASSES = ("sink", "memory", "local", "current")


@dataclass(frozen=True)
class TraceFigure:
    """A drawn map and what to say about it."""

    svg: Markup
    """An <svg> element; classes sink, memory, local, current, v0 .. v4."""
    summary: str
    """The map in one sentence, for those who cannot see it."""
    value_range: str
    """What the steps stand for, or '' where no frame carries a value."""
    frames: int
    """Latent frames of the rollout."""
    first_frame: int
    """Frame of the lowest row: 0, or below it where rows are made of many frames."""
    frames_per_block: int
    retrieved: Sequence[Sequence[int]]
    """Latent frames that each block retrieved, ascending."""


def trace_figure(rows: Sequence[TraceRow]) -> TraceFigure:
    """Draw the trace of one rollout. Raises ValueError for an empty trace."""
    drawn = trace_map(rows)
    frames, blocks = drawn.kinds.shape
    shapes = [(name, drawn.kinds == i) for i, name in enumerate(_KIND_CLASSES)]
    shapes += [(f"v{level}", mask) for level, mask in enumerate(_levels(drawn))]
    paths = Markup().join(
        Markup('<path class="{}" d="{}"/>').format(name, _cells(mask, drawn.frames_per_block)) for name, mask in shapes
    )
    summary = _summary(rows, drawn)
    svg = Markup(
        '<svg class="map" viewBox="0 0 {} {}" preserveAspectRatio="none" role="img" aria-label="{}">{}</svg>'
    ).format(blocks * drawn.frames_per_block, frames, summary, paths)
    retrieved: list[set[int]] = [set() for _ in range(blocks)]
    for row in rows:
        if row.kind == "retrieved":
            retrieved[row.block].add(row.frame)
    return TraceFigure(
        svg,
        summary,
        _value_range(drawn),
        frames=frames + drawn.first_frame,
        first_frame=drawn.first_frame,
        frames_per_block=drawn.frames_per_block,
        retrieved=[sorted(found) for found in retrieved],
    )


def _levels(drawn: TraceMap) -> list[NDArray[np.bool_]]:
    """Masks of the cells in each colour step."""
    finite = drawn.values[np.isfinite(drawn.values)]
    if not len(finite):
        return []
    low, span = finite.min(), max(finite.max() - finite.min(), 1e-12)
    with np.errstate(invalid="ignore"):
        step = np.minimum((drawn.values - low) / span * LEVELS, LEVELS - 1)
    known = np.isfinite(step)
    level = np.where(known, step, -1).astype(int)
    return [known & (level == i) for i in range(LEVELS)]


def _cells(mask: NDArray[np.bool_], width: int) -> str:
    """Path data of the cells of a mask [frame, block], a block `width` wide; runs of frames become one rectangle."""
    frames, blocks = mask.shape
    parts = []
    for block in range(blocks):
        # A run begins and ends where the padded column changes.
        edges = np.flatnonzero(np.diff(np.concatenate([[0], mask[:, block].astype(np.int8), [0]])))
        for start, end in edges.reshape(-1, 2):
            parts.append(f"M{block * width} {frames - end}h{width}v{end - start}h-{width}z")
    return "".join(parts)


def _value_range(drawn: TraceMap) -> str:
    finite = drawn.values[np.isfinite(drawn.values)]
    if not len(finite):
        return ""
    short = "similarity" if drawn.value_name.startswith("cosine") else "share of tokens"
    return f"{short} {finite.min():.2f} to {finite.max():.2f}".replace("-", "−")


def _summary(rows: Sequence[TraceRow], drawn: TraceMap) -> str:
    last = [row for row in rows if row.block == drawn.blocks - 1]
    counts = {kind: len({row.frame for row in last if row.kind == kind}) for kind in get_args(RowKind)}
    shown = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"Attended latent frames per block over {drawn.blocks} blocks; the last block attends to {shown}."
