"""The methods on a CUDA device: the same rollouts as on the CPU, and exact resume through the history bank."""

from __future__ import annotations

import pytest
import torch

from lrag_ray.context.base import Base
from lrag_ray.context.deep_forcing import DeepForcing, DeepForcingSettings
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.rag import Rag, RagSettings
from tests.tiny import generate, start, tiny_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCKS = 10
METHODS = [
    (Base, None),
    (InfinityRope, None),
    (DeepForcing, DeepForcingSettings()),
    (Rag, RagSettings(descriptor="avg_pool")),
]


@pytest.mark.parametrize(("policy", "settings"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_rollout_is_that_of_the_cpu(policy: type[ContextPolicy], settings: object) -> None:
    expected = generate(start(tiny_transformer(), policy, settings), BLOCKS)
    found = generate(start(tiny_transformer().cuda(), policy, settings), BLOCKS)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("policy", "settings"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_replayed_rollout_goes_on_with_the_same_bits(policy: type[ContextPolicy], settings: object) -> None:
    model = tiny_transformer().cuda()
    results = list(start(model, policy, settings).blocks(BLOCKS))
    again = start(model, policy, settings)
    done = results[: BLOCKS - 3]
    again.replay(torch.cat([result.latents for result in done], dim=1), [result.state for result in done])
    for result, expected in zip(again.blocks(3), results[BLOCKS - 3 :], strict=True):
        assert torch.equal(result.latents, expected.latents)
