"""Measures of embeddings on trajectories whose answers are known."""

from __future__ import annotations

import math

import pytest
import torch

from lrag_ray.context.rag import RagSettings
from lrag_ray.retrieval.measures import bend, mean_by_distance, played_back, similarity_map

SETTINGS = RagSettings(window=6, sink=1, top_k=2, recent_exclude=1, descriptor="avg_pool")


def played(similarity: torch.Tensor) -> object:
    return played_back(
        similarity, frames_per_block=3, sink=1, top_k=2, recent_exclude=1,
        history=lambda start: SETTINGS.history(start, 3),
    )  # fmt: skip


def test_similarity_is_the_cosine_and_does_not_depend_on_length() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0]])
    expected = torch.tensor([[1, 0, 0.5**0.5], [0, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]], dtype=torch.float64)
    torch.testing.assert_close(similarity_map(x), expected)
    torch.testing.assert_close(mean_by_distance(expected), torch.tensor([1, 0.5**1.5, 0.5**0.5], dtype=torch.float64))


def test_bend_is_zero_on_a_line_and_two_where_the_path_turns_back_at_every_step() -> None:
    line = torch.arange(10.0)[:, None] * torch.tensor([1.0, 2.0])
    to_and_fro = (torch.arange(10) % 2)[:, None].float()
    walk = torch.randn(20_000, 8, generator=torch.Generator().manual_seed(0)).cumsum(0)
    assert bend(line) == pytest.approx(0, abs=1e-12)
    assert bend(to_and_fro) == pytest.approx(2)
    assert bend(walk) == pytest.approx(2**0.5, rel=0.01)
    assert bend(7 * walk) == pytest.approx(bend(walk))
    assert math.isnan(bend(line[:2]))


def test_retrieval_that_only_likes_the_newest_stays_near() -> None:
    times = torch.arange(30.0)
    near = -(times[:, None] - times).abs()
    found = played(near.double())
    # Window 6, one newest frame excluded: before block start s the eligible frames end at s - 7.
    assert found.distance == pytest.approx(6.5 - 0.0)  # type: ignore[attr-defined]
    assert found.changed == 1  # type: ignore[attr-defined]


def test_retrieval_that_only_likes_the_oldest_never_changes() -> None:
    times = torch.arange(30.0)
    old = (-times).expand(30, 30)
    found = played(old.double())
    assert found.changed == 0  # type: ignore[attr-defined]
    assert found.reach > 0.9  # type: ignore[attr-defined]
    assert found.spread < 0.5  # type: ignore[attr-defined]


def test_a_rollout_too_short_to_retrieve_has_no_numbers() -> None:
    found = played(torch.eye(6, dtype=torch.float64))
    assert found.blocks == 0 and math.isnan(found.distance)  # type: ignore[attr-defined]
