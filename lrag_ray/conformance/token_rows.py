"""Which token every attended row is, worked out from traces and stored selections, not from a policy's insides."""

from __future__ import annotations

from itertools import groupby
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrag_ray.conformance.recording import Recording
from lrag_ray.context.deep_forcing import DeepForcing
from lrag_ray.context.forcing_kv import ForcingKv
from lrag_ray.context.trace import TraceRow


class TokenRows(NamedTuple):
    """Rows of one layer in attention order, the block's own included; each [rows]."""

    frame: Tensor
    """Global latent frame."""
    token: Tensor
    """Position in the frame."""
    temporal_index: Tensor
    """Temporal RoPE index."""

    def groups(self) -> list[list[int]]:
        """[frame, temporal index, number of consecutive rows]."""
        pairs = zip(self.frame.tolist(), self.temporal_index.tolist(), strict=True)
        return [[frame, index, len(list(run))] for (frame, index), run in groupby(pairs)]


def token_rows(recording: Recording, element: int = 0, head: int = 0) -> list[list[TokenRows]]:
    """Rows by block and layer for one batch element and head (where heads attend alike: for all of them).

    Where frames are attended whole, the trace says everything. A compression's selection are indices into [rows held
    before | the block's rows], between the whole sink and the whole recent frames. Kept patches are numbered from the
    first frame that left the past frames with the block before.
    """
    policy = recording.policies[element]
    layers, tokens_per_frame = policy.layout.num_layers, policy.layout.tokens_per_frame
    held: list[TokenRows | None] = [None] * layers
    blocks = []
    for block, states in enumerate(recording.state):
        for layer in range(layers):
            trace = recording.rows(block, element, layer, head)
            if isinstance(policy, ForcingKv):
                held[layer] = _with_patches(block, trace, states[element].get("patches"), policy)
                continue
            selected = policy.selected_rows(states[element], layer) if isinstance(policy, DeepForcing) else None
            if selected is None and all(row.tokens == tokens_per_frame for row in trace):
                held[layer] = whole_frames(trace, tokens_per_frame)
            else:
                held[layer] = _single_tokens(held[layer], trace, selected, tokens_per_frame, policy.settings)
        blocks.append([rows for rows in held if rows is not None])
    return blocks


def whole_frames(trace: list[TraceRow], f: int) -> TokenRows:
    """All f tokens of each row of a trace."""
    frame = torch.tensor([row.frame for row in trace]).repeat_interleave(f)
    index = torch.tensor([row.temporal_index for row in trace]).repeat_interleave(f)
    return TokenRows(frame, torch.arange(f).repeat(len(trace)), index)


def _with_patches(block: int, trace: list[TraceRow], patches: Tensor | None, policy: ForcingKv) -> TokenRows:
    """Whole frames, with the kept patches of single ones in place."""
    at, f, n = policy.settings, policy.layout.tokens_per_frame, policy.layout.frames_per_block
    first = max(at.sink, (block - 1) * n - at.dynamic_frames)
    frames, tokens = [], []
    for row in trace:
        kept = torch.arange(f)
        if row.kind == "compressed":
            numbers = torch.empty(0).long() if patches is None else patches - (row.frame - first) * at.patches_per_frame
            own = numbers[(numbers >= 0) & (numbers < at.patches_per_frame)]
            kept = kept.view(at.patches_per_frame, -1)[own].flatten()
        if len(kept) != row.tokens:
            raise ValueError(f"trace and kept patches disagree in block {block}, layer {row.layer}, frame {row.frame}")
        frames.append(torch.full_like(kept, row.frame))
        tokens.append(kept)
    return TokenRows(torch.cat(frames), torch.cat(tokens), torch.cat(frames))


def _single_tokens(
    before: TokenRows | None, trace: list[TraceRow], selected: Tensor | None, f: int, settings: Any
) -> TokenRows:
    if before is None:
        raise ValueError("the first block attends to parts of frames")
    current = whole_frames([row for row in trace if row.kind == "current"], f)
    frame, token = torch.cat([before.frame, current.frame]), torch.cat([before.token, current.token])
    if selected is not None:
        recent = torch.arange(len(frame) - settings.recent * f, len(frame))
        kept = torch.cat([torch.arange(settings.sink * f), selected.long(), recent])
        frame, token = frame[kept], token[kept]
    counts = {row.frame: row.tokens for row in trace}
    found, tokens = frame.unique(return_counts=True)
    if dict(zip(found.tolist(), tokens.tolist(), strict=True)) != counts:
        raise ValueError(f"trace and selections disagree in block {trace[0].block}, layer {trace[0].layer}")
    indices = {row.frame: row.temporal_index for row in trace}
    return TokenRows(frame, token, torch.tensor([indices[i] for i in frame.tolist()]))
