"""Teacher forcing sees what a rollout sees."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lrag_ray.context.base import Base, BaseSettings
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.rag import Rag
from lrag_ray.rollout.noise import RecordedNoise
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.world.code import CELLS, CHANNELS, LinearCode
from lrag_ray.world.contexts import BLOCK, Budget, Frames, Method, later_turn
from lrag_ray.world.generator import SAMPLER, Faults, GeneratorLesson, GeneratorRecipe
from lrag_ray.world.teacher import teacher_forced

FRAMES = Frames(clean=list(range(33)), learned=[0, 9, 24, 30])
POLICIES: dict[str, Any] = {"base": Base, "infinity_rope": InfinityRope, "rag": Rag}


class FirstPass:
    """Keeps the flow of each block's first pass."""

    def __init__(self) -> None:
        self.flow: Tensor | None = None

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None:
        if step == 0:
            self.flow = flow.clone()

    def on_attention(self, *call: object) -> None:
        pass


@pytest.fixture(scope="module")
def lesson() -> GeneratorLesson:
    """With random weights, whose flow depends on all that is attended to."""
    draw = torch.Generator().manual_seed(0)
    code = LinearCode(torch.randn(768, 16, generator=draw) / 20, torch.zeros(16))
    lesson = GeneratorLesson("generator", GeneratorRecipe(), code)
    fill_random(lesson.model, 1, gain=1.5)
    return lesson


@pytest.mark.parametrize("method", ["base", "infinity_rope", "rag"])
def test_flow_is_that_of_a_rollout(lesson: GeneratorLesson, method: Method) -> None:
    batch = lesson.sequence((5,), FRAMES, method, [0] * len(FRAMES.learned))
    with torch.no_grad():
        flow = teacher_forced(lesson.model, batch.latents, batch.timesteps, batch.text, batch.contexts)[0]
    settings = Budget().rag() if method == "rag" else BaseSettings()
    for i, first in enumerate(FRAMES.learned):
        part = slice(i * BLOCK, (i + 1) * BLOCK)
        noise = torch.zeros(1, 36, CHANNELS, CELLS, CELLS)
        noise[:, first : first + BLOCK] = batch.latents[:, len(FRAMES.clean) :][:, part]
        draws = torch.zeros(12, 3, 1, BLOCK, CHANNELS, CELLS, CELLS)
        probe = FirstPass()
        rollout = Rollout(
            lesson.model,
            SAMPLER,
            POLICIES[method],
            settings,
            batch.text,
            RecordedNoise(noise, draws, BLOCK),
            (CHANNELS, CELLS, CELLS),
            probe=probe,
        )
        if first:
            rollout.replay(batch.latents[:, :first])
        next(rollout.blocks(1))
        assert probe.flow is not None
        torch.testing.assert_close(flow[part], probe.flow[0], rtol=1e-4, atol=1e-4)


def test_retrieved_frames_show_the_places_that_are_learned(lesson: GeneratorLesson) -> None:
    for seed in range(20):
        frames = later_turn(np.random.default_rng(seed))
        shown = {frame % 48 for frame in frames.clean[3:21]}
        assert all((first + i) % 48 in shown for first in frames.learned for i in range(BLOCK))
        assert all(frame % 3 == i % 3 for i, frame in enumerate(frames.clean))


def test_some_sequences_learn_the_opening_alone(lesson: GeneratorLesson) -> None:
    """Their learned blocks all attend to themselves alone."""
    contexts = [lesson.batch(step).contexts for step in range(8)]
    openings = sum(int(each.absent[:, each.learned_from :, :-BLOCK].all(dim=(1, 2)).sum()) for each in contexts)
    assert 5 <= openings <= 24, openings


def test_a_history_that_is_astray_is_answered_with_the_truth(lesson: GeneratorLesson) -> None:
    frames = later_turn(np.random.default_rng(0))
    true = lesson.sequence((5,), frames, "infinity_rope", [0] * len(frames.learned))
    astray = lesson.sequence((5,), frames, "infinity_rope", [0] * len(frames.learned), faults=Faults((-0.25, 0.5)))
    clean = len(frames.clean)
    assert torch.equal(true.flow, astray.flow)
    assert torch.equal(true.latents[:, clean:], astray.latents[:, clean:])
    changed = (true.latents[0, :clean] != astray.latents[0, :clean]).flatten(1).any(dim=1).tolist()
    assert changed == [False] * BLOCK + [True] * (clean - BLOCK)
    # All but the rail, in the last two rows of cells, stays.
    assert torch.equal(true.latents[0, :clean, :, :6], astray.latents[0, :clean, :, :6])


def test_noise_is_on_what_is_attended_to_alone(lesson: GeneratorLesson) -> None:
    frames = later_turn(np.random.default_rng(0))
    true = lesson.sequence((5,), frames, "base", [0] * len(frames.learned))
    rough = lesson.sequence((5,), frames, "base", [0] * len(frames.learned), faults=Faults(noise=0.1))
    clean = len(frames.clean)
    difference = rough.latents[0] - true.latents[0]
    assert 0.095 < float(difference[:clean].std()) < 0.105
    assert not difference[clean:].any()
