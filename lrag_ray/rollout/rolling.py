"""Rolling windows: several blocks are denoised at once, each one step behind the next.

The sampler of Rolling Forcing (arXiv 2509.25161) and of Causal-Forcing's long-video checkpoint.

Notation: n frames per block, B blocks, P denoising steps. Window w = 0 .. B+P-2 holds the blocks s .. e with
s = max(0, w-P+1) and e = min(B-1, w), and block i of it is at step w - i: the oldest at the lowest noise, the newest at
pure noise. A window is two calls:

1. *joint*: one denoising call over all its frames, with a timestep per frame. Every block takes its clean prediction at
   its own noise level; a block with steps left is noised again to the next one, with its own draw.
2. *clean*: the clean-context pass over block s alone, whose K and V become history. In the first P - 1 windows block 0
   is not finished yet; what the window P - 1 stores is what stays.

So block b is finished by window b + P - 1, and the last P - 1 windows hold fewer blocks than the others: the last P - 1
blocks depend on where the rollout ends. It must be known from the start, and a shorter duration is no prefix.

A resume needs, beside the clean latents, the noisy latents of the blocks behind the last finished one. They are stored
with every block (`IN_FLIGHT`).
"""

from __future__ import annotations

from typing import ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor

from lrag_ray.context.trace import TraceRow
from lrag_ray.rollout.loop import Attended, Pass, RolloutLoop, timesteps_of
from lrag_ray.rollout.types import BlockResult
from lrag_ray.wan.config import SamplerConfig, WanConfig
from lrag_ray.wan.flops import clean_pass_flops, pass_flops
from lrag_ray.wan.schedule import add_noise, x0_from_flow
from lrag_ray.wan.transfer import to_device
from lrag_ray.wan.transformer import Modulation, TimeContext

IN_FLIGHT = "loop.in_flight"
"""Key in a block's state: noisy latents [blocks · n, C, H, W] of the blocks behind it, oldest first."""


class JointPolicy(Protocol):
    """What a method for rolling windows has besides the hooks of a `ContextPolicy`."""

    def begin_window(self, first: int, last: int) -> None:
        """Choose what the blocks first .. last attend to together, before they are denoised."""


class Window(NamedTuple):
    """The blocks that are denoised together."""

    number: int
    first: int
    """Oldest block (s)."""
    last: int
    """Newest block (e)."""

    @property
    def blocks(self) -> range:
        """Its blocks, oldest first."""
        return range(self.first, self.last + 1)


def window_of(index: int, steps: int, blocks: int) -> Window:
    """Window `index` of a rollout of `blocks` blocks in `steps` denoising steps."""
    return Window(index, max(0, index - steps + 1), min(blocks - 1, index))


class _Draws(NamedTuple):
    """Noise of a window, each [B, n, C, H, W]."""

    fresh: list[Tensor]
    """What its newest block starts from, if it is new."""
    renoise: list[Tensor]
    """Of its blocks with steps left, oldest first."""


class RollingWindows(RolloutLoop):
    """Joint denoising of as many blocks as there are steps; its methods are a `JointPolicy`."""

    name: ClassVar[str] = "rolling"
    horizon_free: ClassVar[bool] = False

    @classmethod
    def passes(cls, sampler: SamplerConfig, blocks: int) -> int:
        """A joint and a clean call per window."""
        return 2 * (blocks + len(sampler.denoising_steps) - 1)

    @classmethod
    def block_flops(
        cls, config: WanConfig, sampler: SamplerConfig, height: int, width: int, attended: Attended, blocks: int
    ) -> list[int]:
        """Each window counts for the block that it finishes, the first ones for block 0."""
        n, steps = sampler.frames_per_block, len(sampler.denoising_steps)
        flops = [0] * blocks
        for index in range(blocks + steps - 1):
            window = window_of(index, steps, blocks)
            start, frames = window.first * n, len(window.blocks) * n
            flops[window.first] += pass_flops(config, height, width, frames, attended(frames, start))
            flops[window.first] += clean_pass_flops(config, height, width, n, attended(n, start))
        return flops

    @classmethod
    def frames_per_pass(cls, sampler: SamplerConfig) -> int:
        """A block for each step."""
        return len(sampler.denoising_steps) * sampler.frames_per_block

    @classmethod
    def carried_frames(cls, sampler: SamplerConfig, blocks: int) -> int:
        """The blocks behind each finished one."""
        behind = len(sampler.denoising_steps) - 1
        return sampler.frames_per_block * sum(min(behind, blocks - 1 - block) for block in range(blocks))

    def _set_up(self, sampler: SamplerConfig, batch: int) -> None:
        assert self._total_blocks is not None, "asked for at the start"
        self._all_blocks = self._total_blocks
        *self._steps, self._clean = self._passes([*timesteps_of(sampler, 1), sampler.context_timestep], sampler, batch)
        self._in_flight: list[Tensor] = []
        """Noisy latents [B, n, C, H, W] of the blocks from the next one on, oldest first."""
        self._draws: _Draws | None = None
        """Noise of the next window, where it was drawn ahead."""
        self._times: dict[tuple[int, ...], TimeContext] = {}
        """Modulation of joint calls, by the steps of their blocks."""

    def _passes_of(self, block: int) -> list[Pass]:
        return [*self._steps, self._clean]

    def _carry_on(self, state: list[dict[str, Tensor]] | None) -> None:
        behind = min(len(self._steps) - 1, self._all_blocks - 1 - self.block)
        if not behind:
            self._in_flight = []
            return
        if state is None or any(IN_FLIGHT not in element for element in state):
            raise ValueError(f"block {self.block} was stored without {IN_FLIGHT}, and rolling windows cannot go on")
        noisy = torch.stack([element[IN_FLIGHT] for element in state]).to(self._device, self._dtype)
        self._in_flight = list(noisy.split(self._n, dim=1))
        if len(self._in_flight) != behind:
            raise ValueError(
                f"block {self.block} was stored with {len(self._in_flight)} blocks behind it instead of {behind}: it "
                "belongs to a rollout of another length"
            )

    @torch.no_grad()
    def _generate(self, *, more: bool) -> BlockResult:
        block, steps = self.block, len(self._steps)
        trace: list[list[TraceRow]] = [[] for _ in self.context.policies]
        for index in range(block + steps - 1 if block else 0, block + steps):
            window = window_of(index, steps, self._all_blocks)
            began = self._clock.mark()
            x0 = self._denoise(window, trace)
            denoised = self._clock.mark()
            self._begin_block(window.first)
            self._keep(window.first, x0)
            self._note(window, trace, clean=True)
            self._clock.add("denoise", began, denoised)
            self._clock.add("context", denoised, self._clock.mark())
            # The device is still busy with this window: what the next one starts from gets ready meanwhile.
            ahead = more or index + 1 < block + steps
            self._draws = self._draw(window_of(index + 1, steps, self._all_blocks)) if ahead else None
        self.block += 1
        state = self.context.block_state()
        if self._in_flight:
            noisy = torch.cat(self._in_flight, dim=1)
            state = [{**own, IN_FLIGHT: noisy[i]} for i, own in enumerate(state)]
        return BlockResult(block, block * self._n, x0, trace, state)

    def _draw(self, window: Window) -> _Draws:
        """Noise of a window, on the device."""
        fresh = [self._noise.initial(window.last)] if window.last == window.number else []
        left = [block for block in window.blocks if window.number - block + 1 < len(self._steps)]
        renoise = [self._noise.renoise(block, window.number - block) for block in left]
        move = [[to_device(draw, self._device, self._dtype) for draw in draws] for draws in (fresh, renoise)]
        return _Draws(*move)

    def _denoise(self, window: Window, trace: list[list[TraceRow]]) -> Tensor:
        """The joint call; returns x0 [B, n, C, H, W] of the oldest block and leaves the others in flight."""
        for policy in self.context.policies:
            cast(JointPolicy, policy).begin_window(window.first, window.last)
        self.context.lay_out(window.number)
        self._note(window, trace, clean=False)
        draws = self._draws or self._draw(window)
        x = torch.cat([*self._in_flight, *draws.fresh], dim=1)
        self.context.begin_pass(0, clean=False)
        flow = self._transformer(x, self._joint_time(window), self._text, self.context)
        self.context.end_pass()
        predicted, self._in_flight = [], []
        for block, flow_i, x_i in zip(window.blocks, flow.split(self._n, 1), x.split(self._n, 1), strict=True):
            step = window.number - block
            x0 = x0_from_flow(flow_i, x_i, self._steps[step].sigma)
            predicted.append(x0)
            if self._probe is not None:
                self._probe.on_pass(block, step, flow_i, x0)
            if step + 1 < len(self._steps):
                draw = draws.renoise[len(self._in_flight)]
                self._in_flight.append(add_noise(x0, draw, self._steps[step + 1].sigma))
        return predicted[0]

    def _joint_time(self, window: Window) -> TimeContext:
        """Modulation of a joint call: that of each block's step."""
        steps = tuple(window.number - block for block in window.blocks)
        if steps not in self._times:
            self._times[steps] = _join([self._steps[step].time for step in steps])
        return self._times[steps]

    def _note(self, window: Window, trace: list[list[TraceRow]], *, clean: bool) -> None:
        """Add what the call attends to."""
        for rows, own in zip(trace, self.context.trace(), strict=True):
            for row in own:
                timestep = None
                if row.kind == "current":
                    at = self._clean if clean else self._steps[window.number - row.frame // self._n]
                    timestep = at.timestep
                rows.append(row._replace(window=window.number, clean=clean, timestep=timestep))


def _join(times: list[TimeContext]) -> TimeContext:
    """The modulation of consecutive blocks as one."""
    layers = [
        Modulation(*(torch.cat(parts, 1) for parts in zip(*layer, strict=True)))
        for layer in zip(*(t.layers for t in times), strict=True)
    ]
    shift, scale = (torch.cat(parts, 1) for parts in zip(*(t.head for t in times), strict=True))
    return TimeContext(torch.cat([t.timesteps for t in times], 1), layers, (shift, scale))
