"""The transformer against a plain re-implementation in float64, and its parts by hand.

Self-attention is the context's business: here a context that lets each block's tokens attend to one another, unrotated.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.transformer import CausalWanTransformer, Projected, RMSNorm, sinusoidal_embedding

CONFIG = WanConfig(
    dim=24, ffn_dim=20, freq_dim=8, text_dim=6, text_len=3, in_dim=5, out_dim=4, num_heads=2, num_layers=2, eps=1e-2
)
FRAMES, HEIGHT, WIDTH = 2, 4, 6


class OwnRows:
    """An attention context without a past; keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Tensor, Tensor, Tensor]] = []

    observes_queries = False
    fuses = False

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        self.seen.append((layer, q, k, v))
        return plain_attention(q, k, v)

    def attend_projected(self, layer: int, projected: Projected) -> Tensor:
        raise AssertionError("it does not fuse")

    def keep(self, layer: int, q: Tensor | None, k: Tensor, v: Tensor) -> None:
        self.seen.append((layer, k if q is None else q, k, v))


def plain_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q [B, rows, H, d], k and v [B, keys, H, d]."""
    weights = torch.einsum("bqhd,bkhd->bhqk", q, k).div(math.sqrt(q.shape[-1])).softmax(dim=-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v)


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer:
    model = CausalWanTransformer(CONFIG)
    fill_random(model, seed=11)
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def latents() -> Tensor:
    return torch.randn(2, FRAMES, CONFIG.in_dim, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def prompts() -> Tensor:
    """Of the second prompt's rows all but the first are padding."""
    rows = torch.randn(2, CONFIG.text_len, CONFIG.text_dim, generator=torch.Generator().manual_seed(2))
    rows[1, 1:] = 0
    return rows


TIMESTEPS = torch.tensor([[1000.0, 625.0], [0.0, 937.5]])


class PlainWan:
    """Wan2.1 from its state dict: token by token where the model works on whole tensors, float64."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.weights = {name: value.double() for name, value in state.items()}

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def heads(self, name: str, x: Tensor, norm: str | None = None) -> Tensor:
        y = self.linear(name, x)
        if norm is not None:
            y = y / (y.square().mean(dim=-1, keepdim=True) + CONFIG.eps).sqrt() * self.weights[f"{norm}.weight"]
        return torch.stack(y.split(CONFIG.head_dim, dim=-1), dim=-2)

    def attend(self, name: str, x: Tensor, source: Tensor) -> Tensor:
        q, k = self.heads(f"{name}.q", x, f"{name}.norm_q"), self.heads(f"{name}.k", source, f"{name}.norm_k")
        attended = plain_attention(q, k, self.heads(f"{name}.v", source))
        return self.linear(f"{name}.o", torch.cat(attended.unbind(dim=-2), dim=-1))

    def __call__(self, latents: Tensor, timesteps: Tensor, prompts: Tensor) -> Tensor:
        x = self.patches(latents.double())
        time = torch.stack([torch.stack([self.time(float(t)) for t in row]) for row in timesteps])
        # One vector per token: the time embedding of its frame.
        time = time.repeat_interleave(x.shape[1] // timesteps.shape[1], dim=1)
        parts = self.linear("time_projection.1", F.silu(time)).chunk(6, dim=-1)
        text = gelu(self.linear("text_embedding.0", prompts.double()))
        text = self.linear("text_embedding.2", text)
        for layer in range(CONFIG.num_layers):
            name = f"blocks.{layer}"
            learned = self.weights[f"{name}.modulation"][0]
            shift1, scale1, gate1, shift2, scale2, gate2 = (part + learned[i] for i, part in enumerate(parts))
            h = standardised(x) * (1 + scale1) + shift1
            x = x + gate1 * self.attend(f"{name}.self_attn", h, h)
            h = standardised(x) * self.weights[f"{name}.norm3.weight"] + self.weights[f"{name}.norm3.bias"]
            x = x + self.attend(f"{name}.cross_attn", h, text)
            h = standardised(x) * (1 + scale2) + shift2
            x = x + gate2 * self.linear(f"{name}.ffn.2", gelu(self.linear(f"{name}.ffn.0", h)))
        shift, scale = (time + learned for learned in self.weights["head.modulation"][0])
        return self.image(self.linear("head.head", standardised(x) * (1 + scale) + shift))

    def patches(self, latents: Tensor) -> Tensor:
        """One token per 2x2 patch of a frame, by frame, row and column."""
        kernel, bias = self.weights["patch_embedding.weight"], self.weights["patch_embedding.bias"]
        tokens = [
            torch.einsum("bcij,dcij->bd", latents[:, f, :, r : r + 2, c : c + 2], kernel[:, :, 0]) + bias
            for f in range(FRAMES)
            for r in range(0, HEIGHT, 2)
            for c in range(0, WIDTH, 2)
        ]
        return torch.stack(tokens, dim=1)

    def image(self, tokens: Tensor) -> Tensor:
        """The tokens' values are ordered row in the patch, column in the patch, channel."""
        out = torch.empty(len(tokens), FRAMES, CONFIG.out_dim, HEIGHT, WIDTH, dtype=tokens.dtype)
        each = tokens.unflatten(1, (FRAMES, HEIGHT // 2, WIDTH // 2)).unflatten(-1, (2, 2, CONFIG.out_dim))
        for row in range(HEIGHT):
            for column in range(WIDTH):
                out[..., row, column] = each[:, :, row // 2, column // 2, row % 2, column % 2]
        return out

    def time(self, t: float) -> Tensor:
        half = CONFIG.freq_dim // 2
        angles = [t / 10000 ** (i / half) for i in range(half)]
        waves = torch.tensor([*map(math.cos, angles), *map(math.sin, angles)], dtype=torch.float64)
        return self.linear("time_embedding.2", F.silu(self.linear("time_embedding.0", waves)))


def gelu(x: Tensor) -> Tensor:
    """The approximation with tanh."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(dim=-1, keepdim=True)) / (x.var(dim=-1, keepdim=True, correction=0) + CONFIG.eps).sqrt()


def test_the_flow_is_that_of_the_plain_model(model: CausalWanTransformer, latents: Tensor, prompts: Tensor) -> None:
    """Given a batch of two whose frames have timesteps of their own, every value agrees."""
    flow = model(latents, TIMESTEPS, model.embed_text(prompts), OwnRows())
    assert flow.shape == (2, FRAMES, CONFIG.out_dim, HEIGHT, WIDTH)
    expected = PlainWan(model.state_dict())(latents, TIMESTEPS, prompts)
    torch.testing.assert_close(flow.double(), expected, rtol=1e-5, atol=1e-5)


def test_the_context_answers_for_self_attention(model: CausalWanTransformer, latents: Tensor, prompts: Tensor) -> None:
    """Each layer asks once, in order, and what the context returns is what the layer continues with."""

    class Silent(OwnRows):
        def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            super().attend(layer, q, k, v)
            return torch.zeros_like(q)

    context, text = Silent(), model.embed_text(prompts)
    flow = model(latents, TIMESTEPS, text, context)
    tokens = FRAMES * (HEIGHT // 2) * (WIDTH // 2)
    assert [layer for layer, *_ in context.seen] == [0, 1]
    assert {x.shape for _, *qkv in context.seen for x in qkv} == {(2, tokens, CONFIG.num_heads, CONFIG.head_dim)}
    assert (flow - model(latents, TIMESTEPS, text, OwnRows())).abs().max() > 1e-2


@pytest.mark.parametrize("queries", [False, True])
def test_a_pass_that_is_kept_hands_over_the_same_rows_and_ends_with_the_last(
    model: CausalWanTransformer, latents: Tensor, prompts: Tensor, queries: bool
) -> None:
    text, time = model.embed_text(prompts), model.embed_time(TIMESTEPS)
    whole, kept = OwnRows(), OwnRows()
    kept.observes_queries = queries
    model(latents, time, text, whole)
    model.keep(latents, time, text, kept)
    for (layer, q, *rows), (other, kept_q, *kept_rows) in zip(whole.seen, kept.seen, strict=True):
        assert layer == other and all(map(torch.equal, rows, kept_rows))
        assert torch.equal(q, kept_q) or (layer == 1 and not queries)


def test_queries_and_keys_are_normed_over_all_heads_together_and_values_are_not(
    model: CausalWanTransformer, latents: Tensor, prompts: Tensor
) -> None:
    """Given norm weights of 1, a query has a mean square of 1 (but for epsilon) over its width, not in each head."""
    plain = CausalWanTransformer(CONFIG).eval().requires_grad_(False)
    state = model.state_dict().items()
    plain.load_state_dict({name: torch.ones_like(x) if "self_attn.norm" in name else x for name, x in state})
    context = OwnRows()
    plain(latents, TIMESTEPS, plain.embed_text(prompts), context)
    for _, q, k, v in context.seen:
        for rows in (q, k):
            torch.testing.assert_close(rows.square().mean(dim=(-2, -1)), torch.ones(rows.shape[:2]), atol=0.05, rtol=0)
            assert (rows.square().mean(dim=-1) - 1).abs().max() > 0.1
        assert (v.square().mean(dim=(-2, -1)) - 1).abs().max() > 0.1


def test_padding_behind_the_prompt_is_attended(model: CausalWanTransformer, latents: Tensor, prompts: Tensor) -> None:
    """Zero rows of text become keys and values by the biases, as in the released models: they count."""
    padded = prompts.clone()
    padded[:, 1:] = 0
    text = model.embed_text(padded)
    assert all(k.shape == (2, CONFIG.text_len, CONFIG.num_heads, CONFIG.head_dim) for k in (*text.k, *text.v))
    assert all(v[:, 1:].abs().max() > 1e-3 for v in text.v)
    without = type(text)([k[:, :1] for k in text.k], [v[:, :1] for v in text.v])
    flows = [model(latents, TIMESTEPS, rows, OwnRows()) for rows in (text, without)]
    assert (flows[0] - flows[1]).abs().max() > 1e-3


@pytest.mark.parametrize("shape", [(1, 2, 6), (1, 3, 7)])
def test_text_of_another_shape_is_refused(model: CausalWanTransformer, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[B, 3, 6\]"):
        model.embed_text(torch.zeros(shape))


def test_rms_norm_by_hand() -> None:
    """[3, 4] has a mean square of 12.5; bfloat16 is normed in float32 and rounded before the scale."""
    norm = RMSNorm(2, eps=0.0)
    norm.weight.data = torch.tensor([2.0, 0.5])
    torch.testing.assert_close(norm(torch.tensor([3.0, 4.0])), torch.tensor([6.0, 2.0]) / math.sqrt(12.5))
    x = torch.randn(200, 2, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm.weight.data = torch.tensor([1.3, 0.7]).bfloat16()
    unit = (x.float() / x.float().square().mean(-1, keepdim=True).sqrt()).bfloat16()
    assert torch.equal(norm(x), unit * norm.weight)


def test_time_is_cosines_before_sines_from_fast_to_slow() -> None:
    """Given four channels, the frequencies are 1 and 1/100; float64 keeps large timesteps exact."""
    angle = math.pi / 2
    waves = sinusoidal_embedding(4, torch.tensor([0.0, angle]))
    expected = [[1.0, 1.0, 0.0, 0.0], [0.0, math.cos(angle / 100), 1.0, math.sin(angle / 100)]]
    torch.testing.assert_close(waves, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    late = sinusoidal_embedding(4, torch.tensor([937.5]))
    assert late[0].tolist() == pytest.approx(
        [math.cos(937.5), math.cos(9.375), math.sin(937.5), math.sin(9.375)], abs=1e-12
    )


def test_the_whole_model_runs_in_bfloat16(model: CausalWanTransformer, latents: Tensor, prompts: Tensor) -> None:
    half = CausalWanTransformer(CONFIG).eval().requires_grad_(False)
    half.load_state_dict(model.state_dict())
    half.bfloat16()
    flow = half(latents.bfloat16(), TIMESTEPS, half.embed_text(prompts.bfloat16()), OwnRows())
    exact = model(latents, TIMESTEPS, model.embed_text(prompts), OwnRows())
    assert flow.dtype == torch.bfloat16
    assert 0 < (flow.float() - exact).abs().max() < 0.1 * exact.abs().max()
