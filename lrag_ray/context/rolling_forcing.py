"""Rolling Forcing: an anchor and the newest frames, behind a window of several blocks that are denoised at once.

The method (arXiv 2509.25161) denoises as many blocks together as there are denoising steps, each one step behind
the next; `rollout.rolling` states that loop. Here is what its two calls attend to. Notation: attention over W latent
frames, an anchor of A frames, n frames per block, Q frames in a window, which begins at frame c. All temporal indices
are absolute but the anchor's, which moves along (frames @ index):

    joint call, c = 0:  the window alone                                              @ 0 .. Q-1
    joint call, c > 0:  frames 0 .. A-1                                               @ c-L-A .. c-L-1
                        frames c-L .. c-1, the working frames, L = min(W-Q-A, c-A)    @ own
                        the window                                                    @ c .. c+Q-1
    clean call:         frames max(0, c+n-W) .. c-1 and the block                     @ own

So the anchor, raw keys of the first frames turned to new indices, always directly precedes the working frames, and no
call attends to more than W frames. Once c + n > W, the clean call no longer sees the whole anchor: the released code
does so, and the model was trained with it. At the release's W = 21, A = 3 and 4 steps a full window attends to 3 + 6
past frames and itself: as many past frames as the other methods at a window of 12.

Two models were trained this way: Rolling Forcing's, and Causal-Forcing's `longvideo.pt` (preset causal_forcing_long),
whose long-video code is the same. Follows the behaviour of thu-ml/Causal-Forcing at 1fc7bbc, long_video/, which is that
of TencentARC/RollingForcing at a1477d0. The licence of that folder (License Terms of RollingForcing) allows academic
use only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lrag_ray.context.frames import FramePolicy, FrameRow, check_limited, check_window
from lrag_ray.context.policy import Origin
from lrag_ray.context.window import KVWindow
from lrag_ray.wan.config import SamplerConfig
from lrag_ray.wan.rope import MAX_INDEX


@dataclass(frozen=True)
class RollingForcingSettings:
    """Settings of rolling_forcing; the defaults are those of the release."""

    window: int = 21
    """Latent frames attended to (W), those that are denoised together included."""
    anchor: int = 3
    """First latent frames, which are always attended to by the joint call (A): at most a block."""

    def __post_init__(self) -> None:
        check_window(self.window, self.anchor)
        check_limited(self.window)
        if self.anchor < 1:
            raise ValueError(f"anchor {self.anchor} must be at least 1")

    @property
    def sink(self) -> int:
        """First frames that are never dropped."""
        return self.anchor


class RollingForcing(FramePolicy[RollingForcingSettings]):
    """Keeps the first and the newest frames, and denoises several blocks at once behind them."""

    Settings = RollingForcingSettings
    loop: ClassVar[str] = "rolling"
    max_frames: ClassVar[int | None] = MAX_INDEX
    origin = Origin(
        "sampler",
        "Rolling Forcing, arXiv 2509.25161",
        "TencentARC/RollingForcing, as in thu-ml/Causal-Forcing long_video/",
        "academic use only",
    )
    restrictions: ClassVar[Sequence[str]] = (
        "window: the blocks denoised together (one per step) and the anchor, or more",
        "anchor: at most a block",
        "the same steps in every block",
    )

    @classmethod
    def check(cls, settings: RollingForcingSettings, frames_per_block: int) -> None:
        """The anchor must be finished before the second block is stored."""
        if settings.anchor > frames_per_block:
            raise ValueError(f"anchor {settings.anchor} is more than a block of {frames_per_block} latent frames")

    @classmethod
    def check_sampler(cls, settings: RollingForcingSettings, sampler: SamplerConfig) -> None:
        """The window must hold a block for each step, and the anchor."""
        super().check_sampler(settings, sampler)
        if sampler.first_block_denoising_steps is not None:
            raise ValueError("rolling windows take every block through the same steps: first_block_denoising_steps")
        steps, n = len(sampler.denoising_steps), sampler.frames_per_block
        if settings.window < steps * n + settings.anchor:
            raise ValueError(
                f"window {settings.window} is less than {steps} blocks of {n} latent frames, which are denoised "
                f"together in {steps} steps, and anchor {settings.anchor}: raise it to at least "
                f"{steps * n + settings.anchor}"
            )

    @classmethod
    def device_bytes(
        cls, settings: RollingForcingSettings, frames_per_block: int, total_frames: int, kv_bytes_per_frame: int
    ) -> int:
        """The anchor, which the cache holds beside the newest W frames."""
        return settings.anchor * kv_bytes_per_frame

    @classmethod
    def notes(cls, settings: RollingForcingSettings, frames_per_block: int) -> Iterable[str]:
        """The last blocks depend on the length, so durations are rollouts of their own."""
        yield (
            "rolling windows: the last blocks depend on where the rollout ends, so every duration is a rollout of its "
            "own, and the noisy latents of the blocks in flight are stored with each block"
        )

    def make_window(self) -> KVWindow:
        """The anchor and the newest W frames."""
        return KVWindow(self.layout, self.settings.anchor, self.settings.anchor + self.settings.window)

    def begin_window(self, first: int, last: int) -> None:
        """Lay out the joint call over blocks first .. last."""
        self.block, n = first, self.layout.frames_per_block
        start, end = first * n, (last + 1) * n
        self.context = []
        if first:
            anchor = self.settings.anchor
            working = start - min(self.settings.window - (end - start) - anchor, start - anchor)
            self.context = [FrameRow("sink", frame, working - anchor + frame) for frame in range(anchor)]
            self.context += self._at_own_index(working, start)
        self.current = [FrameRow("current", frame, frame) for frame in range(start, end)]

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Lay out the clean call over a block, and make room for it."""
        self.block, n = block, self.layout.frames_per_block
        start = block * n
        if not self._is_stored():
            self.window.drop_oldest(len(self.window.frames) + n - self.settings.anchor - self.settings.window)
        self.context = self._at_own_index(max(0, start + n - self.settings.window), start)
        self.current = self.current_rows(self.block_frames())

    def own_frames(self) -> list[int]:
        """All frames of the call."""
        return list(range(len(self.current)))

    def begin_store(self) -> None:
        """Block 0 is stored again until it is finished."""
        if not self._is_stored():
            super().begin_store()

    def _is_stored(self) -> bool:
        return self.block * self.layout.frames_per_block in self.window.frames

    def _at_own_index(self, first: int, end: int) -> list[FrameRow]:
        frames = list(range(first, end))
        return self.cached_rows(frames, frames)
