"""What the shipped generator shows: retrieval brings back what history alone can know."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lrag_ray.context.base import BaseSettings
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.rag import Rag, RagSettings
from lrag_ray.world.builtin import load_generator
from lrag_ray.world.code import fit_code
from lrag_ray.world.generator import TextFeatures
from lrag_ray.world.scenes import HELD_OUT, make_scene
from lrag_ray.world.second_turn import second_turn

METHODS: dict[str, tuple[Any, Any]] = {
    "infinity_rope": (InfinityRope, BaseSettings()),
    "random": (Rag, RagSettings(descriptor="avg_pool", choose="random")),
    "rag": (Rag, RagSettings(descriptor="avg_pool")),
}


@pytest.mark.timeout(1200)
def test_similar_frames_bring_things_back_and_random_ones_some_of_them() -> None:
    """Paired over 8 held-out scenes: each difference exceeds its 95 % interval."""
    transformer, code, features = load_generator(), fit_code(0), TextFeatures()
    scenes = [make_scene("science", i, among=HELD_OUT) for i in range(8)]
    identity = {
        name: torch.tensor([second_turn(transformer, *method, scene, code, features).identity for scene in scenes])
        for name, method in METHODS.items()
    }
    for better, worse in (("rag", "infinity_rope"), ("rag", "random"), ("random", "infinity_rope")):
        difference = identity[better] - identity[worse]
        # Student's t for 7 degrees of freedom.
        assert difference.mean() > 2.365 * difference.std() / len(scenes) ** 0.5, (better, worse, identity)


def test_one_scene_says_so_already() -> None:
    transformer, code, features = load_generator(), fit_code(0), TextFeatures()
    scene = make_scene("science", 0, among=HELD_OUT)
    errors = {
        name: second_turn(transformer, *METHODS[name], scene, code, features, frames=12).error
        for name in ("infinity_rope", "rag")
    }
    assert errors["rag"] < 0.75 * errors["infinity_rope"]
