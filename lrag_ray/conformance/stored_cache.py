"""The cache that a reference rollout ends with, read as rows that can be compared with what we attend to.

base and deep_forcing store rotated keys; the window-relative methods store them unrotated, one of them except for
frame 0, which is always at index 0. Rows that are cached but attended by nobody have no counterpart here.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from lrag_ray.conformance.case import Bound, Sheet
from lrag_ray.conformance.files import Vectors
from lrag_ray.conformance.recording import Recording
from lrag_ray.conformance.token_rows import TokenRows
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.wan.rope import Rope, rotate

ROWS = Bound(absolute=1e-4)
UNROTATED = ("infinity_rope", "rag")
"""Methods whose references store unrotated keys."""

_TENSOR = re.compile(r"kv_cache\.(\d+)\.[kv]")


def check_stored_cache(
    recording: Recording, rows: list[TokenRows], vectors: Vectors, method: str, used: list[int] | None, sheet: Sheet
) -> None:
    """Compare the rows of the last block's clean-context pass, layer by layer.

    `rows` say which tokens we attend to in each layer; `used` how many rows of each stored buffer are in use (None:
    all of them).
    """
    policy = recording.policies[0]
    rope = Rope(policy.layout.head_dim, policy.layout.grid, torch.device("cpu"))
    block, last = len(recording.trace) - 1, len(recording.timesteps[-1]) - 1
    keys, values = {}, {}
    for layer in sorted({int(match[1]) for name in vectors.shapes if (match := _TENSOR.fullmatch(name))}):
        golden_k, golden_v = vectors[f"kv_cache.{layer}.k"], vectors[f"kv_cache.{layer}.v"]
        stored = _stored_tokens(policy, block, rows[layer], used[layer] if used else golden_k.shape[1])
        place = {token: i for i, token in enumerate(stored)}
        retrieved = {row.frame for row in recording.rows(block, 0, layer) if row.kind == "retrieved"}
        shared = [(i, place[token]) for i, token in enumerate(_tokens(rows[layer])) if token[0] not in retrieved]
        mine, theirs = torch.tensor(shared).unbind(1)
        attended = recording.attended[block, last, layer]
        ours_k, ours_v, k = attended.k[:, mine], attended.v[:, mine], golden_k[:, theirs]
        if method in UNROTATED:
            k = _as_attended(k, ours_k, TokenRows(*(column[mine] for column in rows[layer])), rope)
        keys[f"layer {layer}"] = (ours_k, k, ROWS)
        values[f"layer {layer}"] = (ours_v, golden_v[:, theirs], ROWS)
    sheet.close_all("kv_cache k", keys)
    sheet.close_all("kv_cache v", values)


def _stored_tokens(policy: ContextPolicy[Any], block: int, attended: TokenRows, rows: int) -> list[tuple[int, int]]:
    """(frame, token) of each stored row: a compressed cache is attended as it is, others hold whole frames."""
    if getattr(policy.settings, "compression", False):
        return _tokens(attended)
    slots, sink = rows // policy.layout.tokens_per_frame, policy.settings.sink
    end = (block + 1) * policy.layout.frames_per_block
    frames = [*range(sink), *range(end - slots + sink, end)]
    return [(frame, token) for frame in frames for token in range(policy.layout.tokens_per_frame)]


def _tokens(rows: TokenRows) -> list[tuple[int, int]]:
    return list(zip(rows.frame.tolist(), rows.token.tolist(), strict=True))


def _as_attended(stored: Tensor, ours: Tensor, rows: TokenRows, rope: Rope) -> Tensor:
    """Stored keys turned to where they are attended; of frame 0 also as stored, where that is what fits."""
    turned = rotate(stored, rope.tokens(rows.temporal_index, rows.token))
    first = (rows.frame == 0)[None, :, None, None]
    return torch.where(first & ((stored - ours).abs() < (turned - ours).abs()), stored, turned)
