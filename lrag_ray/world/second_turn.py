"""What a context method remembers: a rollout is given the true first turn and goes on for another one.

No VAE and no judge: the truth is known in latents, and what stands in a slot is the thing whose code comes closest.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrag_ray.context.policy import ContextPolicy
from lrag_ray.rollout.noise import KeyedNoise
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.wan.transformer import CausalWanTransformer
from lrag_ray.world.code import CELL, LinearCode
from lrag_ray.world.contexts import BLOCK
from lrag_ray.world.generator import LATENT_SHAPE, SAMPLER, TextFeatures
from lrag_ray.world.scenes import SLOT, SLOTS, THINGS, TURN, Scene, things_in_view


class SecondTurn(NamedTuple):
    """How the second turn compares with the first."""

    identity: float
    """Share of things in whole view that are the ones of the first turn, kind and colour; chance is 1/24."""
    error: float
    """Mean squared difference of the latents, whose values have unit variance."""


def second_turn(
    transformer: CausalWanTransformer,
    policy: type[ContextPolicy[Any]],
    settings: Any,
    scene: Scene,
    code: LinearCode,
    features: TextFeatures,
    seed: int = 0,
    frames: int = TURN,
) -> SecondTurn:
    """Roll out the first `frames` of the second turn after the true first one."""
    prompt = scene.setting.prompt
    truth = code.of_scene(scene, range(TURN + frames))
    noise = KeyedNoise(seed, [prompt], [0], (BLOCK, *LATENT_SHAPE))
    rollout = Rollout(
        transformer, SAMPLER, policy, settings, features[prompt][None], noise, LATENT_SHAPE, keys=[(seed, prompt, 0)]
    )
    rollout.replay(truth[None, :TURN])
    made = torch.cat([block.latents[0] for block in rollout.blocks(frames // BLOCK)])
    error = (made - truth[TURN:]).square().mean()
    return SecondTurn(_identity(made, scene, code), float(error))


def _identity(latents: Tensor, scene: Scene, code: LinearCode) -> float:
    """Over the frames [F, C, H, W] of a turn from its beginning, and all things in whole view."""
    frames = range(len(latents))
    # What each frame would be with every thing in turn in all of the slots: [things, F, C, H, W].
    others = [Scene(scene.setting, (thing,) * SLOTS) for thing in range(THINGS)]
    candidates = torch.stack([code.of_scene(other, frames) for other in others])
    right = []
    for frame, latent in enumerate(latents):
        for slot, column in things_in_view((scene.setting.pose + frame) % TURN):
            cells = slice(column // CELL, column // CELL + SLOT // CELL)
            distance = (candidates[:, frame, :, :, cells] - latent[:, :, cells]).square().flatten(1).sum(dim=1)
            right.append(int(distance.argmin()) == scene.things[slot])
    return sum(right) / len(right)
