"""Deep Forcing against a plain version of its rules, row by row, on random queries, keys and values."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lrag_ray.context.deep_forcing import DeepForcing, DeepForcingSettings
from lrag_ray.context.policy import Layout, PolicyInputs
from lrag_ray.context.runtime import ContextRuntime
from lrag_ray.wan.rope import Rope

LAYERS, HEADS, HEAD_DIM, GRID, N = 2, 2, 8, (1, 3), 2
F = GRID[0] * GRID[1]
LAYOUT = Layout(LAYERS, HEADS, HEAD_DIM, GRID, N, torch.float32, torch.device("cpu"))


class Row:
    """One cached token of a layer."""

    def __init__(self, frame: int, token: int, k: Tensor, v: Tensor) -> None:
        self.frame, self.token, self.k, self.v = frame, token, k.double(), v.double()
        self.selected = 0


class Rows(NamedTuple):
    """A block's q, k and v of a layer, each [n·f, H, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor

    def tokens(self, start: int) -> list[Row]:
        return [Row(start + i // F, i % F, self.k[i], self.v[i]) for i in range(N * F)]


def draw(*key: int) -> Rows:
    generator = torch.Generator().manual_seed(sum(number * 100**i for i, number in enumerate(key)))
    return Rows(*torch.randn(3, N * F, HEADS, HEAD_DIM, generator=generator))


def turned(x: Tensor, index: int, token: int) -> Tensor:
    """A row [H, head_dim] with two temporal pairs, one by row and one by column."""
    phase = torch.tensor([index, index / 100, token // GRID[1], token % GRID[1]], dtype=torch.float64)
    z = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(phase), phase)).flatten(-2)


class PlainLayer:
    """The rules of one layer."""

    def __init__(self, settings: DeepForcingSettings) -> None:
        self.at = settings
        self.rows: list[Row] = []
        self.chosen: dict[int, list[int]] = {}
        """By block, indices into [cached rows | the block's rows] that its compression selected."""
        self.queries: list[Tensor] = []
        """Sum of the turned queries of each frame of queries seen so far."""
        self.sink_start = 0
        self.first_move: int | None = None
        """How far the first move went beside the place that the rule names."""

    def attend(self, start: int, step: int, rows: Rows) -> Tensor:
        """Attention output [n·f, H, head_dim] of the block that starts at frame `start`."""
        queries = [turned(q, start + i // F, i % F) for i, q in enumerate(rows.q)]
        self.queries += [torch.stack(queries[i : i + F]).sum(0) for i in range(0, N * F, F)]
        if step == 0 and len(self.rows) + N * F > self.at.window * F:
            if self.at.compression:
                self.compress(start)
            else:
                self.drop(start)
        attended = [*self.rows, *rows.tokens(start)]
        sink = self.at.sink
        keys = [turned(r.k, r.frame + (self.sink_start if r.frame < sink else 0), r.token) for r in attended]
        weights = torch.einsum("qhd,khd->hqk", torch.stack(queries), torch.stack(keys)).div(math.sqrt(HEAD_DIM))
        return torch.einsum("hqk,khd->qhd", weights.softmax(dim=-1), torch.stack([r.v for r in attended]))

    def compress(self, start: int) -> None:
        at = self.at
        total = len(self.rows) + N * F
        recent_from = total - at.recent * F
        wanted = sum(self.queries[-at.recent :])
        candidates = [r for r in self.rows[at.sink * F : recent_from] if r.selected < at.max_reuse]
        candidates.sort(key=lambda r: -float((turned(r.k, r.frame, r.token) * wanted).sum()))
        best = candidates[: (max(min(at.budget, at.window), at.sink + at.recent) - at.sink - at.recent) * F]
        for row in best:
            row.selected += 1
        best.sort(key=lambda r: (r.frame, r.token))
        self.chosen[start // N] = [i for i, row in enumerate(self.rows) if row in best]
        self.rows = [*self.rows[: at.sink * F], *best, *self.rows[recent_from:]]
        behind_sink = len(self.rows) - at.sink * F + N * F
        self.move_sink(
            start - behind_sink // F - at.sink, 21 - at.budget if at.first_sink_offset == "released" else None
        )

    def drop(self, start: int) -> None:
        excess = len(self.rows) + (N - self.at.window) * F
        del self.rows[self.at.sink * F : self.at.sink * F + excess]
        self.move_sink(start - self.at.window, 0)

    def move_sink(self, to: int, first: int | None) -> None:
        if self.first_move is None:
            self.first_move = 0 if first is None else first - to
        self.sink_start = to + self.first_move

    def store(self, start: int, rows: Rows) -> None:
        self.rows += rows.tokens(start)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(DeepForcingSettings(window=6, sink=1, budget=6, recent=2), id="equal budget"),
        pytest.param(DeepForcingSettings(window=6, sink=1, budget=5, recent=3), id="queries of the block before"),
        pytest.param(DeepForcingSettings(window=6, sink=2, budget=3, recent=3), id="budget of sink and recent alone"),
        pytest.param(DeepForcingSettings(window=6, sink=1, budget=6, recent=2, max_reuse=1), id="used up"),
        pytest.param(
            DeepForcingSettings(window=6, sink=1, budget=5, recent=2, first_sink_offset="released"), id="21-N"
        ),
        pytest.param(DeepForcingSettings(window=6, sink=1, budget=9, recent=2), id="budget beyond the window"),
        pytest.param(DeepForcingSettings(window=6, sink=2, compression=False), id="deep sink alone"),
        pytest.param(DeepForcingSettings(window=5, sink=1, compression=False), id="first drop within a block"),
        pytest.param(DeepForcingSettings(window=-1), id="all frames"),
    ],
)
def test_every_block_attends_as_the_rules_say(settings: DeepForcingSettings) -> None:
    """Nine blocks of a noisy and a clean pass, whose rows differ by layer and pass."""
    rope = Rope(HEAD_DIM, GRID, LAYOUT.device)
    policy = DeepForcing(settings, PolicyInputs(LAYOUT, rope))
    runtime = ContextRuntime(LAYOUT, rope, [policy])
    plain_settings = DeepForcingSettings(window=10**6, compression=False) if settings.window == -1 else settings
    plain = [PlainLayer(plain_settings) for _ in range(LAYERS)]
    for block in range(9):
        start = block * N
        runtime.begin_block(block)
        for step in range(2):
            runtime.begin_pass(step, clean=step == 1)
            for layer, rules in enumerate(plain):
                rows = draw(block, step, layer)
                ours = runtime.attend(layer, *(x[None] for x in rows))[0]
                expected = rules.attend(start, step, rows)
                torch.testing.assert_close(ours.double(), expected, atol=1e-5, rtol=1e-5, msg=f"block {block} {step}")
                if step == 1:
                    rules.store(start, rows)
            runtime.end_pass()
        runtime.end_block()
        state = policy.block_state()
        for layer, rules in enumerate(plain):
            selected = policy.selected_rows(state, layer)
            assert (None if selected is None else selected.tolist()) == rules.chosen.pop(block, None)
    if settings.compression and settings.window != -1:
        assert plain[0].sink_start > 0
