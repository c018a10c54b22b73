"""Training of the world's VAE: AutoencoderKLWan at base width 8, with 16-fold spatial and 4-fold temporal compression.

The latents are given (`world.code`): the encoder learns to make them, the decoder to undo them. The three video frames
between two codes are nowhere in them; the decoder knows how the view moves.

Single frames come first. Layers are initialised so that what is learned of them holds for every frame of a video: a
causal kernel sees the present alone, and a change of the frame rate copies a frame or drops three. The encoder stays
so, because a code is that of one frame; the decoder then learns how the view moves.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.vae import FRAMES_PER_LATENT, WanVae
from lrag_ray.wan.vae_on_cpu import speed_up
from lrag_ray.world.code import CELL, CELLS, CHANNELS, LinearCode
from lrag_ray.world.scenes import HELD_OUT, TRAINED, TURN, Setting, make_scene, view_of
from lrag_ray.world.training import Lesson, Recipe

SIZES: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": CHANNELS,
    "dim_mult": [1, 1, 2, 4, 4],
    "num_res_blocks": 1,
    "scale_factor_spatial": 16,
    "temperal_downsample": [False, True, True, False],
    "latents_mean": [0.0] * CHANNELS,
    "latents_std": [1.0] * CHANNELS,
}
"""Arguments of AutoencoderKLWan. A code has zero mean and unit variance already."""


@dataclass(frozen=True)
class VaeRecipe:
    """What the VAE is trained on."""

    recipe: Recipe = field(
        default=Recipe(seed=0, steps=8800, muon=0.05, adam=5e-3, average=0.995, restarts=((2400, 1.0), (4800, 0.6)))
    )
    stills: int = 18
    """Single frames of a step at first, and those of each step that the encoder learns from."""
    still_steps: int = 400
    """Steps on single frames alone."""
    clips: int = 2
    """Clips of a step after single frames."""
    latent_frames: int = 4
    """Of each clip."""
    cells: int = 4
    """Height and width of a clip in latent cells, cut out anywhere. torch computes several small clips faster than a
    large one."""
    noise: float = 0.05
    """Standard deviation of what is added to the codes that the decoder sees: a generator's are not exact."""


@dataclass(frozen=True)
class Clips:
    """Pixels [B, 3, T, H, W] in [-1, 1] and their codes [B, 16, F, H/16, W/16]."""

    pixels: Tensor
    codes: Tensor


class VaeLesson(Lesson):
    """Clips that no step sees again."""

    name = "vae"

    def __init__(self, how: VaeRecipe, code: LinearCode) -> None:
        from diffusers import AutoencoderKLWan

        self.how, self._code = how, code
        self.model: Any = AutoencoderKLWan(**SIZES)
        _fill(self.model, how.recipe.seed)
        speed_up(self.model)
        # Mean squared error of pixels that an error of 1 in a channel makes.
        self._energy = torch.linalg.pinv(code.weight).square().mean(dim=1)

    @property
    def identity(self) -> dict[str, object]:
        """What the training depends on."""
        return {"sizes": SIZES, "how": asdict(self.how)}

    def matrices(self) -> list[nn.Parameter]:
        """All kernels."""
        return [each for name, each in self.model.named_parameters() if _is_kernel(name, each)]

    def loss(self, step: int) -> dict[str, Tensor]:
        """Mean squared errors of the encoder's codes and of the decoder's pixels."""
        key = (self.how.recipe.seed, step)
        clips = partial(clips_of, self._code, cells=self.how.cells)
        shown = stills = clips(self.how.stills, 1, "vae", *key)
        if step >= self.how.still_steps:
            shown = clips(self.how.clips, self.how.latent_frames, "vae", *key)
        noise = torch.randn(shown.codes.shape, generator=keyed_generator("noise of codes", *key))
        error = (decoded(self.model, shown.codes + self.how.noise * noise) - shown.pixels).square().mean()
        encoded = self.model.encode(stills.pixels).latent_dist.mode()
        missed = (encoded - stills.codes).square().mean(dim=(0, 2, 3, 4))
        loss = error + (self._energy * missed).sum() + 0.1 * missed.mean()
        return {"loss": loss, "psnr": psnr(error.detach()), "code": missed.mean()}


def _is_kernel(name: str, parameter: nn.Parameter) -> bool:
    return parameter.dim() >= 4 and not name.endswith("gamma")


@torch.no_grad()
def _fill(model: nn.Module, seed: int) -> None:
    """Kernels that keep the variance, no biases, and residual branches that begin small: with torch's own values the
    signal fades beside the biases. Kernels over time as the module says."""
    fill_random(model, seed)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif name.endswith("gamma"):
            parameter.fill_(1)
        elif "time_conv" in name:
            # [n · channels, channels, 3, 1, 1]: each of n frames is the newest.
            parameter.zero_()
            parameter[:, :, 2, 0, 0] = torch.eye(parameter.shape[1]).repeat(len(parameter) // parameter.shape[1], 1)
        elif parameter.dim() == 5 and parameter.shape[2] == 3:
            parameter[:, :, :2] = 0
            parameter[:, :, 2].mul_(math.sqrt(3))
        if name.endswith("conv2.weight"):
            parameter.mul_(0.1)


def decoded(model: Any, codes: Tensor) -> Tensor:
    """Pixels [B, 3, T, H, W] of codes [B, C, F, h, w], not clamped, so that every error has a gradient."""
    features: list[Any] = [None] * model._cached_conv_counts["decoder"]
    hidden = model.post_quant_conv(codes)
    parts = [
        model.decoder(hidden[:, :, i : i + 1], feat_cache=features, feat_idx=[0], first_chunk=i == 0)
        for i in range(hidden.shape[2])
    ]
    return torch.cat(parts, dim=2)


def clips_of(
    code: LinearCode,
    count: int,
    latent_frames: int,
    *key: str | int,
    among: tuple[Setting, ...] = TRAINED,
    cells: int = CELLS,
) -> Clips:
    """Clips of as many scenes, each from some place of its ring on, cut out to `cells` x `cells` latent cells."""
    pixels, codes = [], []
    for i in range(count):
        scene = make_scene("clips", *key, i, among=among)
        first = int(torch.randint(TURN, (1,), generator=keyed_generator("place", *key, i)))
        frames = 1 + FRAMES_PER_LATENT * (latent_frames - 1)
        start = scene.setting.pose + first
        views = [view_of(scene.ring, start + each / FRAMES_PER_LATENT) for each in range(frames)]
        whole = torch.from_numpy(np.stack(views)).permute(3, 0, 1, 2).float() / 127.5 - 1
        coded = code.of_scene(scene, range(first, first + latent_frames)).transpose(0, 1)
        y, x = torch.randint(CELLS - cells + 1, (2,), generator=keyed_generator("cut", *key, i)).tolist()
        codes.append(coded[..., y : y + cells, x : x + cells])
        pixels.append(whole[..., y * CELL : (y + cells) * CELL, x * CELL : (x + cells) * CELL])
    return Clips(torch.stack(pixels), torch.stack(codes))


def held_out_psnr(vae: WanVae, code: LinearCode, scenes: int = 8, latent_frames: int = 12) -> float:
    """PSNR in dB over scenes of held-out settings, encoded and decoded: mean squared error over all pixels together."""
    errors = []
    for i in range(scenes):
        pixels = clips_of(code, 1, latent_frames, "held out", i, among=HELD_OUT).pixels[0].transpose(0, 1)
        errors.append((vae.decode(vae.encode(pixels)) - pixels).square().mean())
    return float(psnr(torch.stack(errors).mean()))


def psnr(error: Tensor) -> Tensor:
    """dB of a mean squared error of values in [-1, 1]."""
    return 10 * torch.log10(4 / error)
