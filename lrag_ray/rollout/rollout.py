"""Algorithm 1: the block-autoregressive rollout of a frozen causal generator.

Per block: let the context method choose what to attend to, denoise in a few passes, hand the clean latents to the
method, and run one clean-context pass whose K and V become history. Resuming needs the clean latents alone: the
clean-context passes over them rebuild every cache.

Example::

    rollout = Rollout(transformer, sampler, InfinityRope, BaseSettings(), prompt_embeds, noise, (16, 60, 104))
    latents = torch.cat([result.latents for result in rollout.blocks(40)], dim=1)
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from lrag_ray.rollout.loop import Attended, Pass, RolloutLoop, timesteps_of
from lrag_ray.rollout.types import BlockResult
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.flops import block_flops
from lrag_ray.wan.schedule import add_noise, x0_from_flow
from lrag_ray.wan.transfer import to_device


class Rollout(RolloutLoop):
    """The block loop: one block is finished before the next begins."""

    name: ClassVar[str] = "blocks"
    horizon_free: ClassVar[bool] = True

    @classmethod
    def passes(cls, sampler: SamplerConfig, blocks: int) -> int:
        """The denoising passes of each block, and a clean-context pass."""
        return sampler.passes(blocks)

    @classmethod
    def block_flops(
        cls, config: WanConfig, sampler: SamplerConfig, height: int, width: int, attended: Attended, blocks: int
    ) -> list[int]:
        """All passes of a block attend to the same frames."""
        n = sampler.frames_per_block
        return [block_flops(config, sampler, height, width, attended(n, i * n), i) for i in range(blocks)]

    def _set_up(self, sampler: SamplerConfig, batch: int) -> None:
        self._draws: list[Tensor] = []
        """Noise of the next block, where it was drawn ahead."""
        clean, *usual = self._passes([sampler.context_timestep, *timesteps_of(sampler, 1)], sampler, batch)
        first = (
            usual
            if sampler.first_block_denoising_steps is None
            else self._passes(timesteps_of(sampler, 0), sampler, batch)
        )
        self._first_block, self._other_blocks = [*first, clean], [*usual, clean]

    def _passes_of(self, block: int) -> list[Pass]:
        return self._first_block if block == 0 else self._other_blocks

    def _draw(self, block: int) -> list[Tensor]:
        """Noise of every denoising pass of a block, on the device."""
        draws = [self._noise.initial(block)]
        draws += [self._noise.renoise(block, step) for step in range(len(self._passes_of(block)) - 2)]
        return [to_device(draw, self._device, self._dtype) for draw in draws]

    @torch.no_grad()
    def _generate(self, *, more: bool) -> BlockResult:
        began = self._clock.mark()
        block, denoising = self.block, self._passes_of(self.block)[:-1]
        self._begin_block(block)
        x, *renoise = self._draws or self._draw(block)
        for step in range(len(denoising)):
            x0 = self._denoise(step, denoising[step], x)
            if step + 1 < len(denoising):
                x = add_noise(x0, renoise[step], denoising[step + 1].sigma)
        denoised = self._clock.mark()
        self._keep(block, x0)
        self._clock.add("denoise", began, denoised)
        self._clock.add("context", denoised, self._clock.mark())
        self.block += 1
        result = BlockResult(block, block * self._n, x0, self.context.trace(), self.context.block_state())
        # The device is still busy with this block: what the next one starts from gets ready meanwhile.
        self._draws = self._draw(self.block) if more else []
        return result

    def _denoise(self, step: int, at: Pass, x: Tensor) -> Tensor:
        """One transformer call on x [B, n, C, H, W]; returns x0."""
        self.context.begin_pass(step, clean=False)
        flow = self._transformer(x, at.time, self._text, self.context)
        self.context.end_pass()
        x0 = x0_from_flow(flow, x, at.sigma)
        if self._probe is not None:
            self._probe.on_pass(self.block, step, flow, x0)
        return x0
