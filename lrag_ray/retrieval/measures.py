"""What embeddings of a rollout's frames are worth for retrieval: similarity over time, and which frames it finds.

The similarity map is the paper's Figure 3 (Figure 5 with features of decoded frames). Retrieval is played back on the
map alone, with the history and exclusions that rag has, so no generator is needed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from lrag_ray.retrieval.similarity import most_similar


class Retrieval(NamedTuple):
    """Means over the blocks of a rollout that retrieve; NaN where none does."""

    blocks: int
    """Blocks that had at least `top_k` eligible frames."""
    distance: float
    """How far back the retrieved frames are, in latent frames."""
    reach: float
    """The same as a share of the distance to the oldest eligible frame, 0..1."""
    spread: float
    """Standard deviation of the retrieved frames' positions over that of the eligible ones: 1 is as spread as those."""
    changed: float
    """Share of the retrieved frames that the block before did not retrieve, 0..1."""


def similarity_map(descriptors: Tensor) -> Tensor:
    """Cosine similarity [T, T] of descriptors [T, D], float64."""
    unit = F.normalize(descriptors.double(), dim=-1, eps=1e-12)
    return unit @ unit.T


def mean_by_distance(similarity: Tensor) -> Tensor:
    """Mean similarity [T] of frames 0, 1, 2, … apart."""
    return torch.stack([similarity.diagonal(offset).mean() for offset in range(len(similarity))])


def bend(embeddings: Tensor) -> float:
    """Mean second difference over mean first difference of a trajectory [T, D].

    0 on a straight line at constant speed, the square root of 2 on a random walk, more where it jumps to and fro. It
    does not depend on the scale of the embedding. NaN below three frames or where nothing moves.
    """
    first = embeddings.double().diff(dim=0)
    if len(first) < 2:
        return math.nan
    return float(first.diff(dim=0).norm(dim=-1).mean() / first.norm(dim=-1).mean())


def played_back(
    similarity: Tensor,
    *,
    frames_per_block: int,
    sink: int,
    top_k: int,
    recent_exclude: int,
    history: Callable[[int], int],
) -> Retrieval:
    """What rag would retrieve on a rollout with this similarity map [T, T].

    `history` gives the number of frames in the history, from frame `sink` on, when the block that starts at a frame
    chooses (`RagSettings.history`).
    """
    rows: list[tuple[float, float, float]] = []
    changed: list[float] = []
    before: set[int] | None = None
    for start in range(frames_per_block, len(similarity), frames_per_block):
        query = start - 1
        eligible = history(start) - recent_exclude
        if eligible < top_k or top_k < 1:
            continue
        scores = similarity[query, sink : sink + eligible]
        chosen = torch.tensor([sink + at for at in most_similar(scores, top_k)], dtype=torch.float64)
        everyone = torch.arange(sink, sink + eligible, dtype=torch.float64)
        back = float((query - chosen).mean())
        spread = float(chosen.std(unbiased=False) / everyone.std(unbiased=False)) if eligible > 1 else 0.0
        rows.append((back, back / (query - sink), spread))
        now = {int(frame) for frame in chosen}
        if before is not None:
            changed.append(len(now - before) / top_k)
        before = now
    if not rows:
        return Retrieval(0, math.nan, math.nan, math.nan, math.nan)
    distance, reach, spread = torch.tensor(rows, dtype=torch.float64).mean(dim=0).tolist()
    return Retrieval(len(rows), distance, reach, spread, sum(changed) / len(changed) if changed else math.nan)
