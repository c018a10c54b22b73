"""Training of the world's generator: flow matching at the sampler's timesteps, in the contexts of three methods.

Not a replication of the paper, whose generator never saw a retrieved frame in training: lesson ``generator`` trains
with them, lesson ``zero_shot`` without.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lrag_ray.rollout.loop import timesteps_of
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.keyed import key_digest, keyed_generator
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.schedule import FlowMatchSchedule
from lrag_ray.wan.text import TextEncoder, tiny_text_encoder
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.world.code import CELLS, CHANNELS, LinearCode
from lrag_ray.world.contexts import (
    BLOCK,
    Budget,
    Contexts,
    Frames,
    Method,
    contexts_of,
    first_turn,
    joined,
    later_turn,
    opening,
)
from lrag_ray.world.scenes import Scene, background_astray, make_scene
from lrag_ray.world.teacher import teacher_forced
from lrag_ray.world.training import Lesson, Recipe

SIZES = WanConfig(dim=128, ffn_dim=256, freq_dim=64, text_dim=32, text_len=96, num_heads=4, num_layers=4)
SAMPLER = SamplerConfig()
_ASTRAY = 0.45
"""Standard deviation of a wrong hue of the rail, in latent frames; none is wrong by more than two of them. Where things
stand, two latent frames apart, tells a place from those less than one away."""
_ROUGH = 0.15
"""Highest standard deviation of noise on a history."""


@dataclass(frozen=True)
class GeneratorRecipe:
    """What a generator of the world is trained on."""

    recipe: Recipe = field(default=Recipe(seed=0, steps=2400, muon=0.02, adam=2e-3))
    batch: int = 9
    shares: tuple[tuple[Method, float], ...] = (("rag", 0.6), ("infinity_rope", 0.25), ("base", 0.15))
    """Methods whose contexts are trained, and how often."""
    later: float = 0.75
    """Share of sequences that come by the same places again."""
    opening: float = 0.18
    """Share of sequences of which the first block alone is learned: the only ones that need their prompt."""
    astray: float = 0.5
    """Share of sequences whose history has wrong hues of the rail, so that where things stand corrects them. In a
    rollout each block continues the hues that the last one drew, and small errors add up."""
    rough: float = 0.5
    """Share of sequences whose history has noise, as what is generated does."""
    chance: float = 0.2
    """Share of rag contexts whose frames are drawn by chance."""
    timesteps: tuple[float, ...] = (0.5, 0.25, 0.125, 0.125)
    """Share of each of the sampler's timesteps. At the first nothing but the context tells what comes."""


ZERO_SHOT = GeneratorRecipe(
    recipe=Recipe(seed=0, steps=1200, muon=0.02, adam=2e-3), shares=(("infinity_rope", 0.65), ("base", 0.35))
)
"""Without rag's contexts. The other generator sees fewer sequences in these two, so half of its steps are enough."""


class Faults(NamedTuple):
    """What is wrong with a history."""

    rails: tuple[float, float] = (0, 0)
    """Latent frames that the rail is ahead: in what follows the first block, and in the last blocks."""
    noise: float = 0
    """Standard deviation of noise on all of it; that of the latents is 1."""


@dataclass(frozen=True)
class Batch:
    """Sequences of clean frames and noisy blocks, as `teacher.teacher_forced` takes them."""

    latents: Tensor
    timesteps: Tensor
    text: Tensor
    contexts: Contexts
    flow: Tensor
    """What the learned frames' output should be, [B, n, C, H, W]."""


class GeneratorLesson(Lesson):
    """Batches of scenes that no step sees again."""

    model: CausalWanTransformer

    def __init__(self, name: str, how: GeneratorRecipe, code: LinearCode) -> None:
        self.name = name
        self.how, self._code = how, code
        self.model = CausalWanTransformer(SIZES)
        fill_random(self.model, how.recipe.seed)
        # The network begins with no flow and with equal modulation everywhere.
        nn.init.zeros_(self.model.head.head.weight)
        self._features = TextFeatures()
        self._timesteps = torch.tensor(timesteps_of(SAMPLER, 1))
        self._sigmas = FlowMatchSchedule(SAMPLER.shift).sigma(self._timesteps)

    @property
    def identity(self) -> dict[str, object]:
        """What the training depends on."""
        return {"sizes": asdict(SIZES), "sampler": asdict(SAMPLER), "how": asdict(self.how)}

    def matrices(self) -> list[nn.Parameter]:
        """The matrices of the layers."""
        return [each for each in self.model.blocks.parameters() if each.dim() == 2]

    def loss(self, step: int) -> dict[str, Tensor]:
        """Mean squared error of the flow."""
        batch = self.batch(step)
        flow = teacher_forced(self.model, batch.latents, batch.timesteps, batch.text, batch.contexts)
        error = (flow - batch.flow).square().mean(dim=(2, 3, 4))
        first = batch.timesteps[:, -error.shape[1] :] == self._timesteps[0]
        return {"loss": error.mean(), "first": error[first].mean()}

    def batch(self, step: int) -> Batch:
        """What a step learns from."""
        return self._joined([self._sequence(step, i) for i in range(self.how.batch)])

    def _joined(self, rows: list[Batch]) -> Batch:
        latents, timesteps, text, flow = (
            torch.cat([getattr(row, name) for row in rows]) for name in ("latents", "timesteps", "text", "flow")
        )
        return Batch(latents, timesteps, text, joined([row.contexts for row in rows]), flow)

    def _sequence(self, step: int, i: int) -> Batch:
        key = (self.how.recipe.seed, step, i)
        draw = np.random.Generator(np.random.Philox(key=np.frombuffer(key_digest("batch", *key)[:16], np.uint64)))
        sequence = later_turn(draw) if draw.random() < self.how.later else first_turn(draw)
        if draw.random() < self.how.opening:
            sequence = opening()
        methods, shares = zip(*self.how.shares, strict=True)
        method: Method = methods[int(draw.choice(len(methods), p=shares))]
        by_chance = draw.random() < self.how.chance
        steps = draw.choice(len(self._timesteps), len(sequence.learned), p=self.how.timesteps)
        faults = self._faults(draw)
        return self.sequence(key, sequence, method, steps.tolist(), draw if by_chance else None, faults)

    def _faults(self, draw: np.random.Generator) -> Faults:
        rails = (0.0, 0.0)
        if draw.random() < self.how.astray:
            first, last = np.clip(draw.normal(0, _ASTRAY, 2), -2 * _ASTRAY, 2 * _ASTRAY).tolist()
            rails = (first, last)
        noise = draw.uniform(0, _ROUGH) if draw.random() < self.how.rough else 0.0
        return Faults(rails, noise)

    def sequence(
        self,
        key: tuple[int, ...],
        frames: Frames,
        method: Method,
        steps: list[int],
        by_chance: np.random.Generator | None = None,
        faults: Faults = Faults(),  # noqa: B008 - immutable
    ) -> Batch:
        """A batch of one: the learned blocks at noise levels `steps`, in contexts of `method`."""
        scene = make_scene("train", *key)
        learned = [first + i for first in frames.learned for i in range(BLOCK)]
        latents = self._history(key, scene, frames, faults)

        def similar(query: int, eligible: list[int]) -> list[int]:
            if by_chance is not None:
                return [int(frame) for frame in by_chance.permutation(eligible)]
            described = torch.stack([latents[frame].mean(dim=(1, 2)) for frame in [query, *eligible]])
            unit = nn.functional.normalize(described, dim=-1)
            order = torch.argsort(unit[1:] @ unit[0], descending=True, stable=True)
            return [eligible[i] for i in order.tolist()]

        contexts = contexts_of(method, Budget(), frames, similar)
        clean = torch.stack([latents[frame] for frame in frames.clean])
        true = self._code.of_scene(scene, learned)
        level = torch.tensor(steps).repeat_interleave(BLOCK)
        sigma = self._sigmas[level].view(-1, 1, 1, 1)
        noise = torch.randn(true.shape, generator=keyed_generator("noise of training", *key))
        noisy = (1 - sigma) * true + sigma * noise
        timesteps = torch.cat([torch.full((len(clean),), SAMPLER.context_timestep), self._timesteps[level]])
        text = self._features[scene.setting.prompt]
        return Batch(torch.cat([clean, noisy])[None], timesteps[None], text[None], contexts, (noise - true)[None])

    def _history(self, key: tuple[int, ...], scene: Scene, frames: Frames, faults: Faults) -> dict[int, Tensor]:
        """Latents [C, H, W] of the clean frames, and of the frame before each span of them, which asks for it."""
        latents: dict[int, Tensor] = {}
        for span, ahead in zip(frames.spans(), (0, *faults.rails), strict=True):
            ring = scene.ring_before(background_astray(scene.setting, ahead)) if ahead else scene.ring
            shown = [*([span[0] - 1] if span[0] else []), *span]
            of_span = dict(zip(shown, self._code.of_scene(scene, shown, ring), strict=True))
            latents = of_span | latents
        if faults.noise:
            generator = keyed_generator("noise of history", *key)
            latents = {
                frame: latent + faults.noise * torch.randn(latent.shape, generator=generator)
                for frame, latent in latents.items()
            }
        return latents


def text_encoder() -> TextEncoder:
    """The world's text encoder: the random tiny one, which tells its words apart."""
    return tiny_text_encoder(SIZES.text_dim, SIZES.text_len)


class TextFeatures(dict[str, Tensor]):
    """Features [text_len, text_dim] of prompts, zero behind them; each is encoded when it is first asked for."""

    def __init__(self) -> None:
        super().__init__()
        self._encoder = text_encoder()

    def __missing__(self, prompt: str) -> Tensor:
        (rows,) = self._encoder.encode([prompt])
        features = torch.zeros(SIZES.text_len, SIZES.text_dim)
        features[: len(rows)] = rows
        self[prompt] = features
        return features


LATENT_SHAPE = (CHANNELS, CELLS, CELLS)
