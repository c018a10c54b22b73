"""EMA sink of Reward Forcing: the frames of ∞-RoPE, with a sink that slowly takes over the frames that leave.

Notation of the paper (arXiv 2512.04678): window W, sink S, decay alpha; n frames per block. Frames and temporal indices
are those of ∞-RoPE. In addition, before a block that makes frames E_0, E_1, … leave the window (oldest first), in every
layer and for every token position, with unrotated keys and values:

    sink_i = alpha · sink_i + (1 - alpha) · E_j,    i = j mod S,    j = 0, 1, …

The released code has this rule for as many leaving frames as sink frames (S = n). For any other number it replaces the
sink by the frames that have just left, a defect that is not offered here: the rule above is the same where S = n and
goes on averaging elsewhere. Fused sink frames keep the labels 0 .. S-1 in traces.

The sink is kept in float32. In bfloat16, the released precision, an update of 0.001 is mostly rounded away: after 80
updates the sink has moved by a tenth of what it should.

The released model (rewardforcing.pt, window 9, sink 3) was trained with this sink; as a context method it runs on any
backbone. Follows the behaviour of JaydenLyh/Reward-Forcing at 4317f5a (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from lrag_ray.context.frames import FramePolicy, check_limited, check_window
from lrag_ray.context.policy import Origin, PolicyInputs, Span


@dataclass(frozen=True)
class EmaSinkSettings:
    """Settings of ema_sink; the decay is the released one, window and sink are those of the equal budget."""

    window: int = 12
    """Latent frames attended to (W), the current block included."""
    sink: int = 1
    """First latent frames, which take over those that leave (S); from 1 to a block."""
    alpha: float = 0.999
    """What a sink frame keeps of itself at an update."""

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)
        check_limited(self.window)
        if self.sink == 0:
            raise ValueError("sink 0: this method averages frames into the sink, so it needs at least 1")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha {self.alpha} must be from 0 to 1")


class EmaSink(FramePolicy[EmaSinkSettings]):
    """Keeps the newest frames and a sink into which every frame that leaves is averaged."""

    Settings = EmaSinkSettings
    released: ClassVar[Mapping[str, Any]] = {"window": 9, "sink": 3}
    origin = Origin("sink", "Reward Forcing, arXiv 2512.04678", "JaydenLyh/Reward-Forcing", "Apache-2.0")
    restrictions: ClassVar[Sequence[str]] = ("a limited window; sink from 1 to a block (released: a block)",)

    @classmethod
    def check(cls, settings: EmaSinkSettings, frames_per_block: int) -> None:
        """The sink must be part of the first block, and the window leave a block behind it."""
        super().check(settings, frames_per_block)
        if settings.sink > frames_per_block:
            raise ValueError(
                f"sink {settings.sink} exceeds a block's {frames_per_block} latent frames, the most that leave at a "
                f"time: lower it to {frames_per_block}"
            )

    @classmethod
    def device_bytes(
        cls, settings: EmaSinkSettings, frames_per_block: int, total_frames: int, kv_bytes_per_frame: int
    ) -> int:
        """The sink in float32."""
        return 2 * settings.sink * kv_bytes_per_frame

    @classmethod
    def notes(cls, settings: EmaSinkSettings, frames_per_block: int) -> Iterator[str]:
        """Where the rule goes beyond the released one."""
        if settings.sink != frames_per_block:
            yield (
                f"sink {settings.sink} is not a block's {frames_per_block} latent frames, where the released code "
                "replaces its sink instead of averaging; here it is averaged, which no published result shows"
            )

    def __init__(self, settings: EmaSinkSettings, inputs: PolicyInputs) -> None:
        super().__init__(settings, inputs)
        self._sink: Tensor | None = None
        """Unrotated K and V [S, 2, layers, f, H, head_dim] in float32, once frames have left."""

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Average what leaves into the sink, and attend to everything at its slot number."""
        self._fuse(self.make_room(block))
        cached = list(self.window.frames)
        self.at_slots(self.cached_rows(cached, cached))

    def context_spans(self, layer: int) -> list[Span]:
        """Rows of the averaged sink and of the window in one layer."""
        if self._sink is None:
            return super().context_spans(layer)
        sink = self._sink[:, :, layer].to(self.layout.dtype)
        local = [row.frame for row in self.context if row.kind == "local"]
        return [Span(sink[:, 0], sink[:, 1]), *self.window.spans(layer, local)]

    def _fuse(self, leaving: list[int]) -> None:
        """The rule, for all layers at once."""
        at = self.settings
        if leaving and self._sink is None:
            self._sink = torch.stack([self.window.rows(frame).float() for frame in range(at.sink)])
        for j, frame in enumerate(leaving):
            assert self._sink is not None
            self._sink[j % at.sink].mul_(at.alpha).add_(self.window.rows(frame), alpha=1 - at.alpha)
