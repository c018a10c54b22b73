"""Forcing-KV: static heads keep the newest frames, dynamic heads also the patches of older frames that change most.

Notation: S sink frames, ar_start a, static_frames s, dynamic_frames t, patch_frames d, patches_per_frame P, retention
rho; n frames per block, f tokens per frame, block b starts at frame cs. Temporal indices are global frame numbers.

- Blocks b <= a, and layer 0 always, all heads: sink, the last max(s, t) past frames behind it, and the block.
- Blocks b > a, other layers: static heads attend to [sink | last s past frames | block], dynamic heads to
  [sink | kept patches | last t past frames | block].

Kept patches are chosen in the clean-context pass of every block b > a for block b+1, so block a+1 has none. Candidates
are the n frames that leave the last t by then, cs-t .. cs-t+n-1, each cut into P patches of f/P consecutive tokens. A
patch's score is the mean over its tokens of cos(x_i, x_i+1), with x_i the rotated keys of all dynamic heads of layer 1
at one token position of frame i, concatenated. The d·P patches of the least similarity are kept, in ascending order of
frame and patch, for every dynamic head of every layer. round(n·P·rho) must be d·P. If layer 1 has no dynamic heads, the
first layer behind it that has some decides. With compress off there are no patches.

Which heads are static is `static_heads`. The release has lists for its checkpoints, made from attention maps: a head is
static if the last 4 frames get at least 0.8 of its attention behind the sink. Without a list the heads are measured by
this rule in the clean-context pass of block a, with sampled queries and over all frames up to that block, which stay
cached until then.

Training-free. Released with S = s = t = d = 1, P = 6, rho = 0.33, and a = 1, 2 or 4; its buffers are right for
s, t <= n, ours for any. The defaults attend to 12 frames like the other methods. P = 8 divides the tokens of all
generators that come with this package. Paper: arXiv 2605.09681. Follows the behaviour of zju-jiyicheng/Forcing-KV at
50ac1f4 (Apache-2.0; its file headers say CC-BY-NC-SA-4.0).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrag_ray.context.heads import Classification, HeadGroup, HeadPolicy, head_groups
from lrag_ray.context.policy import Exposure, Origin, PolicyInputs, Span
from lrag_ray.context.trace import TraceRow
from lrag_ray.retrieval.similarity import HostCopy
from lrag_ray.wan.rope import MAX_INDEX, Angles
from lrag_ray.wan.transfer import to_device

DYNAMIC, STATIC = 0, 1
"""Classes of heads."""
NEWEST = 4
"""Frames whose attention makes a head static."""
STATIC_SHARE = 0.8
"""Least share of the attention behind the sink that they get in a static head."""


@dataclass(frozen=True)
class ForcingKvSettings:
    """Settings of forcing_kv; by default every head attends to 12 frames, the budget of the other methods."""

    ar_start: int = 3
    """Last block in which all heads attend to the same rows (a)."""
    sink: int = 1
    """First latent frames, which are never dropped (S)."""
    static_frames: int = 8
    """Past frames of a static head (s)."""
    dynamic_frames: int = 7
    """Past frames of a dynamic head (t)."""
    patch_frames: int = 1
    """Frames' worth of patches that a dynamic head keeps (d)."""
    patches_per_frame: int = 8
    """Patches that a frame is cut into (P); must divide its tokens."""
    retention: float = 0.33
    """Share of the candidates' patches that is kept (rho): d of the n frames of a block."""
    compress: bool = True
    """Keep patches; off, dynamic heads have sink and past frames alone."""
    static_heads: tuple[tuple[int, ...], ...] | None = None
    """Static heads of each layer, the others are dynamic; null measures them in block a."""

    def __post_init__(self) -> None:
        for name in ("static_frames", "dynamic_frames", "patches_per_frame"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        for name in ("ar_start", "sink", "patch_frames"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} {getattr(self, name)} must not be negative")
        if self.compress and self.patch_frames == 0:
            raise ValueError("patch_frames 0 keeps nothing: give at least 1, or compress: false")
        for layer, heads in enumerate(self.static_heads or ()):
            if len(set(heads)) < len(heads) or min(heads, default=0) < 0:
                raise ValueError(f"static_heads of layer {layer}, {list(heads)}, must be different numbers from 0")

    @property
    def kept_frames(self) -> int:
        """Frames' worth of patches that a dynamic head attends to."""
        return self.patch_frames if self.compress else 0

    @property
    def shared_frames(self) -> int:
        """Past frames behind the sink where all heads attend to the same."""
        return max(self.static_frames, self.dynamic_frames)

    def past_frames(self, frames_per_block: int) -> int:
        """Past frames behind the sink that a block needs: those it attends to and those its patches come from."""
        return max(self.shared_frames, self.dynamic_frames + (frames_per_block if self.compress else 0))


class _Patches(NamedTuple):
    """What a clean-context pass chose for the block after it."""

    first: int
    """First candidate frame."""
    patches: HostCopy
    """Chosen patches, ascending: candidate · P + patch."""
    tokens: Tensor
    """Their tokens, counted from the first candidate's first one; on the device."""
    scores: HostCopy | None
    """Similarity [candidates, P]; None where the choice was stored."""


class ForcingKv(HeadPolicy[ForcingKvSettings]):
    """Keeps the first and the newest frames and, in some heads, the patches of older frames that change most."""

    Settings = ForcingKvSettings
    max_frames: ClassVar[int | None] = MAX_INDEX
    released: ClassVar[Mapping[str, Any]] = {
        "ar_start": 2, "static_frames": 1, "dynamic_frames": 1, "patches_per_frame": 6,
    }  # fmt: skip
    origin = Origin("per head", "Forcing-KV, arXiv 2605.09681", "zju-jiyicheng/Forcing-KV", "Apache-2.0")
    restrictions: ClassVar[Sequence[str]] = (
        "round(frames per block · patches_per_frame · retention) = patch_frames · patches_per_frame",
        "patches_per_frame divides a frame's tokens",
    )

    @classmethod
    def check(cls, settings: ForcingKvSettings, frames_per_block: int) -> None:
        """Retention must be that of the kept patches; measuring heads takes frames behind the newest ones."""
        at, n = settings, frames_per_block
        candidates, wanted = n * at.patches_per_frame, at.patch_frames * at.patches_per_frame
        kept = round(candidates * at.retention)
        if at.compress and not kept == wanted <= candidates:
            raise ValueError(
                f"retention {at.retention} keeps {kept} of the {candidates} patches of a block's {n} latent frames, "
                f"but patch_frames {at.patch_frames} means {wanted}: set patch_frames to at most {n} and retention to "
                f"{min(1, at.patch_frames / n):.4g}"
            )
        behind = (at.ar_start + 1) * n - at.sink
        if at.static_heads is None and behind <= NEWEST:
            raise ValueError(
                f"ar_start {at.ar_start} leaves {behind} latent frames behind the sink to tell static heads by, which "
                f"takes more than {NEWEST}: raise ar_start or give static_heads"
            )

    @classmethod
    def check_model(cls, settings: ForcingKvSettings, layers: int, heads: int, tokens_per_frame: int) -> None:
        """Heads must exist in every layer, and patches must be whole."""
        at, patches = settings, settings.patches_per_frame
        if at.compress and tokens_per_frame % patches:
            fitting = [p for p in range(1, 17) if not tokens_per_frame % p]
            raise ValueError(
                f"patches_per_frame {patches} does not divide the {tokens_per_frame} tokens of a latent frame: "
                f"use one of {', '.join(map(str, fitting))}"
            )
        if at.static_heads is None:
            return
        if len(at.static_heads) != layers:
            raise ValueError(f"static_heads has {len(at.static_heads)} layers, the generator {layers}")
        for layer, static in enumerate(at.static_heads):
            if static and max(static) >= heads:
                raise ValueError(f"static_heads of layer {layer}, {list(static)}: a layer has heads 0 to {heads - 1}")

    @classmethod
    def attended_frames(cls, settings: ForcingKvSettings, frames_per_block: int, first_frame: int) -> int:
        """By dynamic or static heads, whichever attend to more."""
        at, n = settings, frames_per_block
        past = max(0, first_frame - at.sink)
        behind = min(past, at.shared_frames)
        if first_frame > at.ar_start * n:
            behind = min(past, max(at.shared_frames, at.dynamic_frames + at.kept_frames))
        return min(first_frame, at.sink) + behind + n

    @classmethod
    def device_bytes(
        cls, settings: ForcingKvSettings, frames_per_block: int, total_frames: int, kv_bytes_per_frame: int
    ) -> int:
        """Cached frames that are not attended to: those that patches are chosen from, or that heads are measured on."""
        attended = cls.attended_frames(settings, frames_per_block, max(0, total_frames - frames_per_block))
        return max(0, cls._capacity(settings, frames_per_block) - attended) * kv_bytes_per_frame

    @classmethod
    def notes(cls, settings: ForcingKvSettings, frames_per_block: int) -> Iterable[str]:
        """Where the classes of heads come from."""
        if settings.static_heads is None:
            yield (
                f"static heads are measured in block {settings.ar_start} of every rollout; static_heads takes a list "
                "for the checkpoint instead"
            )

    @classmethod
    def _capacity(cls, settings: ForcingKvSettings, n: int) -> int:
        """Frames of the cache: sink, candidates and past frames, the block; all frames until heads are measured."""
        steady = settings.sink + settings.past_frames(n) + n
        return steady if settings.static_heads is not None else max(steady, (settings.ar_start + 1) * n)

    def __init__(self, settings: ForcingKvSettings, inputs: PolicyInputs) -> None:
        n = inputs.layout.frames_per_block
        super().__init__(settings, inputs, sink=settings.sink, capacity=self._capacity(settings, n))
        if settings.static_heads is not None:
            self.classes = [
                [STATIC if head in static else DYNAMIC for head in range(self.layout.num_heads)]
                for static in settings.static_heads
            ]
        self.chosen: _Patches | None = None
        """The newest choice, made for the block after the one that stored it."""
        self._used: _Patches | None = None
        """The choice that the current block attends to."""
        self._patch_rows: tuple[Tensor, Tensor] = (torch.empty(0), torch.empty(0))

    def max_context_rows(self) -> int | None:
        """Sink and past frames, or sink, patches and past frames."""
        at = self.settings
        frames = at.sink + max(at.shared_frames, at.dynamic_frames + at.kept_frames)
        return frames * self.layout.tokens_per_frame

    def classifies(self) -> Classification | None:
        """By the newest frames against all others behind the sink."""
        at, f = self.settings, self.layout.tokens_per_frame
        if at.static_heads is not None:
            return None
        return Classification(at.ar_start, at.sink * f, NEWEST * f, max(1, self.layout.tokens_per_block // 3), 2)

    def classify(self, shares: Tensor) -> Tensor:
        """Static where the newest frames get most of the attention behind the sink."""
        middle, newest = shares[..., 1].double(), shares[..., 2].double()
        return torch.where(newest >= STATIC_SHARE * (middle + newest), STATIC, DYNAMIC)

    def cached_frames(self, block: int) -> int:
        """Those that a block attends to and those that its patches come from."""
        if self.classification is not None and block <= self.classification.block:
            return block * self.layout.frames_per_block
        return self.settings.past_frames(self.layout.frames_per_block)

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Take over the patches that were chosen for this block."""
        super().begin_block(block, state)
        self._used, self.chosen = self.chosen, None
        if state and "patches" in state and self._used is not None:
            self._used = self._stored(state["patches"], self._used.first)

    def groups(self, layer: int) -> list[HeadGroup]:
        """All heads alike up to block a and in layer 0; then static and dynamic ones."""
        at, past = self.settings, self.past
        if self.block <= at.ar_start or layer == 0 or self.classes is None:
            return [HeadGroup(None, self.sink_frames + past[-at.shared_frames :])]
        static = self.sink_frames + past[-at.static_frames :]
        dynamic = self.sink_frames + past[-at.dynamic_frames :]
        return [
            HeadGroup(heads, static) if each == STATIC else HeadGroup(heads, dynamic, self._used is not None)
            for each, heads in head_groups(self.classes[layer]).items()
        ]

    def begin_expose(self) -> None:
        """Angles of the patches, which all layers share."""
        super().begin_expose()
        if self._used is not None:
            frame, token = self._used.first + self._used.tokens // self._f, self._used.tokens % self._f
            self._patch_angles = self.rope.tokens(frame, token)

    def exposure(self, layer: int, group: HeadGroup) -> Exposure:
        """Sink, patches, past frames."""
        used = self._used
        if not group.selected or used is None:
            return super().exposure(layer, group)
        sinks = len(self.sink_frames)
        sink, local = group.frames[:sinks], group.frames[sinks:]
        patches = self._rows(layer, self._candidates(used.first), used.tokens)
        spans = [*self.window.spans(layer, sink), patches, *self.window.spans(layer, local)]
        turns = [self.angles(sink).turns, self._patch_angles.turns, self.angles(local).turns]
        return Exposure(spans, Angles(torch.cat(turns)), group.heads)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Cache the block's clean rows; choose the next block's patches in the layer that decides."""
        super().store(layer, k, v)
        if self.settings.compress and self.block > self.settings.ar_start and layer == self._deciding_layer():
            self.chosen = self._choose(layer)

    def group_rows(self, layer: int, group: HeadGroup) -> list[TraceRow]:
        """Trace of one group: frames with the number of their kept tokens between sink and past frames."""
        rows, used = super().group_rows(layer, group), self._used
        if not group.selected or used is None:
            return rows
        sinks, size = len(self.sink_frames), self._f // self.settings.patches_per_frame
        frames = [used.first + patch // self.settings.patches_per_frame for patch in used.patches.read().tolist()]
        kept = [
            TraceRow(self.block, layer, "compressed", frame, frame, size * frames.count(frame), None, group.heads)
            for frame in sorted(set(frames))
        ]
        return [*rows[:sinks], *kept, *rows[sinks:]]

    def block_state(self) -> dict[str, Tensor]:
        """The patches that the block attends to, beside the classes: scores may round differently elsewhere."""
        state = super().block_state()
        return state if self._used is None else {**state, "patches": self._used.patches.read().to(torch.int32)}

    @property
    def _f(self) -> int:
        return self.layout.tokens_per_frame

    def _deciding_layer(self) -> int | None:
        """The first layer behind layer 0 with a dynamic head."""
        classes = self.classes or []
        return next((layer for layer in range(1, len(classes)) if DYNAMIC in classes[layer]), None)

    def _candidates(self, first: int) -> list[int]:
        """Cached frames behind the sink that the patches of one choice may come from."""
        end = first + self.layout.frames_per_block
        return [frame for frame in self.past if first <= frame < end]

    def _choose(self, layer: int) -> _Patches | None:
        """The patches that differ most from the frame after them; None where no frame has left yet."""
        at, classes = self.settings, self.classes
        assert classes is not None
        first = self.block * self.layout.frames_per_block - at.dynamic_frames
        end = first + self.layout.frames_per_block
        frames = [frame for frame in self.window.frames[at.sink :] if first <= frame <= end]
        if len(frames) < 2:
            return None
        dynamic = [head for head, each in enumerate(classes[layer]) if each == DYNAMIC]
        keys = self.rotated_keys(layer, frames).float()
        if len(dynamic) < self.layout.num_heads:
            keys = keys.index_select(1, to_device(torch.tensor(dynamic), keys.device))
        keys = keys.flatten(1).unflatten(0, (len(frames), self._f))
        similar = F.cosine_similarity(keys[:-1], keys[1:], dim=-1)
        scores = similar.unflatten(1, (at.patches_per_frame, -1)).mean(dim=-1)
        count = min(at.patch_frames * at.patches_per_frame, scores.numel())
        chosen = torch.sort(scores.flatten(), stable=True).indices[:count].sort().values
        return _Patches(frames[0], HostCopy(chosen), self._tokens(chosen), HostCopy(scores))

    def _tokens(self, patches: Tensor) -> Tensor:
        """Tokens of patches [m], in their order."""
        size = self._f // self.settings.patches_per_frame
        return (patches[:, None] * size + torch.arange(size, device=patches.device)).flatten()

    def _stored(self, patches: Tensor, first: int) -> _Patches:
        """A choice out of a stored state; ValueError where it does not fit."""
        limit = len(self._candidates(first)) * self.settings.patches_per_frame
        chosen = patches.long()
        if chosen.dim() != 1 or not len(chosen) or int(chosen.min()) < 0 or int(chosen.max()) >= limit:
            raise ValueError(f"block {self.block}: its stored patches do not fit this method and generator")
        return _Patches(first, HostCopy(chosen), self._tokens(to_device(chosen, self.layout.device)), None)

    def _rows(self, layer: int, frames: list[int], tokens: Tensor) -> Span:
        """Single tokens of cached frames."""
        k, v = (
            torch.cat([self.window.rows(frame)[side, layer] for frame in frames]).index_select(0, tokens)
            for side in (0, 1)
        )
        return Span(k, v)
