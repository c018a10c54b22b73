"""LongLive-RAG: the frames of history most similar to the newest one join the context [sink | retrieved | local].

Notation: window W, sink S, top_k K, recent_exclude R, n frames per block, block start s. The cache and the indices
are those of ∞-RoPE, but the local part is narrowed by K from the first block on, so the budget stays W; where that is
less than a block (W - S - K < n), the block attends to the newest of its own frames alone. Frames that leave go into
the history bank with their unrotated K and V. Before a block, the descriptor of the last finished frame is compared
with those of the eligible frames (all of the history but the R newest), and the best K are exposed, best first, all
with temporal index 0. The choice is made once per block and shared by all layers and passes.

When a frame enters the history (`admission`):

- ``cache`` (released code): when it is pushed out of the W-frame cache. It counts from the next block on, so before
  block start s the history is S .. S + (s - W) - 1, and the frames between cache and local part are attended by nobody.
- ``local`` (paper, Algorithm 1): as soon as it leaves the local part; the history is S .. s - (W-S-K-n) - 1.

The generator stays frozen; descriptor `ae` needs the weights of an encoder. Paper: arXiv 2606.02553. Follows the
behaviour of qixinhu11/LongLive-RAG (Apache-2.0).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor

from lrag_ray.context.frames import FramePolicy, FrameRow, check_local_room, check_window
from lrag_ray.context.policy import Origin, PolicyInputs, Span
from lrag_ray.context.weights import Loaded, WeightFile
from lrag_ray.retrieval.encoder import LatentAutoencoder, load_encoder
from lrag_ray.retrieval.history import Retrieved
from lrag_ray.retrieval.similarity import Descriptor, DescriptorIndex, HostCopy, average_pool, most_similar
from lrag_ray.wan.keyed import keyed_generator

RETRIEVED_INDEX = 0
"""Temporal index of every retrieved frame."""
ENCODER_PARAMETERS = 30_231_696
"""Of the released retrieval encoder, its decoder included."""
ENCODER_BYTES = ENCODER_PARAMETERS * 4
"""In float32."""


@dataclass(frozen=True)
class RagSettings:
    """Settings of rag; the defaults are the paper's."""

    window: int = 12
    """Latent frames attended to in all (W), the current block included; -1 keeps all and retrieves nothing."""
    sink: int = 1
    """First latent frames, which are never dropped (S)."""
    top_k: int = 6
    """Retrieved frames (K)."""
    recent_exclude: int = 5
    """Newest frames of the history that are not eligible (R)."""
    descriptor: Literal["ae", "avg_pool"] = "ae"
    """Embedding of a frame: the retrieval encoder, or the spatial mean per channel."""
    encoder: str | None = None
    """Checkpoint of the retrieval encoder, for descriptor ae."""
    descriptor_dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of descriptors and similarities; the released code runs in bfloat16, where similarities tie."""
    admission: Literal["cache", "local"] = "cache"
    """When a frame enters the history."""
    choose: Literal["similarity", "random", "oldest", "uniform"] = "similarity"
    """Which eligible frames are taken; all but similarity are controls."""

    def __post_init__(self) -> None:
        check_window(self.window, self.sink)
        if self.top_k < 0:
            raise ValueError(f"top_k {self.top_k} must not be negative")
        if self.recent_exclude < 0:
            raise ValueError(f"recent_exclude {self.recent_exclude} must not be negative")

    @property
    def encodes(self) -> bool:
        """Whether frames are described by the retrieval encoder: for descriptor ae, unless nothing is retrieved."""
        return self.descriptor == "ae" and self.top_k > 0

    def history(self, first_frame: int, frames_per_block: int) -> int:
        """Frames in the history, from frame S on, when the block that starts at `first_frame` chooses."""
        if self.window == -1 or self.top_k == 0:
            return 0
        attended = self.window if self.admission == "cache" else self.window - self.top_k - frames_per_block
        return max(0, first_frame - attended)


class Rag(FramePolicy[RagSettings]):
    """Keeps the first and the newest frames, and retrieves from all earlier ones those most like the newest."""

    Settings = RagSettings
    as_released: ClassVar[Mapping[str, Any]] = {"descriptor_dtype": "bfloat16"}
    origin = Origin("retrieval", "LongLive-RAG, arXiv 2606.02553", "qixinhu11/LongLive-RAG", "Apache-2.0")

    @classmethod
    def check(cls, settings: RagSettings, frames_per_block: int) -> None:
        """The cache must hold a block behind the sink, and something must be attended to.

        The local part may be narrower than a block, as in the released code; with admission ``local``, which counts
        from its start, it may not.
        """
        super().check(settings, frames_per_block)
        if settings.admission == "local":
            _check_whole_block(settings, frames_per_block)
        if settings.window != -1 and settings.sink == 0 and settings.window <= settings.top_k:
            raise ValueError(
                f"window {settings.window} without a sink leaves nothing to attend to beside top_k {settings.top_k}: "
                "raise window or lower top_k"
            )

    @classmethod
    def check_run(cls, settings: RagSettings, frames_per_block: int) -> None:
        """A block must attend to all of itself."""
        _check_whole_block(settings, frames_per_block)

    @classmethod
    def weight_files(cls, settings: RagSettings) -> Sequence[WeightFile]:
        """The retrieval encoder."""
        hint = "descriptor ae needs the checkpoint of a retrieval encoder; name it, or set descriptor: avg_pool"
        return [WeightFile("encoder", "retrieval_encoder", load_encoder, used=settings.encodes, hint=hint)]

    @classmethod
    def history_frames(cls, settings: RagSettings, frames_per_block: int, total_frames: int) -> int:
        """Frames in the bank at the end."""
        return settings.history(total_frames, frames_per_block)

    @classmethod
    def device_bytes(
        cls, settings: RagSettings, frames_per_block: int, total_frames: int, kv_bytes_per_frame: int
    ) -> int:
        """The encoder, and the frames retrieved last, which the bank keeps on the device."""
        return 2 * settings.top_k * kv_bytes_per_frame + (ENCODER_BYTES if settings.encodes else 0)

    @classmethod
    def notes(cls, settings: RagSettings, frames_per_block: int) -> Iterator[str]:
        """Budgets that leave nothing of the recent past."""
        if settings.window == settings.sink + settings.top_k + frames_per_block:
            yield (
                "sink and retrieved frames fill the window up to the current block: no past local frame is attended to"
            )

    def __init__(self, settings: RagSettings, inputs: PolicyInputs) -> None:
        super().__init__(settings, inputs)
        self._key = inputs.key
        self.bank = inputs.bank()
        self._banked = settings.sink
        """Next frame to enter the bank."""
        dtype = torch.bfloat16 if settings.descriptor_dtype == "bfloat16" else torch.float32
        self.index = DescriptorIndex(_descriptor(settings, inputs.weights, dtype), dtype)
        self._own: list[int] = []
        self._scores: HostCopy | None = None
        self._chosen: list[FrameRow] = []
        """Retrieved frames of the next block, in attention order."""
        self._retrieved: Retrieved | None = None

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Lay out sink, retrieved and local frames, and move what left to the history bank."""
        if self.settings.admission == "local":
            self._bank_until(self.settings.sink + self.settings.history(self._start(block), self._n))
        dropped = self.make_room(block)
        if dropped and self.settings.top_k:
            self._bank_until(dropped[-1] + 1)
        cached = list(self.window.frames)
        past, sink = len(cached), self.settings.sink
        first_local = sink
        if self.settings.window != -1:
            first_local = max(sink, past + self._n - (self.settings.window - sink - self.settings.top_k))
        self._own = [i for i in range(self._n) if past + i < sink or past + i >= first_local]
        rows = self.cached_rows(cached, list(range(past)))
        self.context = [*rows[:sink], *self._chosen, *rows[first_local:]]
        self.current = self.current_rows(list(range(past, past + self._n)))

    def own_frames(self) -> list[int]:
        """The tail of the block where the local part is narrower than a block, and what of it is sink."""
        return self._own

    def begin_expose(self) -> None:
        """Take the retrieved frames over from the bank."""
        super().begin_expose()
        self._retrieved = self.bank.gather([row.frame for row in self._chosen])

    def context_spans(self, layer: int) -> list[Span]:
        """Rows of sink, retrieved and local frames in one layer."""
        sink = [row.frame for row in self.context if row.kind == "sink"]
        local = [row.frame for row in self.context if row.kind == "local"]
        rows = self._retrieved.layer(layer) if self._retrieved is not None else []
        retrieved = [Span(each[:, 0], each[:, 1]) for each in rows]
        return [*self.window.spans(layer, sink), *retrieved, *self.window.spans(layer, local)]

    def end_expose(self) -> None:
        """All layers have theirs."""
        self._retrieved = None

    def on_latents(self, latents: Tensor) -> None:
        """Describe the block's frames and compare the last one with what the next block may retrieve."""
        if self.settings.top_k == 0:
            return
        self.index.append(latents)
        query = self._start(self.block + 1) - 1
        eligible = self.settings.history(query + 1, self._n) - self.settings.recent_exclude
        self._scores = None
        if eligible > 0:
            self._scores = HostCopy(self.index.similarities(query, self.settings.sink, eligible))
        # The device still has the denoising passes to do.
        self.bank.reserve(self._bank_end(self.block + 1) - self._banked)

    def end_block(self) -> None:
        """Choose for the next block; the clean-context pass is running, so the transfer hides behind it."""
        self._chosen = []
        if self._scores is not None:
            scores = self._scores.read().float()
            self._chosen = self._choose(scores)
            self.bank.prefetch([row.frame for row in self._chosen])
            if self.settings.choose == "similarity":
                # Neighbouring blocks resemble each other: what came close now may be chosen next.
                close = most_similar(scores, min(2 * self.settings.top_k, len(scores)))
                self.bank.expect([self.settings.sink + i for i in close])

    def _choose(self, scores: Tensor) -> list[FrameRow]:
        """Retrieved rows from the similarities [eligible] of frames S, S+1, … to the query frame."""
        eligible = len(scores)
        count = min(self.settings.top_k, eligible)
        if self.settings.choose == "similarity":
            picked = most_similar(scores, count)
        elif self.settings.choose == "random":
            generator = keyed_generator("retrieve", *self._key, self.block + 1)
            picked = sorted(torch.randperm(eligible, generator=generator)[:count].tolist())
        elif self.settings.choose == "oldest":
            picked = list(range(count))
        else:
            # Bin centres: evenly spread over the eligible history, never the same frame twice.
            picked = [(2 * i + 1) * eligible // (2 * count) for i in range(count)]
        sink = self.settings.sink
        return [FrameRow("retrieved", sink + i, RETRIEVED_INDEX, float(scores[i])) for i in picked]

    def _bank_end(self, block: int) -> int:
        """First frame that is not in the bank once `block` has begun."""
        ahead = self._n if self.settings.admission == "cache" else 0
        return max(self._banked, self.settings.sink + self.settings.history(self._start(block) + ahead, self._n))

    def _bank_until(self, end: int) -> None:
        """Copy cached frames up to `end` - 1 to the history bank."""
        while self._banked < end:
            self.bank.append(self._banked, self.window.rows(self._banked))
            self._banked += 1

    def _start(self, block: int) -> int:
        return block * self._n

    @property
    def _n(self) -> int:
        return self.layout.frames_per_block


def _check_whole_block(settings: RagSettings, frames_per_block: int) -> None:
    retrieved = {"top_k": settings.top_k} if settings.top_k else {}
    check_local_room(settings.window, frames_per_block, sink=settings.sink, **retrieved)


def _descriptor(settings: RagSettings, weights: Mapping[str, Loaded], dtype: torch.dtype) -> Descriptor:
    if not settings.encodes:
        return average_pool
    encoder = cast(LatentAutoencoder, weights["encoder"])
    parameter = next(encoder.parameters())
    if parameter.dtype != dtype:
        encoder = copy.deepcopy(encoder).to(dtype)
    if parameter.device.type == "cuda" and dtype == torch.float32:
        encoder = encoder.by_products()
    return encoder.encode
