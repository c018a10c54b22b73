"""Deep Forcing: a deep sink that is moved along, and per-layer compression of the cache to the most attended tokens.

Notation: window M frames, sink S, budget N, recent R, n frames per block, f tokens per frame, block start cs. Rows are
single tokens, and every layer keeps its own. Temporal indices are absolute, except for the sink.

Participative Compression runs in the first pass of a block, where the cache and the block together exceed M frames.
Of [cached rows | current rows] it keeps the sink, the R newest frames (the block's own n included) and of the rest the
C best rows, C = N_eff - S - R frames with N_eff = max(min(N, M), S + R). A row's score is the raw dot product of its
rotated key with the sum of the rotated queries of the last R frames of queries seen: this pass's n frames, before
them the newest of the previous block's clean-context pass. A row that was selected `max_reuse` times is not eligible;
then fewer are kept. Kept rows stay in temporal order.

Deep Sink: at a compression the sink moves so that its first frame has index cs - floor(kept rows behind the sink,
current ones included, / f) - S. The released code moves it at the first compression by the constant 21 - N instead,
which is the same at M = 21 and misplaces it for good elsewhere (`first_sink_offset: released`).

All of it runs on the device. How many rows a layer keeps decides the shapes of its tensors, so the host must know it:
the number of eligible rows is settled by the compression before, and is copied to the host a block ahead. Traces and
stored selections are copied in the first pass of a block and read at its end.

With `compression` off only the sink is deep: oldest rows leave first, and the sink's first index is cs - M, counted
from the first block that drops rows.

Training-free on any backbone. Paper: arXiv 2512.05081. Follows the behaviour of cvlab-kaist/DeepForcing (Apache-2.0).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lrag_ray.context.frames import check_local_room, check_window, frames_in_window
from lrag_ray.context.policy import ContextPolicy, Exposure, Layout, Origin, PolicyInputs, Span
from lrag_ray.context.trace import RowKind, TraceRow
from lrag_ray.retrieval.similarity import HostCopy
from lrag_ray.wan.rope import MAX_INDEX, rotate
from lrag_ray.wan.transfer import to_device

RELEASED_WINDOW = 21
"""Window that the released constant of the first sink move was written for."""


@dataclass(frozen=True)
class DeepForcingSettings:
    """Settings of deep_forcing; the defaults spend the same budget as the paper's other methods."""

    window: int = 12
    """Capacity of the cache in latent frames (M), the current block included; -1 never compresses."""
    sink: int = 1
    """First latent frames, which are never dropped (S)."""
    budget: int = 12
    """Frames' worth of rows kept by a compression (N)."""
    recent: int = 4
    """Newest frames kept whole, the current block included, and the frames of queries that score (R)."""
    max_reuse: int = 7
    """Compressions that a row may be selected in."""
    compression: bool = True
    """Select rows by score; off, the oldest leave first (deep sink only)."""
    first_sink_offset: Literal["aligned", "released"] = "aligned"
    """Where the first compression puts the sink: where all later ones put it, or by the released constant."""

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)
        for name in ("budget", "recent", "max_reuse"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)} must be at least 1")
        if self.compression and self.window != -1 and self.sink + self.recent > self.window:
            raise ValueError(f"sink {self.sink} and recent {self.recent} together exceed the window {self.window}")


class DeepForcing(ContextPolicy[DeepForcingSettings]):
    """Keeps the first and the newest frames and, in every layer, the tokens between them that attention uses most."""

    Settings = DeepForcingSettings
    max_frames: ClassVar[int | None] = MAX_INDEX
    origin = Origin("compression", "Deep Forcing, arXiv 2512.05081", "cvlab-kaist/DeepForcing", "Apache-2.0")

    @classmethod
    def check(cls, settings: DeepForcingSettings, frames_per_block: int) -> None:
        """The window must hold a block behind the sink, the recent frames the whole current block."""
        check_local_room(settings.window, frames_per_block, sink=settings.sink)
        if settings.compression and settings.recent < frames_per_block:
            raise ValueError(f"recent {settings.recent} must be at least a block's {frames_per_block} latent frames")

    @classmethod
    def attended_frames(cls, settings: DeepForcingSettings, frames_per_block: int, first_frame: int) -> int:
        """What the window holds."""
        return frames_in_window(settings.window, frames_per_block, first_frame)

    def __init__(self, settings: DeepForcingSettings, inputs: PolicyInputs) -> None:
        super().__init__(settings, inputs)
        self.observes_queries = settings.compression and settings.window != -1
        capacity = None if settings.window == -1 else self._capacity
        self._layers = [_LayerCache(self.layout, capacity, settings.recent) for _ in range(self.layout.num_layers)]
        self._block, self._start = -1, 0
        self._replayed: dict[str, Tensor] | None = None
        self._eligible: HostCopy | None = None
        """Per layer, rows that the next compression may select."""
        self._selected: HostCopy | None = None
        """Per layer, which candidates the current block's compression selected: bits, packed."""
        self._attended: HostCopy | None = None
        """Per layer, attended rows of each frame before the current block."""

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Remember where the block starts; each layer compresses when it is exposed."""
        self._start = block * self.layout.frames_per_block
        self._block = block
        self._replayed = state
        self._selected = None

    def query_indices(self) -> list[int]:
        """Global frame numbers."""
        return list(range(self._start, self._start + self.layout.frames_per_block))

    def observe_queries(self, layer: int, q: Tensor, q_rotated: Tensor) -> None:
        """Keep the sum of the rotated queries of each of the last R frames."""
        frames = q_rotated.float().unflatten(0, (-1, self.layout.tokens_per_frame)).sum(dim=1)
        self._layers[layer].query_sums.extend(frames.unbind(0))

    def max_context_rows(self) -> int | None:
        """The window without the current block."""
        if self.settings.window == -1:
            return None
        return self.settings.window * self.layout.tokens_per_frame - self.layout.tokens_per_block

    def begin_expose(self) -> None:
        """How many rows each layer's compression may choose among."""
        self._counts = None if self._eligible is None else self._eligible.read().tolist()

    def expose(self, layer: int) -> Exposure:
        """Make room in this layer, then expose everything that is cached."""
        cache = self._layers[layer]
        cache.selected = None
        if self.settings.window != -1 and cache.rows + self.layout.tokens_per_block > self._capacity:
            if self.settings.compression:
                self._compress(layer, cache)
            else:
                self._drop_oldest(cache)
        cache.exposed = cache.rows
        sink = self._sink_rows(cache)
        index = torch.cat([cache.frame[:sink] + cache.sink_start, cache.frame[sink:]])
        return Exposure([Span(cache.k, cache.v)], self.rope.tokens(index, cache.token))

    def end_expose(self) -> None:
        """Send to the host what the block's end and the next block need to know."""
        # Rows are in temporal order, so a frame's are those between two positions.
        edges = torch.arange(self._start + 1, device=self.layout.device)
        rows = [torch.searchsorted(cache.frame[: cache.exposed], edges).diff() for cache in self._layers]
        self._attended = HostCopy(torch.stack(rows))
        chosen = [cache.selected for cache in self._layers if cache.selected is not None]
        if chosen:
            length = max(len(each) for each in chosen)
            self._selected = HostCopy(_packed(torch.stack([F.pad(each, (0, length - len(each))) for each in chosen])))
        if self.observes_queries:
            self._eligible = HostCopy(torch.stack([self._next_eligible(cache) for cache in self._layers]))

    def _next_eligible(self, cache: _LayerCache) -> Tensor:
        """Rows that may be selected by the compression of the next block, which then holds this one's rows too."""
        held, f = cache.exposed, self.layout.tokens_per_frame
        first, end = self.settings.sink * f, held + 2 * self.layout.tokens_per_block - self.settings.recent * f
        unused = max(0, end - max(first, held))
        return (cache.reused[first : min(end, held)] < self.settings.max_reuse).sum() + unused

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Append the block's clean rows."""
        f, n = self.layout.tokens_per_frame, self.layout.frames_per_block
        if layer == 0:
            device = self.layout.device
            self._frame = torch.arange(self._start, self._start + n, device=device).repeat_interleave(f)
            self._token = torch.arange(f, device=device).repeat(n)
        self._layers[layer].append(k, v, self._frame, self._token)

    def end_block(self) -> None:
        """After replay, take over the query sums that clean-context passes alone do not give."""
        for layer, cache in enumerate(self._layers):
            if self._replayed and f"query_sums.{layer}" in self._replayed:
                cache.query_sums.clear()
                cache.query_sums.extend(self._replayed[f"query_sums.{layer}"].to(self.layout.device).unbind(0))

    def trace(self) -> list[TraceRow]:
        """Frames with their number of attended tokens, layer by layer."""
        assert self._attended is not None, "a block is exposed before it is traced"
        rows = []
        for layer, (cache, counts) in enumerate(zip(self._layers, self._attended.read().tolist(), strict=True)):
            for frame, count in enumerate(counts):
                if not count:
                    continue
                kind: RowKind = "compressed" if frame < cache.compressed_before else "local"
                index = frame
                if frame < self.settings.sink:
                    kind, index = "sink", frame + cache.sink_start
                rows.append(TraceRow(self._block, layer, kind, frame, index, count, None))
            for frame in self.query_indices():
                rows.append(TraceRow(self._block, layer, "current", frame, frame, self.layout.tokens_per_frame, None))
        return rows

    def block_state(self) -> dict[str, Tensor]:
        """Rows that each layer's compression selected: ``selected`` [layers, bytes], see `selected_rows`.

        They depend on the queries of a noisy pass, which clean latents cannot rebuild.
        """
        state = {} if self._selected is None else {"selected": self._selected.read()}
        if self.observes_queries and self.settings.recent > 2 * self.layout.frames_per_block:
            # Scores then reach behind the clean-context pass, into passes that replay does not run.
            for i, cache in enumerate(self._layers):
                state[f"query_sums.{i}"] = torch.stack(list(cache.query_sums)).cpu()
        return state

    def selected_rows(self, state: Mapping[str, Tensor], layer: int) -> Tensor | None:
        """Indices into [cached rows | current rows] that `layer` selected, from a block's state; None for none.

        A set bit i of ``selected`` (low bits first) is row sink · f + i. Earlier versions stored the indices, as
        ``selected.<layer>``.
        """
        if f"selected.{layer}" in state:
            return state[f"selected.{layer}"].long()
        if "selected" not in state or layer >= len(state["selected"]):
            return None
        return _unpacked(state["selected"][layer]).nonzero()[:, 0] + self.settings.sink * self.layout.tokens_per_frame

    def _compress(self, layer: int, cache: _LayerCache) -> None:
        """Keep sink, best rows and recent rows of one layer, and move the sink along."""
        at, f = self.settings, self.layout.tokens_per_frame
        total = cache.rows + self.layout.tokens_per_block
        kept = min(max(min(at.budget, at.window), at.sink + at.recent) * f, total)
        first, end = at.sink * f, total - at.recent * f
        device = self.layout.device
        if self._replayed is not None:
            stored = self.selected_rows(self._replayed, layer)
            if stored is None or not _within(stored, first, end):
                raise ValueError(f"block {self._block}: its stored state does not fit layer {layer} of this method")
            selected = to_device(stored, device)
        else:
            assert self._counts is not None, "a block is exposed before the next one compresses"
            count = min(kept - (at.sink + at.recent) * f, self._counts[layer])
            selected = self._best(cache, first, end, count)
        cache.selected = torch.zeros(end - first, dtype=torch.bool, device=device)
        cache.selected.index_fill_(0, selected - first, True)
        cache.reused[first:end] += cache.selected
        sink, recent = torch.arange(first, device=device), torch.arange(end, cache.rows, device=device)
        cache.keep(torch.cat([sink, selected, recent]))
        cache.compressed_before = self._start + self.layout.frames_per_block - at.recent
        behind_sink = cache.rows - first + self.layout.tokens_per_block
        first_index = RELEASED_WINDOW - at.budget if at.first_sink_offset == "released" else None
        cache.move_sink(self._start - behind_sink // f - at.sink, first_index)

    def _best(self, cache: _LayerCache, first: int, end: int, count: int) -> Tensor:
        """The `count` best eligible rows of first .. end-1, ascending."""
        angles = self.rope.tokens(cache.frame[first:end], cache.token[first:end])
        keys = rotate(cache.k[first:end], angles).float()
        queries = torch.stack(list(cache.query_sums)).sum(dim=0)
        scores = (keys * queries).sum(dim=(1, 2)) / (math.sqrt(self.layout.head_dim) * self.layout.num_heads)
        scores = scores.masked_fill(cache.reused[first:end] >= self.settings.max_reuse, -math.inf)
        best = torch.sort(scores, descending=True, stable=True).indices[:count]
        return best.sort().values + first

    def _drop_oldest(self, cache: _LayerCache) -> None:
        """Deep sink without compression: first in, first out behind a sink that moves along."""
        first = self._sink_rows(cache)
        excess = cache.rows + self.layout.tokens_per_block - self._capacity
        device = self.layout.device
        behind = torch.arange(first + excess, cache.rows, device=device)
        cache.keep(torch.cat([torch.arange(first, device=device), behind]))
        # The released code leaves the sink where it is at the first drop and moves it by differences from there.
        cache.move_sink(self._start - self.settings.window, 0)

    @property
    def _capacity(self) -> int:
        return self.settings.window * self.layout.tokens_per_frame

    def _sink_rows(self, cache: _LayerCache) -> int:
        return min(self.settings.sink * self.layout.tokens_per_frame, cache.rows)


class _LayerCache:
    """Unrotated rows of one layer, oldest first, with what is known of each row."""

    def __init__(self, layout: Layout, capacity: int | None, recent: int) -> None:
        """`capacity` in rows, or None to grow without bound."""
        self._layout = layout
        self._kv = self._allocate(capacity if capacity is not None else 4 * layout.tokens_per_block)
        self.rows = 0
        none = torch.empty(0, dtype=torch.long, device=layout.device)
        self.frame = none
        """Global frame of each row."""
        self.token = none
        """Position of each row in its frame."""
        self.reused = none
        """Compressions that each row was selected in."""
        self.selected: Tensor | None = None
        """Whether the current block's compression selected each of its candidates."""
        self.exposed = 0
        """Rows that the current block attends to, its own not counted."""
        self.compressed_before = 0
        """Frames below this one were candidates of the last compression."""
        self.query_sums: deque[Tensor] = deque(maxlen=recent)
        """Sum of the rotated queries [H, head_dim] of each of the newest frames of queries."""
        self.sink_start = 0
        """Temporal index of the first sink frame."""
        self._sink_offset: int | None = None

    @property
    def k(self) -> Tensor:
        """Keys [rows, H, head_dim]."""
        return self._kv[0, : self.rows]

    @property
    def v(self) -> Tensor:
        """Values [rows, H, head_dim]."""
        return self._kv[1, : self.rows]

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (ascending)."""
        self._kv[:, : len(rows)] = self._kv[:, rows]
        self.rows = len(rows)
        self.frame, self.token, self.reused = self.frame[rows], self.token[rows], self.reused[rows]

    def append(self, k: Tensor, v: Tensor, frame: Tensor, token: Tensor) -> None:
        """Add rows that were never selected."""
        end = self.rows + len(k)
        if end > self._kv.shape[1]:
            larger = self._allocate(2 * end)
            larger[:, : self.rows] = self._kv[:, : self.rows]
            self._kv = larger
        self._kv[0, self.rows : end] = k
        self._kv[1, self.rows : end] = v
        self.rows = end
        self.frame, self.token = torch.cat([self.frame, frame]), torch.cat([self.token, token])
        self.reused = torch.cat([self.reused, torch.zeros_like(frame)])

    def move_sink(self, start: int, first_start: int | None) -> None:
        """Put the sink at `start`; the first move goes to `first_start` if given, and later ones keep that error."""
        if self._sink_offset is None:
            self._sink_offset = 0 if first_start is None else first_start - start
        self.sink_start = start + self._sink_offset

    def _allocate(self, rows: int) -> Tensor:
        at = self._layout
        return torch.empty((2, rows, at.num_heads, at.head_dim), dtype=at.dtype, device=at.device)


def _within(rows: Tensor, first: int, end: int) -> bool:
    """Whether row indices on the CPU are ascending and in first .. end-1."""
    return not len(rows) or bool(first <= rows[0] and rows[-1] < end and (rows.diff() > 0).all())


def _packed(bits: Tensor) -> Tensor:
    """Booleans [..., n] as bytes [..., ceil(n / 8)], low bits first."""
    places = F.pad(bits, (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8)).to(torch.uint8)
    return (places * _places(bits.device)).sum(dim=-1, dtype=torch.uint8)


def _unpacked(packed: Tensor) -> Tensor:
    """Booleans [..., 8 · bytes] of bytes [..., bytes]."""
    return (packed[..., None] & _places(packed.device)).ne(0).flatten(-2)


def _places(device: torch.device) -> Tensor:
    return torch.bitwise_left_shift(
        torch.ones(8, dtype=torch.uint8, device=device), torch.arange(8, dtype=torch.uint8, device=device)
    )
