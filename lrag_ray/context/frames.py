"""Policies that keep whole latent frames and use the same ones in every layer."""

from __future__ import annotations

from typing import NamedTuple, Protocol, TypeVar

from torch import Tensor

from lrag_ray.context.policy import ContextPolicy, Exposure, PolicyInputs, Span
from lrag_ray.context.trace import ALL_LAYERS, RowKind, TraceRow
from lrag_ray.context.window import KVWindow


class FrameRow(NamedTuple):
    """One frame of the context."""

    kind: RowKind
    frame: int
    temporal_index: int
    similarity: float | None = None


class WindowSettings(Protocol):
    """Settings of a method with a sink and a window."""

    @property
    def window(self) -> int:
        """Latent frames attended to, the current block included; -1 keeps all."""

    @property
    def sink(self) -> int:
        """First latent frames, which are never dropped."""


W = TypeVar("W", bound=WindowSettings)


def check_window(window: int, sink: int) -> None:
    """Raise ValueError unless window (-1 = all frames) and sink are possible on their own."""
    if window != -1 and window < 1:
        raise ValueError(f"window {window} must be -1 (all frames) or at least 1 latent frame")
    if sink < 0:
        raise ValueError(f"sink {sink} must not be negative")


def check_limited(window: int) -> None:
    """Raise ValueError where every frame would be kept, so that a method that summarises the others has none."""
    if window == -1:
        raise ValueError(
            "window -1 keeps all frames, and this method acts on those that leave the window: give a number"
        )


def check_local_room(window: int, frames_per_block: int, **taken: int) -> None:
    """Raise ValueError where the window leaves less than one block for local frames.

    `taken` are the frames of the window that are not local, by the name of their setting.
    """
    room = window - sum(taken.values())
    if window != -1 and room < frames_per_block:
        after = " and ".join(f"{name} {frames}" for name, frames in taken.items())
        raise ValueError(
            f"window {window} leaves {room} latent frames for local context after {after}, but a block has "
            f"{frames_per_block}: raise window to at least {window - room + frames_per_block} or lower the others"
        )


def frames_in_window(window: int, frames_per_block: int, first_frame: int) -> int:
    """Latent frames of a window, the block that starts at `first_frame` included."""
    end = first_frame + frames_per_block
    return end if window == -1 else min(end, window)


class FramePolicy(ContextPolicy[W]):
    """Sink and first-in first-out cache of whole frames. A method sets `context` and `current` in `begin_block`."""

    def __init__(self, settings: W, inputs: PolicyInputs) -> None:
        super().__init__(settings, inputs)
        self.window = self.make_window()
        self.block = -1
        self.context: list[FrameRow] = []
        """Frames before the current block, in attention order."""
        self.current: list[FrameRow] = []
        """Frames of the current block."""

    def make_window(self) -> KVWindow:
        """The cache, empty: the sink, and as many frames behind it as the window has left."""
        window = self.settings.window
        return KVWindow(self.layout, self.settings.sink, None if window == -1 else window)

    @classmethod
    def check(cls, settings: W, frames_per_block: int) -> None:
        """The window must leave a block's worth of local frames after the sink."""
        check_local_room(settings.window, frames_per_block, sink=settings.sink)

    @classmethod
    def attended_frames(cls, settings: W, frames_per_block: int, first_frame: int) -> int:
        """What the window holds."""
        return frames_in_window(settings.window, frames_per_block, first_frame)

    def max_context_rows(self) -> int | None:
        """The window without the current block."""
        if self.settings.window == -1:
            return None
        return self.settings.window * self.layout.tokens_per_frame - self.layout.tokens_per_block

    def make_room(self, block: int) -> list[int]:
        """Drop the oldest frames behind the sink so that the block fits, and return them."""
        self.block = block
        if self.settings.window == -1:
            return []
        return self.window.drop_oldest(len(self.window.frames) + self.layout.frames_per_block - self.settings.window)

    def block_frames(self) -> list[int]:
        """Global frames of the current block."""
        first = self.block * self.layout.frames_per_block
        return list(range(first, first + self.layout.frames_per_block))

    def cached_rows(self, frames: list[int], temporal_indices: list[int]) -> list[FrameRow]:
        """Cached frames as sink or local rows."""
        sink = self.settings.sink
        return [
            FrameRow("sink" if frame < sink else "local", frame, index)
            for frame, index in zip(frames, temporal_indices, strict=True)
        ]

    def current_rows(self, temporal_indices: list[int]) -> list[FrameRow]:
        """The block's own frames with their temporal indices."""
        return [FrameRow("current", f, i) for f, i in zip(self.block_frames(), temporal_indices, strict=True)]

    def at_slots(self, context: list[FrameRow]) -> None:
        """Attend to `context`, then to the block, with temporal indices 0, 1, 2, … in this order."""
        past = len(context)
        self.context = [row._replace(temporal_index=i) for i, row in enumerate(context)]
        self.current = self.current_rows(list(range(past, past + self.layout.frames_per_block)))

    def query_indices(self) -> list[int]:
        """Temporal index of each frame of the current block."""
        return [row.temporal_index for row in self.current]

    def begin_expose(self) -> None:
        """Compute the turning angles, which all layers share."""
        self._angles = self.rope.frames([row.temporal_index for row in self.context])

    def expose(self, layer: int) -> Exposure:
        """The context's rows."""
        return Exposure(self.context_spans(layer), self._angles)

    def context_spans(self, layer: int) -> list[Span]:
        """Rows of `context` in one layer; all of them cached."""
        return self.window.spans(layer, [row.frame for row in self.context])

    def begin_store(self) -> None:
        """Make the block's frames part of the cache."""
        self.window.admit(self.block_frames())

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Cache the block's clean rows."""
        self.window.write(layer, self.block_frames(), k, v)

    def trace(self) -> list[TraceRow]:
        """Context, then the block's own frames that are attended to."""
        tokens = self.layout.tokens_per_frame
        return [
            TraceRow(self.block, ALL_LAYERS, row.kind, row.frame, row.temporal_index, tokens, row.similarity)
            for row in [*self.context, *(self.current[i] for i in self.own_frames())]
        ]
