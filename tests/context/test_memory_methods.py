"""Methods that make rows of the frames that leave, or choose among them, against their formulas.

Policies are driven by hand with random keys and values, so that every exposed row can be computed here in float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from lrag_ray.context.base import Base
from lrag_ray.context.ema_sink import EmaSink, EmaSinkSettings
from lrag_ray.context.memflow import MemFlow, MemFlowSettings
from lrag_ray.context.memrope import LONG, SHORT, MemRope, MemRopeSettings
from lrag_ray.context.policy import ContextPolicy, Exposure, Layout, PolicyInputs
from lrag_ray.context.rolling_sink import RollingSink, RollingSinkSettings
from lrag_ray.wan.rope import MAX_INDEX, Angles, Rope, rotate
from tests.tiny import SAMPLER, prompt_embeds, start, tiny_transformer

LAYERS, HEADS, DIM, GRID = 2, 2, 12, (2, 3)
TOKENS = GRID[0] * GRID[1]


@dataclass
class Driven:
    """A policy after a block was exposed and before it is stored."""

    policy: ContextPolicy[Any]
    block: int
    past: list[Tensor]
    """Clean K and V of every earlier block [2, layers, n·f, H, d], unrotated."""
    k: list[Tensor]
    """Exposed unrotated keys by layer [rows, H, d]."""
    v: list[Tensor]
    angles: list[Angles]

    @property
    def frames(self) -> Tensor:
        """Clean K and V of every earlier frame, [frames, 2, layers, f, H, d] in float64."""
        blocks = [rows.unflatten(2, (-1, TOKENS)).movedim(2, 0) for rows in self.past]
        return torch.cat(blocks).double()

    def exposed(self, first: int, count: int = 1) -> Tensor:
        """K and V of `count` exposed frames from the given place on, [2, layers, count·f, H, d]."""
        at = slice(first * TOKENS, (first + count) * TOKENS)
        return torch.stack([torch.stack([rows[at] for rows in side]) for side in (self.k, self.v)])


def drive(
    policy: type[ContextPolicy[Any]],
    settings: Any,
    blocks: int,
    *,
    n: int = 3,
    dtype: torch.dtype = torch.float32,
    text_keys: list[Tensor] | None = None,
) -> Iterator[Driven]:
    """Run the hooks of one rollout as the runtime calls them."""
    device = torch.device("cpu")
    layout = Layout(LAYERS, HEADS, DIM, GRID, n, dtype, device)
    rope = Rope(DIM, GRID, device, policy.temporal_indices)
    policy.check(settings, n)
    made = policy(settings, PolicyInputs(layout, rope, text_keys=text_keys or []))
    generator = torch.Generator().manual_seed(5)
    past: list[Tensor] = []
    for block in range(blocks):
        made.begin_block(block)
        made.begin_expose()
        exposures = [each for layer in range(LAYERS) if isinstance(each := made.expose(layer), Exposure)]
        k = [
            torch.cat([torch.empty(0, HEADS, DIM), *(s.k.reshape(-1, HEADS, DIM) for s in e.spans)]) for e in exposures
        ]
        v = [
            torch.cat([torch.empty(0, HEADS, DIM), *(s.v.reshape(-1, HEADS, DIM) for s in e.spans)]) for e in exposures
        ]
        made.end_expose()
        yield Driven(made, block, past, k, v, [e.angles for e in exposures])
        rows = torch.randn(2, LAYERS, n * TOKENS, HEADS, DIM, generator=generator).to(dtype)
        made.begin_store()
        for layer in range(LAYERS):
            made.store(layer, rows[0, layer], rows[1, layer])
        made.end_block()
        past.append(rows)


def places(driven: Driven) -> list[tuple[int, int]]:
    """(frame, temporal index) of the rows before the block in layer 0."""
    rows = [row for row in driven.policy.trace() if row.layer in (-1, 0) and row.kind != "current"]
    return [(row.frame, row.temporal_index) for row in rows]


@pytest.mark.parametrize(("adaptive", "overflow"), [(False, "all"), (False, "released"), (True, "all")])
def test_memrope_s_memories_are_moving_averages(adaptive: bool, overflow: Any) -> None:
    """Given window 11 and sink 2, block 3 makes 3 of 9 frames leave, and every later one 3."""
    at = MemRopeSettings(11, 2, alpha_long=0.2, alpha_short=0.3, adaptive=adaptive, first_overflow=overflow)
    long = short = torch.empty(0)
    oldest = at.sink
    for step in drive(MemRope, at, 9):
        if step.block < 3:
            assert places(step) == [(frame, frame) for frame in range(3 * step.block)]
            continue
        # 11 frames: 2 sink, 2 memories, 4 recent, 3 current.
        newest = 3 * step.block - 4
        leaving = step.frames[oldest:newest]
        if oldest == at.sink and overflow == "released":
            leaving = leaving[2:]
        mean = leaving.mean(0) if adaptive else leaving.mean((0, 3), keepdim=True)[0].expand(-1, -1, TOKENS, -1, -1)
        if oldest == at.sink:
            long = short = mean
        else:
            rate = torch.full((LAYERS, TOKENS), at.alpha_short, dtype=torch.float64)
            if adaptive:
                moved = (mean[0] - short[0]).square().sum(-1).sqrt().mean(-1)
                share = moved / moved.max(dim=1, keepdim=True).values
                rate = 0.03 + share * (1.5 - 0.03)
            rate = rate[..., None, None]
            long, short = 0.2 * mean + 0.8 * long, rate * mean + (1 - rate) * short
        oldest = newest
        torch.testing.assert_close(step.exposed(2).double(), long, atol=1e-5, rtol=0)
        torch.testing.assert_close(step.exposed(3).double(), short, atol=1e-5, rtol=0)
        recent = [(newest + i, 4 + i) for i in range(4)]
        assert places(step) == [(0, 0), (1, 1), (LONG, 2), (SHORT, 3), *recent]
        assert step.policy.query_indices() == [8, 9, 10]


def test_a_memory_in_bfloat16_is_kept_in_float32() -> None:
    """Given 81 updates of 0.001 in a bfloat16 cache, the sink has moved as far as in float64."""
    at = EmaSinkSettings(window=9, sink=3)
    last = list(drive(EmaSink, at, 84, dtype=torch.bfloat16))[-1]
    frames = last.frames
    sink = frames[:3].clone()
    for block in range(1, 82):
        sink = 0.999 * sink + 0.001 * frames[3 * block : 3 * block + 3]
    ours = last.exposed(0, 3).double().unflatten(2, (3, TOKENS)).movedim(2, 0)
    moved, expected = (ours - frames[:3]).square().mean().sqrt(), (sink - frames[:3]).square().mean().sqrt()
    assert float(moved / expected) == pytest.approx(1, abs=0.02)
    assert float((ours - sink).abs().max()) < 0.02, "a rounding of the exposed rows, not of the updates"


@pytest.mark.parametrize(("window", "sink"), [(9, 3), (12, 1), (10, 2)])
def test_the_ema_sink_takes_over_what_leaves(window: int, sink: int) -> None:
    """Given sinks of a block and smaller ones, every frame that leaves is averaged into slot j mod S, in order."""
    at = EmaSinkSettings(window=window, sink=sink, alpha=0.8)
    oldest = sink
    expected: Tensor | None = None
    for step in drive(EmaSink, at, 8):
        first = max(oldest, 3 * step.block + 3 - window + sink)
        for j, frame in enumerate(range(oldest, first)):
            expected = step.frames[:sink].clone() if expected is None else expected
            expected[j % sink] = 0.8 * expected[j % sink] + 0.2 * step.frames[frame]
        oldest = first
        held = [*range(min(sink, 3 * step.block)), *range(first, 3 * step.block)]
        assert places(step) == [(frame, slot) for slot, frame in enumerate(held)]
        if expected is not None:
            ours = step.exposed(0, sink).unflatten(2, (sink, TOKENS)).movedim(2, 0)
            torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("window", "n"), [(12, 3), (9, 3), (21, 3), (4, 2), (5, 1)])
def test_the_rolling_sink_runs_to_and_fro(window: int, n: int) -> None:
    """Given any window, the content at index p is a triangle wave of period 2 (W - n), but for the newest block."""
    rolling = window - n
    for step in drive(RollingSink, RollingSinkSettings(window), 24, n=n):
        start = step.block * n
        rows = places(step)
        assert [index for _, index in rows] == list(range(max(0, start + n - window), start))
        assert step.policy.query_indices() == list(range(start, start + n))
        for i, (frame, index) in enumerate(rows):
            phase = index % (2 * rolling)
            rolled = index if index < rolling else min(phase, 2 * rolling - 1 - phase)
            assert frame == (index if index >= start - n else rolled)
            torch.testing.assert_close(step.exposed(i).double(), step.frames[frame], atol=0, rtol=0)


def test_the_rolling_sink_of_the_docstring() -> None:
    *_, block7 = drive(RollingSink, RollingSinkSettings(12), 8)
    assert places(block7)[:9] == [(5, 12), (4, 13), (3, 14), (2, 15), (1, 16), (0, 17), (18, 18), (19, 19), (20, 20)]


def test_the_table_of_rotations_grows_where_a_method_asks_for_it() -> None:
    """Given more than 1024 latent frames, rolling_sink rotates on, in a table that begins with the released one."""
    *_, last = drive(RollingSink, RollingSinkSettings(), 345)
    assert last.policy.query_indices() == [1032, 1033, 1034]
    long, short = (Rope(DIM, GRID, torch.device("cpu"), rows) for rows in (RollingSink.temporal_indices, MAX_INDEX))
    assert torch.equal(long.frames([0, 1023]).turns, short.frames([0, 1023]).turns)
    with pytest.raises(IndexError, match=r"index 1024 lies outside the table of rotations, 0\.\.1023"):
        short.frames([1024])
    assert (RollingSink.max_frames, Base.max_frames) == (8192, 1024)


@pytest.mark.parametrize(
    ("window", "sink", "bank", "interval"), [(9, 1, 3, 3), (7, 2, 2, 1), (6, 1, 4, 2), (8, 3, 1, 2)]
)
def test_memflow_keeps_the_best_of_its_bank(window: int, sink: int, bank: int, interval: int) -> None:
    """Given the rule frame by frame in float64, banks, order, indices and rows agree in every layer."""
    generator = torch.Generator().manual_seed(9)
    text = [torch.randn(5, HEADS, DIM, generator=generator) for _ in range(LAYERS)]
    rope = Rope(DIM, GRID, torch.device("cpu"))
    banks: list[list[int]] = [[] for _ in range(LAYERS)]
    at = MemFlowSettings(window, sink, bank, interval)
    selections = 0
    for step in drive(MemFlow, at, 16, text_keys=text):
        for layer, held in enumerate(banks if step.block else []):
            recorded, slot = 3 * (step.block - 1), (step.block - 1) // interval
            if slot < bank:
                banks[layer] = [*held[:slot], recorded]
                continue
            selections += 1
            scores = []
            for frame in held:
                keys = rotate(step.frames[frame, 0, layer].float(), rope.frames([frame])).double()
                scores.append(float(torch.einsum("thd,fhd->thf", text[layer].double(), keys).mean()) / DIM**0.5)
            kept = sorted(range(bank), key=lambda i: -scores[i])[: bank - 1]
            banks[layer] = [*(held[i] for i in kept), recorded]
        start = 3 * step.block
        sinks = list(range(min(sink, start)))
        local = list(range(max(sink, start + 3 - window + sink), start))
        rows = step.policy.trace()
        for layer in range(LAYERS):
            mine = [row for row in rows if row.layer in (-1, layer) and row.kind != "current"]
            frames = [*sinks, *banks[layer], *local]
            assert [row.frame for row in mine] == [row.temporal_index for row in mine] == frames
            if frames:
                shown = step.frames[frames, :, layer].movedim(1, 0).flatten(1, 2)
                assert torch.equal(torch.stack([step.k[layer], step.v[layer]]).double(), shown)
                assert torch.equal(step.angles[layer].turns, rope.frames(frames).turns)
        assert at.recorded(step.block) == len(banks[0])
    assert selections > 10


def test_a_rollout_hands_over_the_text_keys_of_each_prompt() -> None:
    """Given two prompts, each policy sees the cross-attention keys of its own in every layer."""
    model = tiny_transformer()
    seen: list[PolicyInputs] = []

    class Watching(MemFlow):
        def __init__(self, settings: MemFlowSettings, inputs: PolicyInputs) -> None:
            super().__init__(settings, inputs)
            seen.append(inputs)

    start(model, Watching, prompts=("a red fox", "an empty street at night"))
    text = model.embed_text(prompt_embeds("a red fox", "an empty street at night"))
    for i, inputs in enumerate(seen):
        assert all(torch.equal(keys, layer[i]) for keys, layer in zip(inputs.text_keys, text.k, strict=True))
    assert not torch.equal(seen[0].text_keys[0], seen[1].text_keys[0])


@pytest.mark.parametrize(
    ("policy", "settings", "said"),
    [
        (MemRope, {"window": -1}, "window -1 keeps all frames"),
        (MemRope, {"alpha_long": 0.0}, "alpha_long 0.0 must be above 0 and at most 1"),
        (MemRope, {"window": 6, "sink": 2}, "leaves 2 latent frames for local context after sink 2 and memory 2"),
        (EmaSink, {"sink": 0}, "needs at least 1"),
        (EmaSink, {"sink": 4}, "sink 4 exceeds a block's 3 latent frames"),
        (EmaSink, {"alpha": 1.5}, "alpha 1.5 must be from 0 to 1"),
        (RollingSink, {"window": 13}, "window 13 must be 2 or more blocks of 3 latent frames: for example 12"),
        (RollingSink, {"window": 3}, "for example 6"),
        (MemFlow, {"sink": 0}, "sink 0 must be at least 1"),
        (MemFlow, {"bank": 0}, "bank 0 must be at least 1"),
        (MemFlow, {"window": -1}, "window -1 keeps all frames"),
    ],
)
def test_impossible_settings_are_refused(policy: type[ContextPolicy[Any]], settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        policy.check(policy.Settings(**settings), SAMPLER.frames_per_block)
