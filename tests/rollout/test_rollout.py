"""The block loop in numbers that can be checked by hand.

The generator is real; its head is set to predict the same flow everywhere, so that latents follow from arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from lrag_ray.context.base import Base, BaseSettings
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.policy import Exposure, PolicyInputs
from lrag_ray.rollout.rollout import Rollout
from lrag_ray.wan.config import SamplerConfig
from lrag_ray.wan.transformer import CausalWanTransformer, TimeContext
from tests.tiny import CONFIG, LATENT, prompt_embeds, tiny_transformer

N = 3
TWO_STEPS = SamplerConfig(denoising_steps=(1000, 500), shift=1.0, frames_per_block=N)
"""Unshifted: sigma 1 and 1/2, and 0.001 in the clean-context pass at timestep 0."""


class ConstantNoise:
    """Every block starts from 8, and 2 is added back; keeps what it was asked for."""

    def __init__(self, batch: int = 1, n: int = N) -> None:
        self.shape = (batch, n, *LATENT)
        self.asked: list[tuple[str, int, int]] = []

    def initial(self, block: int) -> Tensor:
        self.asked.append(("initial", block, 0))
        return torch.full(self.shape, 8.0)

    def renoise(self, block: int, step: int) -> Tensor:
        self.asked.append(("renoise", block, step))
        return torch.full(self.shape, 2.0)


class Watch:
    """Keeps every prediction."""

    def __init__(self) -> None:
        self.x0: dict[tuple[int, int], Tensor] = {}

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None:
        self.x0[block, step] = x0

    def on_attention(self, block: int, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: Any) -> None: ...


class Spy(Base):
    """base, with a list of the hooks in the order of their calls."""

    def __init__(self, settings: Any, inputs: PolicyInputs) -> None:
        super().__init__(settings, inputs)
        self.inputs = inputs
        self.calls: list[str] = []
        self.seen: list[Tensor] = []

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        self.calls.append(f"begin {block}")
        super().begin_block(block, state)

    def expose(self, layer: int) -> Exposure:
        self.calls.append(f"expose {layer}")
        return super().expose(layer)

    def on_latents(self, latents: Tensor) -> None:
        self.calls.append("latents")
        self.seen.append(latents)

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.calls.append(f"store {layer}")
        super().store(layer, k, v)

    def end_block(self) -> None:
        self.calls.append("end")


def predicting(flow: float) -> CausalWanTransformer:
    """The tiny generator with a head that says `flow` everywhere."""
    model = tiny_transformer()
    model.head.head.weight.zero_()
    model.head.head.bias.fill_(flow)
    return model


def rollout(model: CausalWanTransformer, sampler: SamplerConfig = TWO_STEPS, *, batch: int = 1, **more: Any) -> Rollout:
    noise = more.pop("noise", None) or ConstantNoise(batch)
    policy = more.pop("policy", Spy)
    text = prompt_embeds(*(f"prompt {i}" for i in range(batch)))
    return Rollout(model, sampler, policy, BaseSettings(window=6), text, noise, LATENT, **more)


@pytest.fixture
def inputs() -> Iterator[tuple[CausalWanTransformer, list[tuple[Tensor, Tensor]]]]:
    """A generator that predicts a flow of 1, and (x, timesteps) of each of its passes."""
    model = predicting(1.0)
    passes: list[tuple[Tensor, Tensor]] = []

    def noted(run: Callable[..., Any]) -> Callable[..., Any]:
        def call(latents: Tensor, time: TimeContext, *rest: Any) -> Any:
            passes.append((latents.clone(), time.timesteps.clone()))
            return run(latents, time, *rest)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "forward", noted(model.forward))
        patch.setattr(model, "keep", noted(model.keep))
        yield model, passes


def test_each_pass_removes_the_flow_and_adds_less_noise() -> None:
    """8 - 1·1 = 7; half of it and half of 2 make 4.5; 4.5 - 1/2·1 = 4."""
    watch = Watch()
    (result,) = rollout(predicting(1.0), probe=watch).blocks(1)
    torch.testing.assert_close(watch.x0[0, 0], torch.full((1, N, *LATENT), 7.0))
    torch.testing.assert_close(result.latents, torch.full((1, N, *LATENT), 4.0))
    assert result.latents.shape == (1, N, *LATENT)


def test_the_network_sees_each_timestep_and_then_the_clean_latents(
    inputs: tuple[CausalWanTransformer, list[tuple[Tensor, Tensor]]],
) -> None:
    """The clean-context pass is told its timestep, but no noise is added to what it is given."""
    model, passes = inputs
    noisy_context = SamplerConfig(denoising_steps=(1000, 500), shift=1.0, context_timestep=250.0, frames_per_block=N)
    list(rollout(model, noisy_context).blocks(1))
    for (x, t), value, timestep in zip(passes, (8.0, 4.5, 4.0), (1000.0, 500.0, 250.0), strict=True):
        torch.testing.assert_close(x, torch.full((1, N, *LATENT), value))
        torch.testing.assert_close(t, torch.full((1, N), timestep))


def test_steps_are_warped_by_the_shift_unless_they_are_timesteps_already() -> None:
    model = predicting(1.0)
    assert rollout(model, SamplerConfig()).timesteps(0) == pytest.approx([1000, 937.5, 2500 / 3, 625, 0], rel=1e-6)
    plain = SamplerConfig(denoising_steps=(900, 100), warp=False, context_timestep=40.0)
    assert rollout(model, plain).timesteps(0) == [900.0, 100.0, 40.0]


def test_the_first_block_may_have_steps_of_its_own(
    inputs: tuple[CausalWanTransformer, list[tuple[Tensor, Tensor]]],
) -> None:
    """Given three steps for the first block and one for the others, passes, draws and resuming follow."""
    model, passes = inputs
    sampler = SamplerConfig((1000,), shift=1.0, frames_per_block=N, first_block_denoising_steps=(1000, 500, 250))
    whole = list(rollout(model, sampler).blocks(3))
    timesteps = [float(t[0, 0]) for _, t in passes]
    assert timesteps == [1000.0, 500.0, 250.0, 0.0, *[1000.0, 0.0] * 2]
    assert rollout(model, sampler).timesteps(0) == timesteps[:4]
    assert rollout(model, sampler).timesteps(2) == [1000.0, 0.0]
    four = next(
        rollout(model, replace(sampler, denoising_steps=(1000, 500, 250), first_block_denoising_steps=None)).blocks(1)
    )
    assert torch.equal(whole[0].latents, four.latents)
    assert not torch.equal(whole[0].latents, whole[1].latents)

    passes.clear()
    resumed = rollout(model, sampler)
    resumed.replay(whole[0].latents)
    assert [torch.equal(a.latents, b.latents) for a, b in zip(whole[1:], resumed.blocks(2), strict=True)] == [
        True,
        True,
    ]
    assert [float(t[0, 0]) for _, t in passes] == [0.0, *[1000.0, 0.0] * 2]


def test_one_step_needs_no_second_draw() -> None:
    noise = ConstantNoise()
    sampler = SamplerConfig(denoising_steps=(1000,), shift=1.0, frames_per_block=N)
    (result,) = rollout(predicting(1.0), sampler, noise=noise).blocks(1)
    torch.testing.assert_close(result.latents, torch.full((1, N, *LATENT), 7.0))
    assert noise.asked == [("initial", 0, 0)]


def test_noise_is_asked_for_by_block_and_pass() -> None:
    noise = ConstantNoise()
    sampler = SamplerConfig(denoising_steps=(1000, 500, 250), frames_per_block=N)
    results = list(rollout(predicting(1.0), sampler, noise=noise).blocks(2))
    assert noise.asked == [(kind, b, s) for b in (0, 1) for kind, s in (("initial", 0), ("renoise", 0), ("renoise", 1))]
    assert [(result.block, result.first_frame) for result in results] == [(0, 0), (1, 3)]


EXPOSED, STORED = ["expose 0", "expose 1"], ["store 0", "store 1"]


def test_the_method_is_called_in_the_order_of_its_interface() -> None:
    """Rows are exposed once per block, in its first pass; the clean latents come before they are stored."""
    running = rollout(predicting(1.0))
    (policy,) = running.context.policies
    assert isinstance(policy, Spy)
    list(running.blocks(2))
    assert policy.calls == [call for b in (0, 1) for call in (f"begin {b}", *EXPOSED, "latents", *STORED, "end")]
    torch.testing.assert_close(policy.seen[0], torch.full((N, *LATENT), 4.0))


def test_replay_runs_the_clean_pass_alone_and_asks_for_no_noise(
    inputs: tuple[CausalWanTransformer, list[tuple[Tensor, Tensor]]],
) -> None:
    model, passes = inputs
    noise = ConstantNoise()
    running = rollout(model, noise=noise)
    (policy,) = running.context.policies
    assert isinstance(policy, Spy)
    latents = torch.arange(6.0).view(1, 6, 1, 1, 1).expand(1, 6, *LATENT)
    running.replay(latents)
    assert running.block == 2
    assert noise.asked == []
    only_pass = ["expose 0", "store 0", "expose 1", "store 1"]
    assert policy.calls == [call for b in (0, 1) for call in (f"begin {b}", "latents", *only_pass, "end")]
    assert [x[0, :, 0, 0, 0].tolist() for x, _ in passes] == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert all(bool((t == 0).all()) for _, t in passes)
    (result,) = running.blocks(1)
    assert (result.block, result.first_frame, noise.asked[0]) == (2, 6, ("initial", 2, 0))


def test_a_method_gets_the_shapes_and_the_identity_of_its_rollout() -> None:
    running = rollout(predicting(1.0), batch=2, keys=[(7, "fox", 0), (7, "owl", 1)])
    inputs = [policy.inputs for policy in running.context.policies if isinstance(policy, Spy)]
    assert [given.key for given in inputs] == [(7, "fox", 0), (7, "owl", 1)]
    layout = inputs[0].layout
    assert (layout.num_layers, layout.num_heads, layout.head_dim) == (CONFIG.num_layers, 2, 12)
    assert (layout.grid, layout.frames_per_block, layout.tokens_per_block) == ((2, 3), N, 18)


@pytest.mark.parametrize("keys", [[], [()] * 3])
def test_every_prompt_needs_a_key(keys: list[tuple[()]]) -> None:
    with pytest.raises(ValueError, match=f"{len(keys)} keys for 2 prompts"):
        rollout(predicting(1.0), batch=2, keys=keys)


def test_absolute_methods_run_to_the_end_of_the_released_table_and_no_further() -> None:
    """Given 511 finished blocks of 2, one more ends with frame 1023; another would need an index of 1024."""
    sampler = SamplerConfig(denoising_steps=(1000,), frames_per_block=2)

    def late(policy: type[Base | InfinityRope]) -> Rollout:
        running = rollout(predicting(1.0), sampler, policy=policy, noise=ConstantNoise(n=2))
        running.block = 511
        return running

    with pytest.raises(ValueError, match=r"1026 latent frames: .* ends at 1024"):
        next(late(Base).blocks(2))
    next(late(Base).blocks(1))
    next(late(InfinityRope).blocks(2))


def test_no_gradients_are_kept() -> None:
    model = predicting(1.0).requires_grad_(True)
    (result,) = rollout(model).blocks(1)
    assert not result.latents.requires_grad


def test_passes_are_timed_by_kind() -> None:
    running = rollout(predicting(1.0))
    assert running.timings_s == {"denoise": 0.0, "context": 0.0, "retrieval": 0.0}
    list(running.blocks(2))
    once = running.timings_s
    assert set(once) == {"denoise", "context", "retrieval"} and min(once.values()) > 0
    assert once["retrieval"] < once["denoise"] + once["context"]
    list(running.blocks(1))
    assert all(running.timings_s[kind] > seconds for kind, seconds in once.items())
