"""Which frames a rollout attended to, as a picture and on the terminal.

Query blocks run from left to right, attended latent frames from bottom to top: the diagonal is the block itself, the
band below it the local window, the bottom rows the sink, and everything between is history. Retrieved frames are
coloured by their similarity to the query frame, compressed ones by the share of their tokens that is attended. Rows
that are made of many frames are below frame 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lrag_ray.context.trace import ALL_LAYERS, TraceRow

KIND_COLOURS = {"sink": "#8c6d31", "memory": "#a34a86", "local": "#9aa0a6", "current": "#3c4043"}
"""Colours of the rows that carry no value of their own."""
KIND_GLYPHS = {"sink": "░", "memory": "▚", "local": "▒", "current": "▓"}
VALUE_GLYPH = "█"
COLOUR_MAP = "viridis"
_KIND_ORDER = ("sink", "memory", "local", "current")


@dataclass(frozen=True)
class TraceMap:
    """A trace as arrays over [attended frame, query block]."""

    kinds: NDArray[np.int8]
    """Index into sink, memory, local, current; -1 where the frame is not attended or has a value."""
    values: NDArray[np.float64]
    """Similarity of retrieved frames, or attended share of compressed ones, mean over layers and heads; else NaN."""
    value_name: str
    """What `values` holds."""
    frames_per_block: int
    """Latent frames per block."""
    first_frame: int = 0
    """Frame of the first row: 0, or the least of the negative numbers of rows that are made of many frames."""

    @property
    def blocks(self) -> int:
        """Number of query blocks."""
        return int(self.kinds.shape[1])


def trace_map(rows: Sequence[TraceRow]) -> TraceMap:
    """Arrange trace rows of one rollout. Raises ValueError for an empty trace."""
    if not rows:
        raise ValueError("the trace is empty: the rollout has no finished block")
    blocks = max(row.block for row in rows) + 1
    first = min(0, *(row.frame for row in rows))
    frames = max(row.frame for row in rows) + 1
    layers = max(1, len({row.layer for row in rows} - {ALL_LAYERS}))
    heads = 1 + max((max(row.heads, default=0) for row in rows if row.heads is not None), default=0)
    full = max(row.tokens for row in rows if row.kind == "current")
    kinds = np.full((frames - first, blocks), -1, dtype=np.int8)
    values = np.full(kinds.shape, np.nan)
    compressed = np.zeros(kinds.shape)
    for row in rows:
        at = row.frame - first, row.block
        if row.kind in _KIND_ORDER:
            kinds[at] = _KIND_ORDER.index(row.kind)
        elif row.kind == "compressed":
            times = layers if row.layer == ALL_LAYERS else 1
            compressed[at] += row.tokens * times * (heads if row.heads is None else len(row.heads))
        else:
            values[at] = np.nan if row.similarity is None else row.similarity
    values[compressed > 0] = compressed[compressed > 0] / (full * layers * heads)
    name = (
        "share of the frame's tokens that is attended" if compressed.any() else "cosine similarity to the query frame"
    )
    return TraceMap(kinds, values, name, frames // blocks, first)


def draw_png(rows: Sequence[TraceRow], path: Path, title: str) -> None:
    """Write the map of a trace as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    drawn = trace_map(rows)
    frames, blocks = drawn.kinds.shape
    extent = (0, blocks * drawn.frames_per_block, drawn.first_frame, frames + drawn.first_frame)
    figure = Figure(figsize=(8, 6.5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    present = [kind for i, kind in enumerate(_KIND_ORDER) if (drawn.kinds == i).any()]
    axes.imshow(
        np.ma.masked_less(drawn.kinds, 0),
        origin="lower", aspect="auto", extent=extent, interpolation="none",
        cmap=ListedColormap([KIND_COLOURS[kind] for kind in _KIND_ORDER]), vmin=0, vmax=len(_KIND_ORDER) - 1,
    )  # fmt: skip
    if np.isfinite(drawn.values).any():
        image = axes.imshow(
            np.ma.masked_invalid(drawn.values),
            origin="lower", aspect="auto", extent=extent, interpolation="none", cmap=COLOUR_MAP,
        )  # fmt: skip
        figure.colorbar(image, ax=axes, label=drawn.value_name)
    axes.set(xlabel="query (latent frame)", ylabel="attended latent frame", title=title)
    axes.legend(handles=[Patch(color=KIND_COLOURS[kind], label=kind) for kind in present], loc="upper left")
    figure.savefig(path)


def draw_text(rows: Sequence[TraceRow], height: int = 36, width: int = 72) -> list[list[tuple[str, str]]]:
    """The map as lines of (character, colour) cells, newest frames on top, at most `height` by `width`.

    Where a cell stands for several frames or blocks, the highest value wins, then the rarest kind.
    """
    from matplotlib import colormaps
    from matplotlib.colors import Normalize, to_hex

    drawn = trace_map(rows)
    finite = drawn.values[np.isfinite(drawn.values)]
    scale = Normalize(*((finite.min(), finite.max()) if len(finite) else (0, 1)))
    palette = colormaps[COLOUR_MAP]
    lines = []
    for frame_bin in reversed(np.array_split(np.arange(drawn.kinds.shape[0]), min(height, drawn.kinds.shape[0]))):
        line = []
        for block_bin in np.array_split(np.arange(drawn.blocks), min(width, drawn.blocks)):
            cell = np.ix_(frame_bin, block_bin)
            values, kinds = drawn.values[cell], drawn.kinds[cell]
            if np.isfinite(values).any():
                line.append((VALUE_GLYPH, to_hex(palette(scale(np.nanmax(values))))))
            elif (kinds >= 0).any():
                kind = _KIND_ORDER[int(kinds[kinds >= 0].min())]
                line.append((KIND_GLYPHS[kind], KIND_COLOURS[kind]))
            else:
                line.append(("·", "#5f6368"))
        lines.append(line)
    return lines
