"""Policies whose heads attend to different rows, at absolute temporal indices, and how heads are classified.

Whole frames are cached once, for all heads: a sink that stays and the newest frames behind it. What a group of heads
attends to is a choice among them. Heads that are classified by what they attend to are measured once, in the
clean-context pass of one block, over everything that is cached then and the block itself: of some sampled queries, the
share of attention on the first rows, on the last ones, and on those in between.

The classes decide the shapes of the blocks that follow, so the host waits for them once in a rollout. They are stored
with the block's part, and replay takes the stored ones.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lrag_ray.context.policy import ContextPolicy, Exposure, PolicyInputs, S
from lrag_ray.context.trace import ALL_LAYERS, RowKind, TraceRow
from lrag_ray.context.window import KVWindow
from lrag_ray.retrieval.similarity import HostCopy
from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.rope import Angles, rotate
from lrag_ray.wan.transfer import to_device


class HeadGroup(NamedTuple):
    """Heads of a layer, and the cached frames that they attend to before the block."""

    heads: tuple[int, ...] | None
    """Ascending; None for all heads."""
    frames: list[int]
    """In attention order; whole frames."""
    selected: bool = False
    """They also attend to single tokens that the method selected."""


class Classification(NamedTuple):
    """Which block's clean-context pass classifies the heads, and by which parts of its rows."""

    block: int
    first_rows: int
    """Rows of the first part."""
    last_rows: int
    """Rows of the last part, the block's own included."""
    samples: int
    """Sampled queries of a layer."""
    classes: int
    """Classes are 0 .. classes-1."""


def head_groups(classes: Sequence[int]) -> dict[int, tuple[int, ...] | None]:
    """Heads of each class of a layer, None for all of them; classes without heads are left out."""
    if len(set(classes)) == 1:
        return {classes[0]: None}
    return {each: tuple(h for h, own in enumerate(classes) if own == each) for each in sorted(set(classes))}


def attention_shares(q: Tensor, k: Tensor, first_rows: int, last_rows: int) -> Tensor:
    """Mean attention [H, 3] of queries [r, H, d] on the first, the last and the other keys of [rows, H, d], float32.

    In the order first, middle, last. Head by head, because the weights of all heads are large.
    """
    shares = []
    for head in range(q.shape[1]):
        scores = q[:, head].float() @ k[:, head].float().T / math.sqrt(q.shape[-1])
        mean = scores.softmax(dim=-1).mean(dim=0)
        end = len(mean) - last_rows
        shares.append(torch.stack([mean[:first_rows].sum(), mean[first_rows:end].sum(), mean[end:].sum()]))
    return torch.stack(shares)


class HeadPolicy(ContextPolicy[S]):
    """Groups of heads over one cache of whole frames. A method says in `groups` what each attends to."""

    def __init__(self, settings: S, inputs: PolicyInputs, *, sink: int, capacity: int) -> None:
        """`capacity` in frames: the sink, the cached frames behind it and the current block."""
        super().__init__(settings, inputs)
        at = self.layout
        self.window = KVWindow(at, sink, capacity)
        self.block = -1
        self.sink_frames: list[int] = []
        """Frames of the sink before the current block."""
        self.past: list[int] = []
        """Cached frames behind the sink before the current block, oldest first."""
        self.classes: list[list[int]] | None = None
        """Class of each head by layer, once it is known."""
        self.classification = self.classifies()
        self.sampled_rows = torch.empty(0, 0, dtype=torch.long)
        """Queries that are sampled in each layer [layers, r], drawn with replacement from the block's rows."""
        if self.classification is not None:
            shape = (at.num_layers, self.classification.samples)
            self.sampled_rows = torch.randint(
                at.tokens_per_block, shape, generator=keyed_generator(*inputs.key, "sampled queries")
            )
        self._queries = torch.empty(0)
        self._layer_shares: list[Tensor] = []
        self._shares: HostCopy | None = None
        self._stored_classes: list[list[int]] | None = None

    @abstractmethod
    def groups(self, layer: int) -> list[HeadGroup]:
        """What the heads of a layer attend to before the current block."""

    def classifies(self) -> Classification | None:
        """When and how heads are classified; None where they are not."""
        return None

    def classify(self, shares: Tensor) -> Tensor:
        """Classes [layers, H] of attention shares [layers, H, 3] (first, middle, last), on the CPU."""
        raise NotImplementedError

    @abstractmethod
    def cached_frames(self, block: int) -> int:
        """Most frames behind the sink that stay cached for this block."""

    @property
    def observes_queries(self) -> bool:  # type: ignore[override]
        """In the block that classifies."""
        return self.classification is not None and self.block == self.classification.block

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        """Classify the heads if the block before measured them; drop the oldest frames."""
        self.block = block
        if self._shares is not None and self.classes is None:
            self.classes = self._found_classes()
        if self.observes_queries:
            self._layer_shares = []
            self._stored_classes = self._read_classes(state) if state else None
            self._sampled = to_device(self.sampled_rows, self.layout.device)
        sink = self.window.sink
        self.window.drop_oldest(len(self.window.frames) - sink - self.cached_frames(block))
        self.sink_frames, self.past = self.window.frames[:sink], self.window.frames[sink:]

    def query_indices(self) -> list[int]:
        """Global frame numbers."""
        first = self.block * self.layout.frames_per_block
        return list(range(first, first + self.layout.frames_per_block))

    def observe_queries(self, layer: int, q: Tensor, q_rotated: Tensor) -> None:
        """Keep the sampled queries of the newest pass."""
        self._queries = q_rotated.index_select(0, self._sampled[layer])

    def begin_expose(self) -> None:
        """Layers share the turning angles of equal contexts."""
        self._angles: dict[tuple[int, ...], Angles] = {}

    def expose(self, layer: int) -> list[Exposure]:
        """The rows of each group."""
        return [self.exposure(layer, group) for group in self.groups(layer)]

    def exposure(self, layer: int, group: HeadGroup) -> Exposure:
        """Whole cached frames."""
        return Exposure(self.window.spans(layer, group.frames), self.angles(group.frames), group.heads)

    def angles(self, frames: list[int]) -> Angles:
        """Turning angles of whole frames at their own indices, made once per block."""
        key = tuple(frames)
        if key not in self._angles:
            self._angles[key] = self.rope.frames(key)
        return self._angles[key]

    def begin_store(self) -> None:
        """Make the block's frames part of the cache."""
        self.window.admit(self.query_indices())

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Cache the block's clean rows; measure the heads in the block that classifies."""
        self.window.write(layer, self.query_indices(), k, v)
        at = self.classification
        if at is not None and self.block == at.block:
            keys = self.rotated_keys(layer, self.window.frames)
            self._layer_shares.append(attention_shares(self._queries, keys, at.first_rows, at.last_rows))

    def end_block(self) -> None:
        """Send the measured shares to the host."""
        if self.observes_queries:
            self._shares = HostCopy(torch.stack(self._layer_shares))
            self._layer_shares, self._queries = [], torch.empty(0)

    def rotated_keys(self, layer: int, frames: list[int]) -> Tensor:
        """Keys of cached frames [frames · f, H, head_dim], turned as they are attended to."""
        rows = torch.cat([span.k.flatten(0, -3) for span in self.window.spans(layer, frames)])
        return rotate(rows, self.rope.frames(frames))

    def shares(self) -> Tensor | None:
        """Attention shares [layers, H, 3] that the classes come from (first, middle, last), once measured."""
        return None if self._shares is None else self._shares.read()

    def trace(self) -> list[TraceRow]:
        """Per layer and group of heads, but once for all layers where all heads attend to the same."""
        layers = [self.groups(layer) for layer in range(self.layout.num_layers)]
        if all(len(groups) == 1 and groups == layers[0] for groups in layers):
            return self.group_rows(ALL_LAYERS, layers[0][0]._replace(heads=None))
        return [row for layer, groups in enumerate(layers) for group in groups for row in self.group_rows(layer, group)]

    def group_rows(self, layer: int, group: HeadGroup) -> list[TraceRow]:
        """Trace of one group, the block's own frames included."""
        rows = [(self.kind(frame), frame) for frame in group.frames]
        return self.trace_rows(layer, group, [*rows, *(("current", frame) for frame in self.query_indices())])

    def trace_rows(self, layer: int, group: HeadGroup, frames: Sequence[tuple[RowKind, int]]) -> list[TraceRow]:
        """Rows of whole frames."""
        tokens = self.layout.tokens_per_frame
        return [TraceRow(self.block, layer, kind, frame, frame, tokens, None, group.heads) for kind, frame in frames]

    def kind(self, frame: int) -> RowKind:
        """Sink or local."""
        return "sink" if frame < self.window.sink else "local"

    def block_state(self) -> dict[str, Tensor]:
        """``classes`` [layers, H] of the block that classifies: shares may round differently on another machine."""
        if not self.observes_queries:
            return {}
        return {"classes": torch.tensor(self._found_classes(), dtype=torch.uint8)}

    def _found_classes(self) -> list[list[int]]:
        """The stored classes where there are some, else those of the measured shares."""
        if self._stored_classes is not None:
            return self._stored_classes
        assert self._shares is not None, "heads are measured before they are classified"
        found: list[list[int]] = self.classify(self._shares.read()).tolist()
        return found

    def _read_classes(self, state: dict[str, Tensor]) -> list[list[int]]:
        """Classes out of a stored state; ValueError where they do not fit the generator."""
        at, classes = self.layout, state.get("classes")
        known = 0 if self.classification is None else self.classification.classes
        if classes is None or classes.shape != (at.num_layers, at.num_heads) or int(classes.max()) >= known:
            raise ValueError(f"block {self.block}: its stored classes of heads do not fit this method and generator")
        found: list[list[int]] = classes.tolist()
        return found
