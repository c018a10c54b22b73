"""The attention context of a running rollout: exposes each policy's rows once per block and attends over them.

Per layer there is one buffer [sink | retrieved | local | current] of rotated keys and of values. The first pass of a
block lays the context out; every pass then overwrites the current rows alone. Where a policy exposes different rows to
groups of heads, each group has its part of the buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lrag_ray.context.policy import ContextPolicy, Exposure, Layout
from lrag_ray.context.trace import TraceRow
from lrag_ray.wan import fused_rows
from lrag_ray.wan.attention import attention
from lrag_ray.wan.kernels import AttentionChoice, Kernels
from lrag_ray.wan.rope import Angles, Rope, rotate, rotate_into
from lrag_ray.wan.transfer import to_device
from lrag_ray.wan.transformer import Projected


class Probe(Protocol):
    """Observer of a rollout's insides, for conformance."""

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None:
        """Flow and x0 [B, n, C, H, W] of a pass; the clean-context pass comes last."""

    def on_attention(
        self, block: int, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: tuple[int, ...] | None
    ) -> None:
        """Exactly what attention receives: rotated q and k, and v, each [B, rows, heads, head_dim].

        `heads` are those of the rows, None for all heads of the layer.

        In a joint call over several blocks `block` is its window and `step` 0.
        """


class ContextRuntime:
    """Self-attention of all layers over the contexts of a batch (an `wan.transformer.AttentionContext`)."""

    def __init__(
        self,
        layout: Layout,
        rope: Rope,
        policies: Sequence[ContextPolicy[Any]],
        probe: Probe | None = None,
        kernels: Kernels = Kernels(),  # noqa: B008 - immutable
    ) -> None:
        self.layout = layout
        self.policies = list(policies)
        self._rope = rope
        self._probe = probe
        self._observed = False
        self._device_fuses = fused_rows.fuses(kernels, layout.device)
        self._attention = kernels.attention
        self._buffers: list[_Buffer | None] = [None] * layout.num_layers
        self._head_indices: dict[tuple[int, ...], Tensor] = {}
        """Groups of heads that were seen, on the device."""
        self._block = -1
        self._step = 0
        self._own: list[int] | None = None
        self._own_rows = 0
        self._exposed = False
        self._clean = False

    def begin_block(self, block: int, states: list[dict[str, Tensor]] | None = None) -> None:
        """Let every policy make room and choose; `states` replays recorded choices."""
        for i, policy in enumerate(self.policies):
            policy.begin_block(block, states[i] if states else None)
        self.lay_out(block)

    def lay_out(self, block: int) -> None:
        """The policies have chosen: passes from here on attend to new rows. `block` is what a probe is given."""
        self._block = block
        self._exposed = False
        self._observed = any(policy.observes_queries for policy in self.policies)
        self._current = _stack([self._rope.frames(policy.query_indices()) for policy in self.policies])
        # All elements have the same settings and block, so the same rows.
        own = self.policies[0].own_frames()
        self._own_rows = len(own) * self.layout.tokens_per_frame
        self._own = None if self._own_rows == self._current.turns.shape[-3] else own

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
        return self._attended(layer, self._laid_out(layer), q_rotated, k, v)

    @property
    def fuses(self) -> bool:
        """The device has the kernel, and no policy looks at queries before they are rotated."""
        return self._device_fuses and not self._observed

    def attend_projected(self, layer: int, projected: Projected) -> Tensor:
        """`attend` with norms, rotation and write in one kernel where all heads and elements attend to alike rows."""
        buffer = self._laid_out(layer)
        rows = buffer.batches()
        if len(rows) > 1 or rows[0].indices is not None or self._own is not None:
            return self._attended(layer, buffer, rotate(projected.queries(), self._current), *projected.keys_values())
        k_out, v_out = (x[:, x.shape[1] - buffer.current :] for x in (rows[0].k, rows[0].v))
        q_rotated, k = fused_rows.write_rows(projected, self._current, k_out, v_out, keep=self._clean)
        if k is not None:
            self._store(layer, k, projected.v.view(k.shape))
        return self._watched(layer, buffer, q_rotated)

    def _laid_out(self, layer: int) -> _Buffer:
        """The layer's buffer with the context of the block."""
        if not self._exposed:
            self._expose(layer)
        buffer = self._buffers[layer]
        assert buffer is not None
        return buffer

    def _attended(self, layer: int, buffer: _Buffer, q_rotated: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self._write_current(buffer, k, v)
        if self._clean:
            self._store(layer, k, v)
        return self._watched(layer, buffer, q_rotated)

    def _watched(self, layer: int, buffer: _Buffer, q_rotated: Tensor) -> Tensor:
        if self._probe is not None:
            for rows in buffer.batches():
                q_rows = rows.of_heads(q_rotated[rows.batch])
                self._probe.on_attention(self._block, self._step, layer, q_rows, rows.k, rows.v, rows.heads)
        return buffer.attend(q_rotated, self._attention)

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
                rotate_into(rows.k[:, at:end], rows.of_heads(k[rows.batch, start:stop]), angles)
                rows.v[:, at:end] = rows.of_heads(v[rows.batch, start:stop])
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
        exposures = [_groups(policy.expose(layer), self.layout.num_heads) for policy in self.policies]
        groups = [[_Group(each.heads, sum(span.rows for span in each.spans)) for each in own] for own in exposures]
        needed = max(_rows_of_all_heads(own, self.layout.num_heads) for own in groups)
        buffer = self._buffers[layer]
        if buffer is None or buffer.capacity < needed + self._own_rows:
            bounded = all(policy.max_context_rows() is not None for policy in self.policies)
            capacity = self._buffer_rows(needed)
            buffer = _Buffer(self.layout, len(self.policies), capacity, self._head_indices, bounded=bounded)
            self._buffers[layer] = buffer
        buffer.groups, buffer.current = groups, self._own_rows
        for i, each in enumerate(exposures):
            for rows, exposure in zip(buffer.element(i), each, strict=True):
                at = 0
                for span in exposure.spans:
                    end = at + span.rows
                    shape = span.k.shape[:-2]
                    angles = Angles(exposure.angles.rows(at, end).turns.unflatten(0, shape))
                    rotate_into(rows.k[0, at:end].unflatten(0, shape), rows.of_heads(span.k), angles)
                    rows.v[0, at:end].unflatten(0, shape).copy_(rows.of_heads(span.v))
                    at = end
        if layer == self.layout.num_layers - 1:
            for policy in self.policies:
                policy.end_expose()

    def _buffer_rows(self, needed: int) -> int:
        """Rows to allocate for a context of `needed` rows: up to a policy's bound, or half as much again where contexts
        grow without one, and a block beside them."""
        bounds = [policy.max_context_rows() for policy in self.policies]
        beside = [needed * 3 // 2 if bound is None else bound for bound in bounds]
        return max(needed + self._own_rows, max(beside) + self.layout.tokens_per_block)


class _Group(NamedTuple):
    """Heads of a layer that attend to the same rows."""

    heads: tuple[int, ...] | None
    """None for all heads."""
    rows: int
    """Rows before the current block's own."""


class _Rows(NamedTuple):
    """Attended rows of a group of heads in some batch elements, each [b, rows, heads, head_dim]."""

    batch: slice
    k: Tensor
    v: Tensor
    heads: tuple[int, ...] | None = None
    indices: Tensor | None = None
    """`heads` on the device."""

    def of_heads(self, x: Tensor) -> Tensor:
        """The group's heads of x [..., H, head_dim]: x itself where it is all of them."""
        return x if self.indices is None else x.index_select(-2, self.indices)


class _Buffer:
    """Rotated keys and values [B, capacity, H, head_dim] of one layer, of which elements use what `groups` says.

    Groups of heads lie one behind the other, each as [rows, its heads, head_dim].
    """

    def __init__(
        self,
        layout: Layout,
        batch: int,
        capacity: int,
        head_indices: dict[tuple[int, ...], Tensor],
        *,
        bounded: bool,
    ) -> None:
        self.current = layout.tokens_per_block
        """Rows of the current block that are attended to."""
        self.capacity = capacity
        shape = (batch, capacity, layout.num_heads, layout.head_dim)
        self.k = torch.empty(shape, dtype=layout.dtype, device=layout.device)
        self.v = torch.empty(shape, dtype=layout.dtype, device=layout.device)
        self.groups = [[_Group(None, 0)] for _ in range(batch)]
        """Per batch element."""
        self._head_indices = head_indices
        self._frame = layout.tokens_per_frame
        self._bounded = bounded

    def batches(self) -> list[_Rows]:
        """The whole batch at once where all elements have as many rows and heads attend alike (most methods).

        Groups of heads are an element's own, even where another happens to have the same: its bits must not depend on
        what else is in the batch.
        """
        if self.groups[0][0].heads is None and all(groups == self.groups[0] for groups in self.groups[1:]):
            return self._rows(slice(None), self.groups[0])
        return [rows for i in range(len(self.groups)) for rows in self.element(i)]

    def element(self, i: int) -> list[_Rows]:
        """Rows of one batch element, group by group."""
        return self._rows(slice(i, i + 1), self.groups[i])

    def attend(self, q: Tensor, choice: AttentionChoice) -> Tensor:
        """Attention of rotated q [B, n·f, H, head_dim] over the used rows."""
        batches = self.batches()
        if all(rows.indices is None for rows in batches):
            out = [attention(q[rows.batch], rows.k, rows.v, choice, ragged=self._ragged(rows)) for rows in batches]
            return out[0] if len(out) == 1 else torch.cat(out)
        whole = torch.empty_like(q)
        for rows in batches:
            out_rows = attention(rows.of_heads(q[rows.batch]), rows.k, rows.v, choice, ragged=self._ragged(rows))
            if rows.indices is None:
                whole[rows.batch] = out_rows
            else:
                whole[rows.batch].index_copy_(2, rows.indices, out_rows)
        return whole

    def _ragged(self, rows: _Rows) -> bool:
        """Whether a rollout has many such shapes: those of all heads over whole frames of a window are few."""
        return rows.indices is not None or not self._bounded or rows.k.shape[1] % self._frame != 0

    def _rows(self, batch: slice, groups: list[_Group]) -> list[_Rows]:
        if groups[0].heads is None:
            end = groups[0].rows + self.current
            return [_Rows(batch, self.k[batch, :end], self.v[batch, :end])]
        found, at = [], 0
        k, v = self.k[batch].flatten(1, 2), self.v[batch].flatten(1, 2)
        for group in groups:
            assert group.heads is not None, "a group of all heads has no other beside it"
            shape = (group.rows + self.current, len(group.heads))
            end = at + shape[0] * shape[1]
            places = k[:, at:end].unflatten(1, shape), v[:, at:end].unflatten(1, shape)
            found.append(_Rows(batch, *places, group.heads, self._index(group.heads)))
            at = end
        return found

    def _index(self, heads: tuple[int, ...]) -> Tensor:
        if heads not in self._head_indices:
            self._head_indices[heads] = to_device(torch.tensor(heads), self.k.device)
        return self._head_indices[heads]


def _groups(exposed: Exposure | Sequence[Exposure], heads: int) -> list[Exposure]:
    """One exposure per group. Raises ValueError unless every head is in exactly one of them."""
    if isinstance(exposed, Exposure) and exposed.heads is None:
        return [exposed]
    found = [exposed] if isinstance(exposed, Exposure) else list(exposed)
    named = [range(heads) if each.heads is None else each.heads for each in found]
    if sorted(head for group in named for head in group) != list(range(heads)):
        raise ValueError(f"exposures for the heads {[list(group) for group in named]}: not each of {heads} once")
    return found


def _rows_of_all_heads(groups: list[_Group], heads: int) -> int:
    """Context rows of all heads that take as much room as the rows of these groups."""
    return -(-sum(group.rows * (heads if group.heads is None else len(group.heads)) for group in groups) // heads)


def _stack(angles: list[Angles]) -> Angles:
    if len(angles) == 1:
        return angles[0]
    return Angles(torch.stack([a.turns for a in angles]))
