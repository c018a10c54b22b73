"""Rolling windows: what each call attends to, what is drawn, resumes, lengths, costs and refusals.

That the numbers are those of the released code is a golden case (rolling_forcing/roll_48).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from lrag_ray.context.base import Base
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.rolling_forcing import RollingForcing, RollingForcingSettings
from lrag_ray.context.trace import TraceRow
from lrag_ray.errors import UsageError
from lrag_ray.rollout.loop import RolloutLoop
from lrag_ray.rollout.loops import loop_of, nests
from lrag_ray.rollout.rolling import IN_FLIGHT, RollingWindows
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.rollout.types import BlockResult
from lrag_ray.wan.config import SamplerConfig
from lrag_ray.wan.kernels import Kernels
from tests.rollout.test_rollout import ConstantNoise
from tests.tiny import CONFIG, LATENT, generate, prompt_embeds, start, tiny_transformer

FOUR = SamplerConfig()
CASES = [
    (FOUR, RollingForcingSettings()),
    (FOUR, RollingForcingSettings(window=15)),
    (replace(FOUR, denoising_steps=(1000, 500)), RollingForcingSettings(window=9, anchor=1)),
    (replace(FOUR, frames_per_block=2, denoising_steps=(1000, 750, 500)), RollingForcingSettings(window=8, anchor=2)),
    (replace(FOUR, denoising_steps=(1000,)), RollingForcingSettings(window=7)),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_transformer()


def roll(model: Any, sampler: SamplerConfig, settings: RollingForcingSettings, blocks: int, **more: Any) -> RolloutLoop:
    return start(model, RollingForcing, settings, sampler=sampler, total_blocks=blocks, **more)


def of_call(results: list[BlockResult], window: int, clean: bool) -> list[TraceRow]:
    return [row for result in results for row in result.trace[0] if (row.window, row.clean) == (window, clean)]


@pytest.mark.parametrize(("sampler", "settings"), CASES)
@pytest.mark.parametrize("blocks", [1, 3, 10])
def test_every_call_attends_to_what_the_method_says(
    model: Any, sampler: SamplerConfig, settings: RollingForcingSettings, blocks: int
) -> None:
    """The method's formula, computed here frame by frame, for a rollout that is shorter than a window too."""
    n, steps, (w, a) = sampler.frames_per_block, len(sampler.denoising_steps), (settings.window, settings.anchor)
    rollout = roll(model, sampler, settings, blocks)
    results = list(rollout.blocks(blocks))
    assert [result.first_frame for result in results] == [n * block for block in range(blocks)]
    timesteps = rollout.timesteps(0)
    calls = 0
    for window in range(blocks + steps - 1):
        first, last = max(0, window - steps + 1), min(blocks - 1, window)
        c, q = n * first, n * (last - first + 1)
        length = min(w - q - a, c - a)
        joint = [(f, c - length - a + f) for f in range(a)] + [(f, f) for f in range(c - length, c)] if first else []
        rows = of_call(results, window, False)
        assert [(row.frame, row.temporal_index) for row in rows] == [*joint, *((f, f) for f in range(c, c + q))]
        assert len(rows) <= w
        own = [row for row in rows if row.kind == "current"]
        assert [row.timestep for row in own] == [timesteps[window - row.frame // n] for row in own]
        rows = of_call(results, window, True)
        assert [(row.frame, row.temporal_index) for row in rows] == [(f, f) for f in range(max(0, c + n - w), c + n)]
        assert [row.timestep for row in rows if row.kind == "current"] == [timesteps[-1]] * n
        calls += 2
    assert calls == RollingWindows.passes(sampler, blocks)


@pytest.mark.parametrize(("sampler", "settings"), CASES)
@pytest.mark.parametrize("kept", [1, 4, 9])
def test_replay_continues_bit_identically(
    model: Any, sampler: SamplerConfig, settings: RollingForcingSettings, kept: int
) -> None:
    """Given finished latents and the noisy ones behind them, the rest comes out as if nothing had happened."""
    whole = list(roll(model, sampler, settings, 11).blocks(11))
    resumed = roll(model, sampler, settings, 11)
    for result in whole[:kept]:
        resumed.replay(result.latents, [result.state])
    assert resumed.block == kept
    for a, b in zip(whole[kept:], resumed.blocks(11 - kept), strict=True):
        assert torch.equal(a.latents, b.latents)
        assert a.trace == b.trace
        assert [s.keys() for s in a.state] == [s.keys() for s in b.state]
        assert all(torch.equal(a.state[0][key], b.state[0][key]) for key in a.state[0])


def test_blocks_one_by_one_are_the_blocks_at_once(model: Any) -> None:
    """Damaged parts are made again block by block."""
    single = roll(model, *CASES[0], 6)
    at_once = generate(roll(model, *CASES[0], 6), 6)
    assert torch.equal(torch.cat([generate(single, 1) for _ in range(6)], dim=1), at_once)


def test_replay_without_what_it_needs_is_refused(model: Any) -> None:
    """Given latents alone, or noisy latents of a rollout of another length, going on would make another video."""
    result = next(roll(model, *CASES[0], 6).blocks(1))
    with pytest.raises(ValueError, match=f"block 0 was stored without {IN_FLIGHT}"):
        roll(model, *CASES[0], 6).replay(result.latents)
    with pytest.raises(ValueError, match="stored with 3 blocks behind it instead of 2"):
        roll(model, *CASES[0], 3).replay(result.latents, [result.state])


def test_the_last_blocks_depend_on_the_length_and_the_loop_says_so(model: Any) -> None:
    short, long = generate(roll(model, *CASES[0], 7), 7), generate(roll(model, *CASES[0], 10), 10)
    whole, n = 7 - 3, 3
    assert torch.equal(short[:, : whole * n], long[:, : whole * n])
    for block in range(whole, 7):
        assert not torch.equal(short[:, block * n :][:, :n], long[:, block * n :][:, :n])
    assert not nests(RollingForcing) and nests(Base)


def test_batch_elements_are_independent(model: Any) -> None:
    prompts = ("a red fox", "an empty street at night")
    together = generate(roll(model, *CASES[0], 6, prompts=prompts), 6)
    for i, prompt in enumerate(prompts):
        alone = generate(roll(model, *CASES[0], 6, prompts=(prompt,)), 6)
        assert torch.allclose(together[i : i + 1], alone, atol=2e-5)


def test_every_draw_is_asked_for_once_and_is_that_of_the_block_loop(model: Any) -> None:
    """So methods of both loops are compared on equal noise."""
    asked = []
    loops: list[tuple[type[RolloutLoop], type[ContextPolicy[Any]]]] = [
        (RollingWindows, RollingForcing),
        (Rollout, Base),
    ]
    for loop, policy in loops:
        noise = ConstantNoise()
        settings: Any = policy.Settings()
        rollout = loop(model, FOUR, policy, settings, prompt_embeds("p"), noise, LATENT, total_blocks=5)
        list(rollout.blocks(5))
        asked.append(sorted(noise.asked))
    assert asked[0] == asked[1] and len(set(asked[0])) == len(asked[0]) == 5 * 4


class _Watch:
    """Keeps the clean prediction of every block and step."""

    def __init__(self) -> None:
        self.x0: dict[tuple[int, int], Tensor] = {}

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None:
        self.x0[block, step] = x0

    def on_attention(self, *args: Any) -> None: ...


def test_a_block_is_what_its_last_step_predicts(model: Any) -> None:
    watch = _Watch()
    results = list(roll(model, *CASES[0], 5, probe=watch).blocks(5))
    assert sorted(watch.x0) == [(block, step) for block in range(5) for step in range(5)]
    assert all(torch.equal(result.latents, watch.x0[result.block, 3]) for result in results)


@pytest.mark.parametrize(("sampler", "settings"), CASES[:3])
def test_blocks_cost_what_torch_counts(model: Any, sampler: SamplerConfig, settings: RollingForcingSettings) -> None:
    def attended(frames: int, first: int) -> int:
        return RollingForcing.attended_frames(settings, frames, first)

    rollout = roll(tiny_transformer(Kernels("math")), sampler, settings, 6)
    planned = RollingWindows.block_flops(CONFIG, sampler, *LATENT[1:], attended, 6)
    for flops in planned:
        with FlopCounterMode(display=False) as counted:
            list(rollout.blocks(1))
        assert counted.get_total_flops() == flops


def test_cache_and_buffers_hold_what_the_plan_counts(model: Any) -> None:
    """Given settings of the release, the cache holds the anchor beside 21 frames, and the buffers 21 frames."""
    rollout = roll(model, *CASES[0], 12)
    results = list(rollout.blocks(12))
    frame = CONFIG.kv_bytes_per_frame(*LATENT[1:], 4)
    settings = RollingForcingSettings()
    policy = rollout.context.policies[0]
    assert isinstance(policy, RollingForcing)
    planned = RollingForcing.attended_frames(settings, 3, 33) * frame
    assert policy.window._slots.nbytes == planned + RollingForcing.device_bytes(settings, 3, 36, frame)
    assert sum(b.k.nbytes + b.v.nbytes for b in rollout.context._buffers if b is not None) == planned
    in_flight = [len(state[IN_FLIGHT]) for result in results for state in result.state if state]
    assert sum(in_flight) == RollingWindows.carried_frames(FOUR, 12)


def test_what_cannot_be_sampled_in_rolling_windows_is_refused(model: Any) -> None:
    for sampler, settings, message in (
        (FOUR, RollingForcingSettings(window=14), "window 14 is less than 4 blocks of 3 latent frames.* at least 15"),
        (FOUR, RollingForcingSettings(window=21, anchor=4), "anchor 4 is more than a block of 3"),
        (replace(FOUR, first_block_denoising_steps=(1000,)), RollingForcingSettings(), "first_block_denoising_steps"),
    ):
        with pytest.raises(ValueError, match=message):
            roll(model, sampler, settings, 6)
    for bad in ({"window": -1}, {"anchor": 0}, {"window": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            RollingForcingSettings(**bad)
    with pytest.raises(ValueError, match="give total_blocks"):
        start(model, RollingForcing, sampler=FOUR)
    with pytest.raises(ValueError, match="7 blocks of a rollout that was begun with total_blocks 6"):
        list(roll(model, *CASES[0], 6).blocks(7))
    with pytest.raises(ValueError, match="1026 latent frames"):
        list(roll(model, *CASES[0], 342).blocks(342))
    with pytest.raises(ValueError, match="RollingForcing is made for the loop 'rolling', and this is 'blocks'"):
        Rollout(model, FOUR, RollingForcing, RollingForcingSettings(), prompt_embeds("p"), ConstantNoise(), LATENT)


class Elsewhere(Rollout):
    """A loop outside the package."""

    name = "tests.rollout.test_rolling:Elsewhere"


def named(loop: str) -> type[Base]:
    return type("Named", (Base,), {"loop": loop})


def test_a_method_may_bring_a_loop_of_its_own(model: Any) -> None:
    assert loop_of(named(Elsewhere.name)) is Elsewhere
    assert torch.equal(generate(start(model, named(Elsewhere.name)), 2), generate(start(model, Base), 2))


@pytest.mark.parametrize(
    ("loop", "message"),
    [
        ("blocs", "loop 'blocs' is unknown. Known: blocks, rolling"),
        ("no_such_module:Loop", "cannot import 'no_such_module'"),
        ("tests.rollout.test_rolling:CASES", "is not a lrag_ray.rollout.loop.RolloutLoop"),
    ],
)
def test_a_loop_that_cannot_be_had_is_named(loop: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loop_of(named(loop))
