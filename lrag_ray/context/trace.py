"""The one trace format of all methods: which latent frames a block attended to, with which temporal index."""

from __future__ import annotations

from typing import Literal, NamedTuple

RowKind = Literal["sink", "memory", "retrieved", "local", "compressed", "current"]

ALL_LAYERS = -1
"""Value of `TraceRow.layer` when every layer attends to the same rows."""


class TraceRow(NamedTuple):
    """One latent frame in the attention context of one block."""

    block: int
    """Block index, from 0."""
    layer: int
    """Transformer layer, or `ALL_LAYERS`."""
    kind: RowKind
    """Which part of the context the rows belong to; ``memory`` is what a method made or chose of frames that left."""
    frame: int
    """Global latent frame that the rows come from, or a negative number for rows that are made of many frames."""
    temporal_index: int
    """Temporal RoPE index that its keys are rotated with."""
    tokens: int
    """Attended tokens of that frame (all of them unless a method keeps single tokens)."""
    similarity: float | None
    """What the frame was chosen by, else None: of retrieved frames the cosine similarity to the query frame's
    descriptor, of MemFlow's memory the score against the prompt."""
    heads: tuple[int, ...] | None = None
    """Heads that attend to the row, ascending; None where all heads of the layer do."""
    window: int | None = None
    """Of a loop that denoises several blocks at once, the window whose call attended to it; else None."""
    clean: bool | None = None
    """Whether that call was the clean-context pass; None where all passes of the block attend to the same rows."""
    timestep: float | None = None
    """Of current frames in such a call, their timestep."""
