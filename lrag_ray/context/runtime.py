"""The attention context of a running rollout: exposes each policy's rows once per block and attends over them.

Per layer there is one buffer [sink | retrieved | local | current] of rotated keys and of values. The first pass of a
block lays the context out; every pass then overwrites the current rows alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lrag_ray.context.policy import ContextPolicy, Layout
from lrag_ray.context.trace import TraceRow
from lrag_ray.wan.attention import attention
from lrag_ray.wan.rope import Angles, Rope, rotate, rotate_into


class Probe(Protocol):
    """Observer of a rollout's insides, for conformance."""

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None:
        """Flow and x0 [B, n, C, H, W] of a pass; the clean-context pass comes last."""

    def on_attention(self, block: int, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Exactly what attention receives: rotated q and k, and v, each [B, rows, H, head_dim]."""


class ContextRuntime:
    """Self-attention of all layers over the contexts of a batch (an `wan.transformer.AttentionContext`)."""

    def __init__(
        self, layout: Layout, rope: Rope, policies: Sequence[ContextPolicy[Any]], probe: Probe | None = None
    ) -> None:
        self.layout = layout
        self.policies = list(policies)
        self._rope = rope
        self._probe = probe
        self._observed = any(policy.observes_queries for policy in policies)
        self._buffers: list[_Buffer | None] = [None] * layout.num_layers
        self._block = -1
        self._step = 0
        self._own: list[int] | None = None
        self._exposed = False
        self._clean = False

    def begin_block(self, block: int, states: list[dict[str, Tensor]] | None = None) -> None:
        """Let every policy make room and choose; `states` replays recorded choices."""
        self._block = block
        self._exposed = False
        for i, policy in enumerate(self.policies):
            policy.begin_block(block, states[i] if states else None)
        self._current = _stack([self._rope.frames(policy.query_indices()) for policy in self.policies])
        # All elements have the same settings and block, so the same rows.
        own = self.policies[0].own_frames()
        self._own = None if len(own) == self.layout.frames_per_block else own

    def begin_pass(self, step: int, *, clean: bool) -> None:
        """Announce a pass; `clean` marks the clean-context pass, whose K and V are kept."""
        self._step = step
        self._clean = clean

    def end_pass(self) -> None:
        """The pass has been launched; later passes of the block reuse its context rows."""
        self._exposed = True

    def on_latents(self, latents: Tensor) -> None:
        """Clean latents [B, n, C, H, W] of the block, before the clean-context pass."""
        for policy, x in zip(self.policies, latents, strict=True):
            policy.on_latents(x)

    def end_block(self) -> None:
        """The clean-context pass has been launched."""
        for policy in self.policies:
            policy.end_block()

    def trace(self) -> list[list[TraceRow]]:
        """Per batch element, what the current block attends to."""
        return [policy.trace() for policy in self.policies]

    def block_state(self) -> list[dict[str, Tensor]]:
        """Per batch element, what replay cannot rebuild."""
        return [policy.block_state() for policy in self.policies]

    @property
    def observes_queries(self) -> bool:
        """A policy looks at the queries of every pass."""
        return self._observed

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of the block's unrotated q, k, v [B, n·f, H, head_dim] over [context | current]."""
        q_rotated = rotate(q, self._current)
        if self._observed:
            self._observe(layer, q, q_rotated)
        if not self._exposed:
            self._expose(layer)
        buffer = self._buffers[layer]
        assert buffer is not None
        self._write_current(buffer, k, v)
        if self._clean:
            self._store(layer, k, v)
        if self._probe is not None:
            for rows in buffer.batches():
                self._probe.on_attention(self._block, self._step, layer, q_rotated[rows.batch], rows.k, rows.v)
        return buffer.attend(q_rotated)

    def keep(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        """What `attend` does beside attention, for the last layer of a clean-context pass.

        `q` is needed where a policy `observes_queries`.
        """
        if self._observed:
            assert q is not None, "a policy observes queries"
            self._observe(layer, q, rotate(q, self._current))
        if not self._exposed:
            # Nobody will attend to these rows. But a policy may compress its cache here, and a buffer that grows must
            # grow as it would have without a replay.
            self._expose(layer)
        self._store(layer, k, v)

    def _observe(self, layer: int, q: Tensor, q_rotated: Tensor) -> None:
        for i, policy in enumerate(self.policies):
            policy.observe_queries(layer, q[i], q_rotated[i])

    def _write_current(self, buffer: _Buffer, k: Tensor, v: Tensor) -> None:
        """Overwrite the current block's attended rows, behind the context."""
        f = self.layout.tokens_per_frame
        pieces = [(0, k.shape[1])] if self._own is None else [(i * f, (i + 1) * f) for i in self._own]
        for rows in buffer.batches():
            at = rows.k.shape[1] - buffer.current
            for start, stop in pieces:
                end = at + stop - start
                angles = self._current.of(rows.batch).rows(start, stop)
                rotate_into(rows.k[:, at:end], k[rows.batch, start:stop], angles)
                rows.v[:, at:end] = v[rows.batch, start:stop]
                at = end

    def _store(self, layer: int, k: Tensor, v: Tensor) -> None:
        for i, policy in enumerate(self.policies):
            if layer == 0:
                policy.begin_store()
            policy.store(layer, k[i], v[i])

    def _expose(self, layer: int) -> None:
        if layer == 0:
            for policy in self.policies:
                policy.begin_expose()
        exposures = [policy.expose(layer) for policy in self.policies]
        lengths = [sum(span.rows for span in exposure.spans) for exposure in exposures]
        buffer = self._buffers[layer]
        if buffer is None or buffer.capacity < max(lengths) + self.layout.tokens_per_block:
            buffer = _Buffer(self.layout, len(self.policies), self._context_rows(max(lengths)))
            self._buffers[layer] = buffer
        buffer.lengths = lengths
        own = self.layout.frames_per_block if self._own is None else len(self._own)
        buffer.current = own * self.layout.tokens_per_frame
        for i, exposure in enumerate(exposures):
            at = 0
            for span in exposure.spans:
                end = at + span.rows
                shape = span.k.shape[:-2]
                angles = Angles(exposure.angles.rows(at, end).turns.unflatten(0, shape))
                rotate_into(buffer.k[i, at:end].unflatten(0, shape), span.k, angles)
                buffer.v[i, at:end].unflatten(0, shape).copy_(span.v)
                at = end
        if layer == self.layout.num_layers - 1:
            for policy in self.policies:
                policy.end_expose()

    def _context_rows(self, needed: int) -> int:
        """Rows to allocate: a policy's bound, or half as much again where contexts grow without one."""
        bounds = [policy.max_context_rows() for policy in self.policies]
        return max([needed] + [needed * 3 // 2 if bound is None else bound for bound in bounds])


class _Rows(NamedTuple):
    """Attended rows of some batch elements, each [b, rows, H, head_dim]."""

    batch: slice
    k: Tensor
    v: Tensor


class _Buffer:
    """Rotated keys and values [B, capacity, H, head_dim] of one layer; element i uses lengths[i] context rows."""

    def __init__(self, layout: Layout, batch: int, context_rows: int) -> None:
        self.current = layout.tokens_per_block
        """Rows of the current block that are attended to."""
        self.capacity = context_rows + layout.tokens_per_block
        shape = (batch, self.capacity, layout.num_heads, layout.head_dim)
        self.k = torch.empty(shape, dtype=layout.dtype, device=layout.device)
        self.v = torch.empty(shape, dtype=layout.dtype, device=layout.device)
        self.lengths = [0] * batch

    def batches(self) -> list[_Rows]:
        """The whole batch at once where all contexts are equally long (all methods but token-level ones)."""
        if len(set(self.lengths)) == 1:
            return [self._rows(slice(None), self.lengths[0])]
        return [self._rows(slice(i, i + 1), length) for i, length in enumerate(self.lengths)]

    def attend(self, q: Tensor) -> Tensor:
        """Attention of rotated q [B, n·f, H, head_dim] over the used rows."""
        out = [attention(q[rows.batch], rows.k, rows.v) for rows in self.batches()]
        return out[0] if len(out) == 1 else torch.cat(out)

    def _rows(self, batch: slice, length: int) -> _Rows:
        end = length + self.current
        return _Rows(batch, self.k[batch, :end], self.v[batch, :end])


def _stack(angles: list[Angles]) -> Angles:
    if len(angles) == 1:
        return angles[0]
    return Angles(torch.stack([a.turns for a in angles]))
