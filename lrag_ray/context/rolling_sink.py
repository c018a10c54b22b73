"""Rolling Sink: a window with absolute indices whose old part shows the first frames again, forwards and backwards.

Notation: window W frames, n frames per block, R = W - n (the paper, arXiv 2602.07775, counts K = R / n cached blocks).
There is no static sink. A block attends to the blocks before it that are in its window, at their own temporal indices.
What is found there depends on the block, which begins at frame p:

- the newest past block, and every block of the first window (p < R): its own frames;
- every other one: frames of the first window. With r = p mod R these are r, r + 1, … where p div R is even, and
  R - r - 1, R - r - 2, … where it is odd, so that the content rolls to and fro without a jump.

At W = 12, n = 3 block 7 attends to 5@12 4@13 3@14 2@15 1@16 0@17 18@18 19@19 20@20 (frame @ index), and to itself. Only
the first R frames and the newest past block are kept. That all but one of the cached blocks roll is how the code was
released (S = K - 1, the paper's choice).

Temporal indices grow with the rollout; the table of rotations has 8192 rows here, as in the released code. The released
inference script repeats the noise of one block for all of them; here each block has noise of its own.

Follows the behaviour of haodong2000/RollingSink at d7fc0d9 (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from lrag_ray.context.frames import FramePolicy, FrameRow, check_limited, check_window
from lrag_ray.context.policy import Origin
from lrag_ray.context.window import KVWindow

TEMPORAL_INDICES = 8192
"""Rows of the released code's table of temporal rotations: 34 minutes."""


@dataclass(frozen=True)
class RollingSinkSettings:
    """Settings of rolling_sink; the default is the equal budget."""

    window: int = 12
    """Latent frames attended to (W), the current block included: a multiple of the block, at least two of them."""

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)
        check_limited(self.window)

    @property
    def sink(self) -> int:
        """Frames that are always attended to: none."""
        return 0


class RollingSink(FramePolicy[RollingSinkSettings]):
    """Keeps the newest frames and the first ones, which are shown again forwards and backwards."""

    Settings = RollingSinkSettings
    max_frames: ClassVar[int | None] = TEMPORAL_INDICES
    temporal_indices: ClassVar[int] = TEMPORAL_INDICES
    released: ClassVar[Mapping[str, Any]] = {"window": 21}
    origin = Origin("sink", "Rolling Sink, arXiv 2602.07775", "haodong2000/RollingSink", "Apache-2.0")
    restrictions: ClassVar[Sequence[str]] = ("window: a multiple of the block, at least two blocks",)

    @classmethod
    def check(cls, settings: RollingSinkSettings, frames_per_block: int) -> None:
        """The window must be whole blocks: the current one and at least one before it."""
        window, n = settings.window, frames_per_block
        if window % n or window < 2 * n:
            whole = max(2 * n, window // n * n)
            raise ValueError(f"window {window} must be 2 or more blocks of {n} latent frames: for example {whole}")

    def make_window(self) -> KVWindow:
        """The frames that roll, which stay, and the newest past block."""
        return KVWindow(self.layout, self._rolling, self._rolling + self.layout.frames_per_block)

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Lay out the window's blocks at their own indices."""
        self.block = block
        first = max(0, block + 1 - self.settings.window // self.layout.frames_per_block)
        self.context = [row for past in range(first, block) for row in self._block_rows(past)]
        self.current = self.current_rows(self.block_frames())

    def begin_store(self) -> None:
        """The newest past block has been exposed and gives its place to the current one."""
        self.window.drop_oldest(len(self.window.frames) - self._rolling)
        super().begin_store()

    def _block_rows(self, past: int) -> Iterator[FrameRow]:
        """What is shown in the place of a past block."""
        n, rolling = self.layout.frames_per_block, self._rolling
        start = past * n
        if past == self.block - 1 or start < rolling:
            yield from (FrameRow("local", frame, frame) for frame in range(start, start + n))
            return
        turn, r = divmod(start, rolling)
        for i in range(n):
            yield FrameRow("sink", rolling - 1 - r - i if turn % 2 else r + i, start + i)

    @property
    def _rolling(self) -> int:
        """Frames that roll (R)."""
        return self.settings.window - self.layout.frames_per_block
