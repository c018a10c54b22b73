"""What the losses are for: neighbours less alike with the delta loss, smoother paths with the smoothness term."""

from __future__ import annotations

from statistics import mean
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from lrag_ray.retrieval.encoder import EncoderConfig
from lrag_ray.retrieval.losses import LossConfig
from lrag_ray.retrieval.measures import bend, mean_by_distance, similarity_map
from lrag_ray.retrieval.training import OptimizerConfig
from lrag_ray.training.loop import Trainer, TrainingSettings
from lrag_ray.training.read_ahead import WindowReader
from lrag_ray.training.windows import Rollouts, Window, WindowSampler
from lrag_ray.wan.keyed import keyed_generator
from tests.training.small import Memory

SHAPE, FRAMES, LENGTH, COUNT, HELD_OUT = (16, 8, 12), 24, 8, 16, 4


def moving(index: int) -> Tensor:
    """Four patterns that come and go slowly, and a fifth that flickers from frame to frame."""
    patterns = torch.nn.functional.interpolate(
        torch.randn(6, 16, 4, 6, generator=keyed_generator("patterns")), scale_factor=2, mode="bilinear"
    )
    generator = keyed_generator("motion", index)
    phase, speed = 6.28 * torch.rand(4, generator=generator), 0.1 + 0.15 * torch.rand(4, generator=generator)
    slow = torch.sin(speed * torch.arange(FRAMES)[:, None] + phase)
    flicker = 0.5 * torch.randn(FRAMES, 1, generator=generator)
    weights = torch.cat([slow, flicker, torch.ones(FRAMES, 1)], dim=1)
    return (weights @ (1.5 * patterns).flatten(1)).view(FRAMES, *SHAPE)


class Found(NamedTuple):
    """Means over rollouts that were held out."""

    neighbours: float
    bend: float


def trained(data: list[Tensor], delta: float, smooth: float) -> Found:
    rollouts = Rollouts([f"{i:02d}" for i in range(COUNT)], np.full(COUNT, FRAMES), np.arange(COUNT) < HELD_OUT)

    def read_into(window: Window, out: Tensor) -> None:
        out.copy_(data[window.rollout][window.start : window.start + LENGTH])

    reader = WindowReader(read_into, (LENGTH, *SHAPE), torch.float32, str)
    settings = TrainingSettings(
        sizes=EncoderConfig(*SHAPE, 8, (16,)), losses=LossConfig(delta_weight=delta, smooth_weight=smooth),
        optimizer=OptimizerConfig(lr=1e-2), epochs=50, seed=3,
    )  # fmt: skip
    trainer = Trainer(settings, WindowSampler(rollouts, LENGTH, 6, 3), reader, Memory())
    assert trainer.run().state == "done"
    with torch.no_grad():
        embeddings = [trainer.model.encode(each, normalize=False) for each in data[:HELD_OUT]]
    return Found(
        mean(float(mean_by_distance(similarity_map(each))[1]) for each in embeddings), mean(map(bend, embeddings))
    )


@pytest.fixture(scope="module")
def data() -> list[Tensor]:
    return [moving(index) for index in range(COUNT)]


def test_each_loss_does_what_it_is_for(data: list[Tensor]) -> None:
    plain, delta, full = trained(data, 0, 0), trained(data, 1, 0), trained(data, 1, 1)
    assert delta.neighbours < plain.neighbours - 0.01
    assert full.bend < 0.6 * delta.bend
