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
from lrag_ray.world.code import LinearCode
from lrag_ray.world.contexts import BLOCK
from lrag_ray.world.generator import LATENT_SHAPE, SAMPLER, TextFeatures
from lrag_ray.world.scenes import THINGS, TURN, Scene, things_in_view


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
) -> SecondTurn:
    """Roll out the second turn after the true first one."""
    prompt = scene.setting.prompt
    truth = code.of_scene(scene, range(2 * TURN))
    noise = KeyedNoise(seed, [prompt], [0], (BLOCK, *LATENT_SHAPE))
    rollout = Rollout(
        transformer, SAMPLER, policy, settings, features[prompt][None], noise, LATENT_SHAPE, keys=[(seed, prompt, 0)]
    )
    rollout.replay(truth[None, :TURN])
    made = torch.cat([block.latents[0] for block in rollout.blocks(TURN // BLOCK)])
    error = (made - truth[TURN:]).square().mean()
    return SecondTurn(_identity(made, scene, code), float(error))


def _identity(latents: Tensor, scene: Scene, code: LinearCode) -> float:
    """Over all frames of one turn [48, C, H, W] and all things in whole view."""
    right = []
    for frame, latent in enumerate(latents):
        pose = (scene.setting.pose + frame) % TURN
        views = things_in_view(pose)
        # The view as it would be with every thing in turn in all of its slots.
        candidates = torch.stack([_with_things(scene, thing, code, pose) for thing in range(THINGS)])
        for slot, column in views:
            cells = slice(max(0, column // 16), column // 16 + 4)
            distance = (candidates[:, :, :, cells] - latent[:, :, cells]).square().flatten(1).sum(dim=1)
            right.append(int(distance.argmin()) == scene.things[slot])
    return sum(right) / len(right)


def _with_things(scene: Scene, thing: int, code: LinearCode, pose: int) -> Tensor:
    other = Scene(scene.setting, (thing,) * len(scene.things))
    return code.of_scene(other, [pose - scene.setting.pose])[0]
