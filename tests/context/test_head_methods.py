"""Methods whose heads attend to different rows: classes, rows and patches against their formulas in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lrag_ray.context.dummy_forcing import DUMMY, FIRST, MID, DummyForcing, DummyForcingSettings
from lrag_ray.context.forcing_kv import ForcingKv, ForcingKvSettings
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.trace import TraceRow
from lrag_ray.rollout.loop import RolloutLoop
from lrag_ray.rollout.types import BlockResult
from lrag_ray.wan.config import WanConfig
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.rope import Rope, rotate
from lrag_ray.wan.transformer import CausalWanTransformer
from tests.tiny import SAMPLER, start, tiny_transformer

LAYERS, HEADS, DIM, TOKENS, N = 3, 4, 12, 6, 3
Method = type[ContextPolicy[Any]]
STATIC = ((0, 1), (2,), (0, 1, 2, 3))


@pytest.fixture(scope="module")
def model() -> CausalWanTransformer:
    config = WanConfig(dim=48, ffn_dim=32, freq_dim=16, text_dim=8, text_len=4, num_heads=HEADS, num_layers=LAYERS)
    made = CausalWanTransformer(config)
    fill_random(made, seed=11)
    return made.eval().requires_grad_(False)


class Watched:
    """A rollout with the queries, and the clean K and V of every block, unrotated as the policy was given them."""

    def __init__(self, model: CausalWanTransformer, policy: Method, settings: Any, blocks: int) -> None:
        self.attended: dict[tuple[int, int, int], tuple[Tensor, Tensor]] = {}
        self.q: dict[tuple[int, int, int], Tensor] = {}
        self.kv: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.rollout: RolloutLoop = start(model, policy, settings, probe=self)
        self.policy = self.rollout.context.policies[0]
        store = self.policy.store

        def stored(layer: int, k: Tensor, v: Tensor) -> None:
            self.kv[len(self.kv) // LAYERS, layer] = k.clone(), v.clone()
            store(layer, k, v)

        self.policy.store = stored  # type: ignore[method-assign]
        self.chosen: list[Any] = []
        self.blocks: list[BlockResult] = []
        for result in self.rollout.blocks(blocks):
            self.blocks.append(result)
            self.chosen.append(getattr(self.policy, "chosen", None))
        self.rope = Rope(DIM, (2, 3), torch.device("cpu"))

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None: ...

    def on_attention(self, block: int, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: Any) -> None:
        if step == len(SAMPLER.denoising_steps):
            for i, head in enumerate(heads or range(HEADS)):
                self.attended[block, layer, head] = k[0, :, i].clone(), v[0, :, i].clone()
                self.q[block, layer, head] = q[0, :, i].clone()

    def frame(self, layer: int, frame: int) -> tuple[Tensor, Tensor]:
        """Rotated keys and values of a frame [f, H, d]."""
        k, v = (rows[frame % N * TOKENS : (frame % N + 1) * TOKENS] for rows in self.kv[frame // N, layer])
        return rotate(k, self.rope.frames([frame])), v

    def rows(self, block: int, layer: int, head: int) -> list[TraceRow]:
        return [
            row
            for row in self.blocks[block].trace[0]
            if row.layer in (-1, layer) and (row.heads is None or head in row.heads)
        ]

    def assert_attends(self, block: int, layer: int, head: int, places: list[tuple[int, list[int]]]) -> None:
        """The rows and the trace of a head are those tokens of those frames, in this order."""
        k, v = self.attended[block, layer, head]
        keys = [self.frame(layer, frame)[0][tokens, head] for frame, tokens in places]
        values = [self.frame(layer, frame)[1][tokens, head] for frame, tokens in places]
        torch.testing.assert_close(k, torch.cat(keys), atol=1e-6, rtol=0)
        assert torch.equal(v, torch.cat(values))
        traced = [(row.frame, row.temporal_index, row.tokens) for row in self.rows(block, layer, head)]
        assert traced == [(frame, frame, len(tokens)) for frame, tokens in places]


def whole(*frames: int) -> list[tuple[int, list[int]]]:
    return [(frame, list(range(TOKENS))) for frame in frames]


@pytest.mark.parametrize(
    ("ar_start", "local_blocks", "num_dummy"), [(1, 1, 6), (2, 1, 6), (3, 2, 3), (1, 3, None), (2, 1, 0), (1, 1, 12)]
)
def test_dummy_forcing_sorts_heads_by_what_they_look_at(
    model: CausalWanTransformer, ar_start: int, local_blocks: int, num_dummy: int | None
) -> None:
    """Given the rule head by head in float64, scores, classes and rows agree."""
    seen = Watched(model, DummyForcing, DummyForcingSettings(ar_start, local_blocks, num_dummy), ar_start + 4)
    policy = seen.policy
    assert isinstance(policy, DummyForcing)
    first_rows = TOKENS if ar_start == 1 else N * TOKENS
    assert policy.sampled_rows.shape == (LAYERS, first_rows // 3)
    shares = torch.zeros(LAYERS, HEADS, 3, dtype=torch.float64)
    for layer in range(LAYERS):
        for head in range(HEADS):
            q = seen.q[ar_start, layer, head].double()[policy.sampled_rows[layer]]
            weights = (q @ seen.attended[ar_start, layer, head][0].double().T / math.sqrt(DIM)).softmax(-1).mean(0)
            end = len(weights) - N * TOKENS
            parts = (weights[:first_rows], weights[first_rows:end], weights[end:])
            shares[layer, head] = torch.stack([part.sum() for part in parts])
    measured = policy.shares()
    assert measured is not None
    torch.testing.assert_close(measured.double(), shares, atol=1e-6, rtol=0)

    p0, p1 = shares[..., 0] / shares[..., 0].sum(), shares[..., 1] / shares[..., 1].sum()
    by_cost = sorted((max(p0[i, j], p1[i, j]), i, j) for i in range(LAYERS) for j in range(HEADS))
    dummy = {(i, j) for _, i, j in by_cost[: 6 if num_dummy is None else num_dummy]}
    classes = [
        [DUMMY if (i, j) in dummy else MID if p0[i, j] < p1[i, j] else FIRST for j in range(HEADS)]
        for i in range(LAYERS)
    ]
    assert policy.classes == classes

    for block in range(len(seen.blocks)):
        start = N * block
        own, local = range(start, start + N), range(max(1, start - N * local_blocks), start)
        for layer in range(LAYERS):
            for head, each in enumerate(classes[layer]):
                past = {FIRST: [0], MID: [*local], DUMMY: [start - 1]}[each]
                if block <= ar_start:
                    past = [*([0] if block else []), *local]
                seen.assert_attends(block, layer, head, whole(*past, *own))


def test_stored_classes_decide_in_replay(model: CausalWanTransformer) -> None:
    """Given other classes than clean latents would give, a resumed rollout takes the stored ones, and stores them."""
    blocks = list(start(model, DummyForcing, DummyForcingSettings()).blocks(3))
    assert [list(result.state[0]) for result in blocks] == [[], ["classes"], []]
    other = {"classes": (blocks[1].state[0]["classes"] + 1) % 3}
    states = [result.state for result in blocks]
    again = start(model, DummyForcing, DummyForcingSettings())
    again.replay(torch.cat([result.latents for result in blocks], dim=1), [states[0], [other], states[2]])
    policy = again.context.policies[0]
    assert isinstance(policy, DummyForcing) and policy.classes == other["classes"].tolist()
    for spoiled in ({"classes": torch.full((LAYERS, HEADS), 3)}, {"classes": torch.zeros(2, 2)}, {"c": torch.zeros(1)}):
        again = start(model, DummyForcing, DummyForcingSettings())
        with pytest.raises(ValueError, match="block 1: its stored classes of heads do not fit"):
            again.replay(torch.cat([result.latents for result in blocks], dim=1), [states[0], [spoiled], states[2]])


def test_samples_belong_to_the_rollout(model: CausalWanTransformer) -> None:
    def sampled(seed: int, prompt: str) -> Tensor:
        policy = start(model, DummyForcing, prompts=(prompt,), seed=seed).context.policies[0]
        assert isinstance(policy, DummyForcing)
        return policy.sampled_rows

    assert torch.equal(sampled(0, "a red fox"), sampled(0, "a red fox"))
    assert not torch.equal(sampled(0, "a red fox"), sampled(1, "a red fox"))
    assert not torch.equal(sampled(0, "a red fox"), sampled(0, "an empty street"))


@pytest.mark.parametrize(
    "settings",
    [
        ForcingKvSettings(1, 1, 1, 1, 1, 6, 0.33, static_heads=STATIC),
        ForcingKvSettings(2, 1, 2, 2, 2, 3, 0.67, static_heads=STATIC),
        ForcingKvSettings(2, 3, 1, 3, 1, 2, 0.33, static_heads=STATIC),
        ForcingKvSettings(1, 0, 3, 3, compress=False, static_heads=STATIC),
        ForcingKvSettings(3, 1, 8, 7, 1, 6, 0.33, static_heads=STATIC),
        ForcingKvSettings(1, 1, 2, 5, 2, 6, 0.67, static_heads=((), (0, 1, 2, 3), (1, 3))),
        ForcingKvSettings(2, 1, 2, 2, 1, 6, 0.33),
        ForcingKvSettings(patches_per_frame=6),
    ],
    ids=range(8),
)
def test_forcing_kv_keeps_the_patches_that_change(model: CausalWanTransformer, settings: ForcingKvSettings) -> None:
    """Given the rule patch by patch in float64, scores, choices, rows and traces agree in every layer and head."""
    at = settings
    seen = Watched(model, ForcingKv, at, at.ar_start + 6)
    classes = static_of(seen) if at.static_heads is None else [list(heads) for heads in at.static_heads]
    decides = next(layer for layer in range(1, LAYERS) if len(classes[layer]) < HEADS)
    dynamic = [head for head in range(HEADS) if head not in classes[decides]]
    kept: list[tuple[int, list[int]]] = []
    choices = 0
    for block in range(len(seen.blocks)):
        cs = N * block
        own, sink = [*range(cs, cs + N)], [*range(min(at.sink, cs))]

        def last(count: int, cs: int = cs) -> list[int]:
            return [*range(max(at.sink, cs - count), cs)]

        for layer in range(LAYERS):
            for head in range(HEADS):
                if block <= at.ar_start or layer == 0:
                    places = whole(*sink, *last(max(at.static_frames, at.dynamic_frames)), *own)
                elif head in classes[layer]:
                    places = whole(*sink, *last(at.static_frames), *own)
                else:
                    places = [*whole(*sink), *kept, *whole(*last(at.dynamic_frames), *own)]
                seen.assert_attends(block, layer, head, places)
        kept = []
        if at.compress and block > at.ar_start:
            candidates = [
                frame for frame in range(cs - at.dynamic_frames, cs - at.dynamic_frames + N) if frame >= at.sink
            ]
            scored = []
            for frame in candidates:
                now, after = (
                    seen.frame(decides, each)[0][:, dynamic].double().flatten(1) for each in (frame, frame + 1)
                )
                similar = torch.cosine_similarity(now, after, dim=1).unflatten(0, (at.patches_per_frame, -1)).mean(1)
                scored += [(float(value), frame, patch) for patch, value in enumerate(similar)]
            found = seen.chosen[block]
            scores = torch.tensor([value for value, *_ in scored])
            torch.testing.assert_close(found.scores.read().flatten(), scores, atol=1e-6, rtol=0)
            size = TOKENS // at.patches_per_frame
            best = sorted(
                (frame, patch) for _, frame, patch in sorted(scored)[: at.patch_frames * at.patches_per_frame]
            )
            for frame in sorted({frame for frame, _ in best}):
                patches = [patch for each, patch in best if each == frame]
                kept.append((frame, [token for patch in patches for token in range(patch * size, (patch + 1) * size)]))
            choices += 1
    assert choices == (len(seen.blocks) - at.ar_start - 1 if at.compress else 0)
    assert {"compressed"} <= {row.kind for row in seen.blocks[-1].trace[0]} or not at.compress


def static_of(seen: Watched) -> list[list[int]]:
    """Static heads in float64: those with 0.8 of the attention behind the sink on the last 4 of all frames."""
    policy = seen.policy
    assert isinstance(policy, ForcingKv) and policy.classes is not None
    block, found = policy.settings.ar_start, []
    for layer in range(LAYERS):
        keys = torch.cat([seen.frame(layer, frame)[0] for frame in range(N * (block + 1))]).double()
        static = []
        for head in range(HEADS):
            q = seen.q[block, layer, head].double()[policy.sampled_rows[layer]]
            weights = (q @ keys[:, head].T / math.sqrt(DIM)).softmax(-1).mean(0)
            if weights[-4 * TOKENS :].sum() >= 0.8 * weights[policy.settings.sink * TOKENS :].sum():
                static.append(head)
        found.append(static)
        assert [head for head, each in enumerate(policy.classes[layer]) if each] == static
    return found


@pytest.mark.parametrize(("policy", "blocks"), [(DummyForcing, 20), (ForcingKv, 20)])
def test_heads_attend_to_no_more_than_is_planned(model: CausalWanTransformer, policy: Method, blocks: int) -> None:
    """Frames that are planned, and device memory, hold what is attended to and cached; no head exceeds 12 frames."""
    settings = policy.Settings(**({"patches_per_frame": 6} if policy is ForcingKv else {}))
    rollout = start(model, policy, settings)
    frame_bytes = 2 * LAYERS * TOKENS * HEADS * DIM * 4
    for result in rollout.blocks(blocks):
        planned = policy.attended_frames(settings, N, result.first_frame)
        by_head = [
            sum(row.tokens for row in result.trace[0] if row.layer in (-1, i) and (row.heads is None or j in row.heads))
            for i in range(LAYERS)
            for j in range(HEADS)
        ]
        assert sum(by_head) <= planned * TOKENS * len(by_head)
        assert max(by_head) <= 12 * TOKENS
    window: Any = rollout.context.policies[0]
    cached = len(window.window._slots)
    assert window.window.frame_bytes == frame_bytes
    extra = policy.device_bytes(settings, N, blocks * N, frame_bytes) / frame_bytes
    assert cached == policy.attended_frames(settings, N, (blocks - 1) * N) + extra


@pytest.mark.parametrize(
    ("policy", "settings", "said"),
    [
        (DummyForcing, {"ar_start": 0}, "ar_start 0 must be at least 1"),
        (DummyForcing, {"num_dummy": -1}, "num_dummy -1 must not be negative"),
        (DummyForcing, {"num_dummy": 5}, "num_dummy 5 exceeds the 4 heads of 2 layers: lower it, or leave it out"),
        (ForcingKv, {}, "patches_per_frame 8 does not divide the 6 tokens of a latent frame: use one of 1, 2, 3, 6"),
        (ForcingKv, {"patch_frames": 2}, "keeps 8 of the 24 patches .* means 16: .* retention to 0.6667"),
        (ForcingKv, {"patch_frames": 4, "retention": 1.33}, "set patch_frames to at most 3 and retention to 1"),
        (ForcingKv, {"patch_frames": 0}, "patch_frames 0 keeps nothing"),
        (ForcingKv, {"ar_start": 1, "sink": 2}, "leaves 4 latent frames behind the sink .* raise ar_start or give"),
        (ForcingKv, {"static_heads": ((0, 0), ())}, "static_heads of layer 0, .0, 0., must be different numbers"),
        (ForcingKv, {"patches_per_frame": 6, "static_heads": ((0,),)}, "static_heads has 1 layers, the generator 2"),
        (ForcingKv, {"patches_per_frame": 6, "static_heads": ((0,), (2,))}, "layer 1, .2.: a layer has heads 0 to 1"),
        (ForcingKv, {"dynamic_frames": 0}, "dynamic_frames 0 must be at least 1"),
    ],
)
def test_impossible_settings_are_refused(policy: Method, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        start(tiny_transformer(), policy, policy.Settings(**settings))


def test_one_frame_a_block_tells_no_heads_apart() -> None:
    with pytest.raises(
        ValueError, match="sees 1 past latent frames in blocks of 1, and telling heads apart takes more"
    ):
        DummyForcing.check(DummyForcingSettings(), 1)
    DummyForcing.check(DummyForcingSettings(ar_start=2), 1)


def test_stored_patches_decide_in_replay(model: CausalWanTransformer) -> None:
    settings = ForcingKvSettings(1, 1, 1, 1, 1, 6, 0.33, static_heads=STATIC)
    blocks = list(start(model, ForcingKv, settings).blocks(5))
    assert [list(result.state[0]) for result in blocks] == [[], [], [], ["patches"], ["patches"]]
    states = [result.state for result in blocks]
    latents = torch.cat([result.latents for result in blocks], dim=1)
    for spoiled in (torch.tensor([18]), torch.tensor([-1]), torch.zeros(0), torch.zeros(2, 2)):
        again = start(model, ForcingKv, settings)
        with pytest.raises(ValueError, match="block 4: its stored patches do not fit"):
            again.replay(latents, [*states[:4], [{"patches": spoiled}]])
    moved = start(model, ForcingKv, settings)
    moved.replay(latents, [*states[:4], [{"patches": torch.arange(6)}]])
    kept = [row.frame for row in moved.context.trace()[0] if row.kind == "compressed"]
    assert kept and set(kept) == {8}, "the first of the frames 8, 9 and 10"
