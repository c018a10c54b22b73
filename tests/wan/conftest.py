"""The weights of a small generator."""

from __future__ import annotations

import pytest

from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.transformer import CausalWanTransformer
from tests.wan.make import CONFIG, State


@pytest.fixture(scope="module")
def state() -> State:
    transformer = CausalWanTransformer(CONFIG)
    fill_random(transformer, seed=1)
    return dict(transformer.state_dict())
