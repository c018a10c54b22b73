"""RolloutLoop: the order in which transformer calls turn noise into finished blocks.

The block loop (`rollout.rollout`) finishes one block before it begins the next; rolling windows (`rollout.rolling`)
denoise several at once. A context method names the loop that it is made for (`ContextPolicy.loop`), and the loop
declares what the program must know of it: whether shorter durations are prefixes, what a resume needs besides the clean
latents, and what a rollout costs.

A new loop is one file here with a `RolloutLoop`, and one line in `rollout.loops`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lrag_ray.context.policy import ContextPolicy, Layout, PolicyInputs, S, host_bank
from lrag_ray.context.runtime import ContextRuntime, Probe
from lrag_ray.context.weights import Loaded
from lrag_ray.retrieval.history import HistoryBank
from lrag_ray.rollout.clock import PassClock
from lrag_ray.rollout.noise import NoiseSource
from lrag_ray.rollout.types import BlockResult
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.rope import Rope
from lrag_ray.wan.schedule import FlowMatchSchedule, x0_from_flow
from lrag_ray.wan.transformer import CausalWanTransformer, TimeContext

Attended = Callable[[int, int], int]
"""Latent frames that a call over `frames` from `first_frame` on attends to, by (frames, first_frame)."""


class Pass(NamedTuple):
    """One noise level of a block."""

    timestep: float
    sigma: Tensor
    """Noise level, a scalar on the CPU."""
    time: TimeContext
    """Modulation of a call over one block at this level."""


class RolloutLoop(ABC):
    """One batch of rollouts in lockstep; every batch element has a policy of its own."""

    name: ClassVar[str]
    """As methods name it (`ContextPolicy.loop`)."""
    horizon_free: ClassVar[bool]
    """No block depends on how many come after it, so shorter durations are prefixes of longer ones."""

    @classmethod
    @abstractmethod
    def passes(cls, sampler: SamplerConfig, blocks: int) -> int:
        """Transformer passes of a rollout of `blocks` blocks."""

    @classmethod
    @abstractmethod
    def block_flops(
        cls, config: WanConfig, sampler: SamplerConfig, height: int, width: int, attended: Attended, blocks: int
    ) -> list[int]:
        """Operations that each block of a rollout of `blocks` takes, at latent frames of `height` x `width`."""

    @classmethod
    def frames_per_pass(cls, sampler: SamplerConfig) -> int:
        """Latent frames of the largest pass."""
        return sampler.frames_per_block

    @classmethod
    def carried_frames(cls, sampler: SamplerConfig, blocks: int) -> int:
        """Latent frames stored with a rollout of `blocks` beside its own, because replay cannot rebuild them."""
        return 0

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
        total_blocks: int | None = None,
    ) -> None:
        """Prepare a rollout.

        `prompt_embeds` [B, text_len, text_dim], zero behind the prompt; `latent_shape` (C, H, W); `settings` an
        instance of `policy.Settings`; `weights` the loaded `policy.weight_files` by key; `make_bank` makes a history
        bank for each policy that keeps history; `keys` per batch element the identity of its noise, for methods that
        choose at random; `total_blocks` the length of the rollout, which a loop must know that is not `horizon_free`.
        Raises ValueError where settings and sampler do not fit, the method is made for another loop, or weights or
        length are absent.
        """
        policy.check_sampler(settings, sampler)
        if policy.loop != self.name:
            raise ValueError(f"{policy.__name__} is made for the loop '{policy.loop}', and this is '{self.name}'")
        for file in policy.weight_files(settings):
            if file.used and file.key not in weights:
                raise ValueError(f"weights[{file.key!r}] are not given to the rollout: {file.hint}")
        if total_blocks is None and not self.horizon_free:
            raise ValueError(f"the last blocks of '{self.name}' depend on the length of the rollout: give total_blocks")
        self.block = 0
        """The next block."""
        self._transformer = transformer
        self._max_frames = policy.max_frames
        self._total_blocks = total_blocks
        self._noise = noise
        self._probe = probe
        self._n = sampler.frames_per_block
        weight = transformer.patch_embedding.weight
        self._device, self._dtype = weight.device, weight.dtype
        self._clock = PassClock(self._device, "denoise", "context", "retrieval")
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
        self.context = ContextRuntime(layout, rope, policies, probe, transformer.kernels)
        self._set_up(sampler, batch)

    @abstractmethod
    def _set_up(self, sampler: SamplerConfig, batch: int) -> None:
        """Compute what is fixed for the rollout."""

    @abstractmethod
    def _passes_of(self, block: int) -> list[Pass]:
        """The denoising passes of a block, then its clean-context pass."""

    @abstractmethod
    def _generate(self, *, more: bool) -> BlockResult:
        """Finish the next block; with `more`, then get ready what the one after it starts from."""

    @property
    def timings_s(self) -> dict[str, float]:
        """Seconds in denoising and in clean-context passes; on a GPU its own, of the blocks that it has finished.

        Both hold ``retrieval``: what the method does around passes, such as encoding, searching and storing.
        """
        return self._clock.totals_s()

    @property
    def notes(self) -> list[str]:
        """What a person should know about how histories are kept."""
        return [note for bank in self._banks for note in bank.notes()]

    def expect(self, frames: Sequence[int]) -> None:
        """A guess at what the block after next retrieves, such as a stored trace tells ahead of `replay`."""
        for bank in self._banks:
            bank.expect(frames)

    def timesteps(self, block: int) -> list[float]:
        """Timestep of every pass of a block, the clean-context pass last."""
        return [each.timestep for each in self._passes_of(block)]

    def blocks(self, count: int) -> Iterator[BlockResult]:
        """Generate the next `count` blocks.

        Raises ValueError where they would pass the method's longest rollout, or the end of this one.
        """
        end = self.block + count
        if self._max_frames is not None and end * self._n > self._max_frames:
            raise ValueError(
                f"{end * self._n} latent frames: this method numbers frames absolutely and its table of temporal "
                f"rotations ends at {self._max_frames}; use a shorter duration or a window-relative method "
                "(infinity_rope, rag)"
            )
        if self._total_blocks is not None and end > self._total_blocks:
            raise ValueError(f"{end} blocks of a rollout that was begun with total_blocks {self._total_blocks}")
        for left in range(count, 0, -1):
            yield self._generate(more=left > 1)

    @torch.no_grad()
    def replay(self, latents: Tensor, states: Sequence[Sequence[dict[str, Tensor]]] | None = None) -> None:
        """Rebuild every cache from finished latents [B, F, C, H, W] of the next blocks, one pass per block.

        `states` are the `BlockResult.state` of those blocks, needed where methods or the loop keep any.
        """
        for i, x0 in enumerate(latents.to(self._device, self._dtype).split(self._n, dim=1)):
            state = list(states[i]) if states is not None else None
            self.context.begin_block(self.block, state)
            self._keep(self.block, x0, timed=False)
            self._carry_on(state)
            self.block += 1

    def _carry_on(self, state: list[dict[str, Tensor]] | None) -> None:
        """Take from a replayed block's states what the loop itself stored; mostly nothing."""

    @torch.no_grad()
    def _passes(self, timesteps: list[float], sampler: SamplerConfig, batch: int) -> list[Pass]:
        """Passes at these timesteps, with all that is fixed for the rollout computed once."""
        sigmas = FlowMatchSchedule(sampler.shift).sigma(torch.tensor(timesteps)).unbind(0)
        times = [torch.full((batch, self._n), t, device=self._device) for t in timesteps]
        embedded = [self._transformer.embed_time(t) for t in times]
        return [Pass(*each) for each in zip(timesteps, sigmas, embedded, strict=True)]

    def _begin_block(self, block: int) -> None:
        began = self._clock.mark()
        self.context.begin_block(block)
        self._clock.add("retrieval", began, self._clock.mark())

    @torch.no_grad()
    def _keep(self, block: int, x0: Tensor, *, timed: bool = True) -> None:
        """Let the method see the clean latents, then store their K and V with the clean-context pass.

        No noise is added in it, and what it predicts is of use to a probe alone.
        """
        began = self._clock.mark()
        self.context.on_latents(x0)
        for bank in self._banks:
            bank.settle()
        noted = self._clock.mark()
        *denoising, clean = self._passes_of(block)
        self.context.begin_pass(len(denoising), clean=True)
        if self._probe is not None:
            flow = self._transformer(x0, clean.time, self._text, self.context)
            self._probe.on_pass(block, len(denoising), flow, x0_from_flow(flow, x0, clean.sigma))
        else:
            self._transformer.keep(x0, clean.time, self._text, self.context)
        self.context.end_pass()
        passed = self._clock.mark()
        self.context.end_block()
        if timed:
            self._clock.add("retrieval", began, noted)
            self._clock.add("retrieval", passed, self._clock.mark())


def timesteps_of(sampler: SamplerConfig, block: int) -> list[float]:
    """Timesteps of a block's denoising passes."""
    steps = sampler.steps_of(block)
    return FlowMatchSchedule(sampler.shift).warp(steps) if sampler.warp else [float(t) for t in steps]
