"""Algorithm 1: the block-autoregressive rollout of a frozen causal generator.

Per block: let the context method choose what to attend to, denoise in a few passes, hand the clean latents to the
method, and run one clean-context pass whose K and V become history. Resuming needs the clean latents alone: the
clean-context passes over them rebuild every cache.

Example::

    rollout = Rollout(transformer, sampler, InfinityRope, BaseSettings(), prompt_embeds, noise, (16, 60, 104))
    latents = torch.cat([result.latents for result in rollout.blocks(40)], dim=1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from lrag_ray.context.policy import ContextPolicy, Layout, PolicyInputs, S, host_bank
from lrag_ray.context.runtime import ContextRuntime, Probe
from lrag_ray.context.weights import Loaded
from lrag_ray.retrieval.history import HistoryBank
from lrag_ray.rollout.clock import PassClock
from lrag_ray.rollout.noise import NoiseSource
from lrag_ray.rollout.types import BlockResult
from lrag_ray.wan.config import SamplerConfig
from lrag_ray.wan.rope import Rope
from lrag_ray.wan.schedule import FlowMatchSchedule, add_noise, x0_from_flow
from lrag_ray.wan.transfer import to_device
from lrag_ray.wan.transformer import CausalWanTransformer, TimeContext


class _Pass(NamedTuple):
    """One transformer call of a block."""

    timestep: float
    sigma: Tensor
    """Noise level, a scalar on the CPU."""
    time: TimeContext


class Rollout:
    """One batch of rollouts in lockstep; every batch element has a policy of its own."""

    def __init__(
        self,
        transformer: CausalWanTransformer,
        sampler: SamplerConfig,
        policy: type[ContextPolicy[S]],
        settings: S,
        prompt_embeds: Tensor,
        noise: NoiseSource,
        latent_shape: tuple[int, int, int],
        *,
        weights: Mapping[str, Loaded] = MappingProxyType({}),
        make_bank: Callable[[Layout], HistoryBank] = host_bank,
        keys: Sequence[tuple[str | int, ...]] | None = None,
        probe: Probe | None = None,
    ) -> None:
        """Prepare a rollout.

        `prompt_embeds` [B, text_len, text_dim], zero behind the prompt; `latent_shape` (C, H, W); `settings` an
        instance of `policy.Settings`; `weights` the loaded `policy.weight_files` by key; `make_bank` makes a history
        bank for each policy that keeps history; `keys` per batch element the identity of its noise, for methods that
        choose at random. Raises ValueError where settings and sampler do not fit or weights are absent.
        """
        policy.check(settings, sampler.frames_per_block)
        for file in policy.weight_files(settings):
            if file.used and file.key not in weights:
                raise ValueError(f"weights[{file.key!r}] are not given to the rollout: {file.hint}")
        self.block = 0
        """The next block."""
        self._transformer = transformer
        self._max_frames = policy.max_frames
        self._noise = noise
        self._draws: list[Tensor] = []
        """Noise of the next block, where it was drawn ahead."""
        self._probe = probe
        self._n = sampler.frames_per_block
        weight = transformer.patch_embedding.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._clock = PassClock(self._device, "denoise", "context")
        config = transformer.config
        grid = config.token_grid(*latent_shape[1:])
        policy.check_model(settings, config.num_layers, config.num_heads, grid[0] * grid[1])
        layout = Layout(
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            head_dim=config.head_dim,
            grid=grid,
            frames_per_block=self._n,
            dtype=self._dtype,
            device=self._device,
        )
        rope = Rope(config.head_dim, layout.grid, self._device, policy.temporal_indices)
        batch = len(prompt_embeds)
        with torch.no_grad():
            self._text = transformer.embed_text(prompt_embeds.to(self._device, self._dtype))
        keys = keys if keys is not None else [()] * batch
        self._banks: list[HistoryBank] = []

        def bank(layout: Layout) -> HistoryBank:
            self._banks.append(make_bank(layout))
            return self._banks[-1]

        if len(keys) != batch:
            raise ValueError(f"{len(keys)} keys for {batch} prompts")
        policies = [
            policy(settings, PolicyInputs(layout, rope, tuple(key), weights, bank, [k[i] for k in self._text.k]))
            for i, key in enumerate(keys)
        ]
        self.context = ContextRuntime(layout, rope, policies, probe)
        clean, *usual = self._passes([sampler.context_timestep, *_timesteps(sampler, 1)], sampler, batch)
        first = (
            usual
            if sampler.first_block_denoising_steps is None
            else self._passes(_timesteps(sampler, 0), sampler, batch)
        )
        self._first_block, self._other_blocks = [*first, clean], [*usual, clean]

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds in denoising and in clean-context passes; on a GPU its own, of the blocks that it has finished."""
        return self._clock.totals_s()

    def timesteps(self, block: int) -> list[float]:
        """Timestep of every pass of a block, the clean-context pass last."""
        return [each.timestep for each in self._passes_of(block)]

    def blocks(self, count: int) -> Iterator[BlockResult]:
        """Generate the next `count` blocks.

        Raises ValueError where they would pass the method's longest rollout.
        """
        end = (self.block + count) * self._n
        if self._max_frames is not None and end > self._max_frames:
            raise ValueError(
                f"{end} latent frames: this method numbers frames absolutely and its table of temporal rotations ends "
                f"at {self._max_frames}; use a shorter duration or a window-relative method (infinity_rope, rag)"
            )
        for left in range(count, 0, -1):
            result = self._generate()
            # The device is still busy with this block: what the next one starts from gets ready meanwhile.
            self._draws = self._draw(self.block) if left > 1 else []
            yield result

    @torch.no_grad()
    def replay(self, latents: Tensor, states: Sequence[Sequence[dict[str, Tensor]]] | None = None) -> None:
        """Rebuild every cache from finished latents [B, F, C, H, W] of the next blocks, one pass per block.

        `states` are the `BlockResult.state` of those blocks, needed by methods that keep any.
        """
        for i, x0 in enumerate(latents.to(self._device, self._dtype).split(self._n, dim=1)):
            self.context.begin_block(self.block, list(states[i]) if states is not None else None)
            self._keep(x0)
            self.block += 1

    def _passes_of(self, block: int) -> list[_Pass]:
        """The denoising passes of a block, then its clean-context pass."""
        return self._first_block if block == 0 else self._other_blocks

    @torch.no_grad()
    def _passes(self, timesteps: list[float], sampler: SamplerConfig, batch: int) -> list[_Pass]:
        """Passes at these timesteps, with all that is fixed for the rollout computed once."""
        sigmas = FlowMatchSchedule(sampler.shift).sigma(torch.tensor(timesteps)).unbind(0)
        times = [torch.full((batch, self._n), t, device=self._device) for t in timesteps]
        embedded = [self._transformer.embed_time(t) for t in times]
        return [_Pass(*each) for each in zip(timesteps, sigmas, embedded, strict=True)]

    def _draw(self, block: int) -> list[Tensor]:
        """Noise of every denoising pass of a block, on the device."""
        draws = [self._noise.initial(block)]
        draws += [self._noise.renoise(block, step) for step in range(len(self._passes_of(block)) - 2)]
        return [to_device(draw, self._device, self._dtype) for draw in draws]

    @torch.no_grad()
    def _generate(self) -> BlockResult:
        began = self._clock.mark()
        block, denoising = self.block, self._passes_of(self.block)[:-1]
        self.context.begin_block(block)
        x, *renoise = self._draws or self._draw(block)
        self._draws = []
        for step in range(len(denoising)):
            x0 = self._pass(step, x)
            if step + 1 < len(denoising):
                x = add_noise(x0, renoise[step], denoising[step + 1].sigma)
        denoised = self._clock.mark()
        self._keep(x0)
        self._clock.add("denoise", began, denoised)
        self._clock.add("context", denoised, self._clock.mark())
        self.block += 1
        return BlockResult(block, block * self._n, x0, self.context.trace(), self.context.block_state())

    def _keep(self, x0: Tensor) -> None:
        """Let the method see the clean latents, then store their K and V with the clean-context pass.

        No noise is added in it, and what it predicts is of use to a probe alone.
        """
        self.context.on_latents(x0)
        for bank in self._banks:
            bank.settle()
        step = len(self._passes_of(self.block)) - 1
        if self._probe is not None:
            self._pass(step, x0, clean=True)
        else:
            self.context.begin_pass(step, clean=True)
            self._transformer.keep(x0, self._other_blocks[-1].time, self._text, self.context)
            self.context.end_pass()
        self.context.end_block()

    def _pass(self, step: int, x: Tensor, *, clean: bool = False) -> Tensor:
        """One transformer call on x [B, n, C, H, W]; returns x0."""
        self.context.begin_pass(step, clean=clean)
        at = self._passes_of(self.block)[step]
        flow = self._transformer(x, at.time, self._text, self.context)
        self.context.end_pass()
        x0 = x0_from_flow(flow, x, at.sigma)
        if self._probe is not None:
            self._probe.on_pass(self.block, step, flow, x0)
        return x0


def _timesteps(sampler: SamplerConfig, block: int) -> list[float]:
    """Timesteps of a block's denoising passes."""
    steps = sampler.steps_of(block)
    return FlowMatchSchedule(sampler.shift).warp(steps) if sampler.warp else [float(t) for t in steps]
