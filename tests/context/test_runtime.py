"""The attention context: what a block attends to, pass by pass, against plain attention in float64."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from lrag_ray.context.policy import ContextPolicy, Exposure, Layout, PolicyInputs, Span
from lrag_ray.context.runtime import ContextRuntime
from lrag_ray.context.trace import TraceRow
from lrag_ray.wan.rope import Rope

LAYERS, HEADS, HEAD_DIM, GRID, N = 2, 2, 8, (1, 2), 2
F = GRID[0] * GRID[1]
LAYOUT = Layout(LAYERS, HEADS, HEAD_DIM, GRID, N, torch.float32, torch.device("cpu"))
ROPE = Rope(HEAD_DIM, GRID, LAYOUT.device)


class Past(NamedTuple):
    """One exposed latent frame: its rows per layer [layers, f, H, head_dim] and its temporal index."""

    k: Tensor
    v: Tensor
    temporal_index: int


@dataclass
class Plan:
    """What a method decides for one block."""

    past: list[Past] = field(default_factory=list)
    query_indices: list[int] = field(default_factory=lambda: [0, 1])
    own: list[int] = field(default_factory=lambda: [0, 1])


class Scripted(ContextPolicy[None]):
    """A method that does what a list of plans says, and keeps what it was given."""

    def __init__(self, plans: Sequence[Plan], bound: int | None = None) -> None:
        super().__init__(None, PolicyInputs(LAYOUT, ROPE))
        self.plans = plans
        self.bound = bound
        self.exposed: list[tuple[int, int]] = []
        self.stored: list[tuple[int, int, Tensor, Tensor]] = []
        self.observed: list[tuple[int, Tensor, Tensor]] = []
        self.state: dict[str, Tensor] | None = None
        self.block = -1

    @classmethod
    def attended_frames(cls, settings: None, frames_per_block: int, first_frame: int) -> int:
        raise NotImplementedError

    def max_context_rows(self) -> int | None:
        return self.bound

    def begin_block(self, block: int, state: dict[str, Tensor] | None = None) -> None:
        self.block, self.state = block, state

    @property
    def plan(self) -> Plan:
        return self.plans[self.block]

    def query_indices(self) -> list[int]:
        return self.plan.query_indices

    def own_frames(self) -> list[int]:
        return self.plan.own

    def observe_queries(self, layer: int, q: Tensor, q_rotated: Tensor) -> None:
        self.observed.append((layer, q.clone(), q_rotated.clone()))

    def expose(self, layer: int) -> Exposure:
        self.exposed.append((self.block, layer))
        spans = [Span(past.k[layer], past.v[layer]) for past in self.plan.past]
        return Exposure(spans, ROPE.frames([past.temporal_index for past in self.plan.past]))

    def store(self, layer: int, k: Tensor, v: Tensor) -> None:
        self.stored.append((self.block, layer, k.clone(), v.clone()))

    def trace(self) -> list[TraceRow]:
        return []


class Rows(NamedTuple):
    """The block's q, k and v, each [B, n·f, H, head_dim]."""

    q: Tensor
    k: Tensor
    v: Tensor


def draw(seed: int, batch: int = 1) -> Rows:
    return Rows(*torch.randn(3, batch, N * F, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed)))


def past(seed: int, index: int) -> Past:
    k, v = torch.randn(2, LAYERS, F, HEADS, HEAD_DIM, generator=torch.Generator().manual_seed(seed))
    return Past(k, v, index)


def turned(rows: Tensor, index: int) -> Tensor:
    """A frame's rows [f, H, head_dim], each pair of channels turned as a complex number, float64.

    Of 4 pairs 2 are temporal, with frequencies 1 and 1/100; the third turns with the token's row, the last with its
    column, both with frequency 1.
    """
    angles = [[index, index / 100, token // GRID[1], token % GRID[1]] for token in range(F)]
    phase = torch.tensor(angles, dtype=torch.float64)[:, None]
    z = torch.view_as_complex(rows.double().unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(z * torch.polar(torch.ones_like(phase), phase)).flatten(-2)


def expected(plan: Plan, layer: int, rows: Rows, element: int = 0) -> Tensor:
    """Softmax attention [n·f, H, head_dim] of one batch element over [past | own frames]."""
    q, k, v = (x[element].split(F) for x in rows)
    queries = torch.cat([turned(x, index) for x, index in zip(q, plan.query_indices, strict=True)])
    keys = [turned(frame.k[layer], frame.temporal_index) for frame in plan.past]
    keys += [turned(k[i], plan.query_indices[i]) for i in plan.own]
    values = torch.cat([*(frame.v[layer] for frame in plan.past), *(v[i] for i in plan.own)]).double()
    weights = torch.einsum("qhd,khd->hqk", queries, torch.cat(keys)).div(math.sqrt(HEAD_DIM)).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, values)


def run(runtime: ContextRuntime, rows: Rows, step: int = 0, *, clean: bool = False) -> list[Tensor]:
    """A pass that offers the same rows in every layer; returns the attention output of each."""
    runtime.begin_pass(step, clean=clean)
    out = [runtime.attend(layer, *rows) for layer in range(LAYERS)]
    runtime.end_pass()
    return out


def assert_attends(runtime: ContextRuntime, plan: Plan, rows: Rows, step: int = 0) -> None:
    for layer, out in enumerate(run(runtime, rows, step)):
        torch.testing.assert_close(out[0].double(), expected(plan, layer, rows), atol=1e-5, rtol=1e-5)


def test_the_first_block_attends_to_itself() -> None:
    plan = Plan(query_indices=[4, 5])
    runtime = ContextRuntime(LAYOUT, ROPE, [Scripted([plan])])
    runtime.begin_block(0)
    assert_attends(runtime, plan, draw(1))


def test_exposed_frames_come_before_the_block_each_at_its_own_index() -> None:
    """Given frames at indices 0, 7 and 0 again, their keys are turned there, and layers see rows of their own."""
    plan = Plan([past(1, 0), past(2, 7), past(3, 0)], query_indices=[8, 9])
    runtime = ContextRuntime(LAYOUT, ROPE, [Scripted([plan])])
    runtime.begin_block(0)
    assert_attends(runtime, plan, draw(4))


def test_a_block_is_laid_out_once_and_every_pass_brings_rows_of_its_own() -> None:
    plan = Plan([past(1, 0)], query_indices=[1, 2])
    policy = Scripted([plan])
    runtime = ContextRuntime(LAYOUT, ROPE, [policy])
    runtime.begin_block(0)
    for step in range(3):
        assert_attends(runtime, plan, draw(step), step)
    assert policy.exposed == [(0, 0), (0, 1)]


def test_the_next_block_is_laid_out_anew() -> None:
    """Given a shorter context after a longer one, nothing of the longer one is attended to."""
    plans = [
        Plan([past(i, i) for i in range(3)], query_indices=[3, 4]),
        Plan([past(9, 2)], query_indices=[6, 7]),
        Plan([past(i, i) for i in range(5)], query_indices=[8, 9]),
    ]
    runtime = ContextRuntime(LAYOUT, ROPE, [Scripted(plans)])
    for block, plan in enumerate(plans):
        runtime.begin_block(block)
        assert_attends(runtime, plan, draw(block))


@pytest.mark.parametrize("bound", [None, 40 * F])
def test_contexts_may_grow_with_and_without_a_bound(bound: int | None) -> None:
    plans = [Plan([past(i, i) for i in range(block * 4)], query_indices=[50, 51]) for block in range(10)]
    runtime = ContextRuntime(LAYOUT, ROPE, [Scripted(plans, bound)])
    for block, plan in enumerate(plans):
        runtime.begin_block(block)
        assert_attends(runtime, plan, draw(block))


@pytest.mark.parametrize("own", [[1], []])
def test_a_block_may_attend_to_some_of_its_frames_only(own: list[int]) -> None:
    """All of its queries still ask; the next block attends to all of its own again."""
    plans = [Plan([past(1, 0)], [4, 5], own), Plan([past(2, 0)], [6, 7])]
    runtime = ContextRuntime(LAYOUT, ROPE, [Scripted(plans)])
    for block, plan in enumerate(plans):
        runtime.begin_block(block)
        for step in range(2):
            assert_attends(runtime, plan, draw(10 * block + step), step)


def test_the_clean_pass_alone_is_stored_unrotated() -> None:
    policy = Scripted([Plan(query_indices=[4, 5])])
    runtime = ContextRuntime(LAYOUT, ROPE, [policy])
    runtime.begin_block(0)
    run(runtime, draw(1))
    assert policy.stored == []
    clean = draw(2)
    run(runtime, clean, 1, clean=True)
    assert [(block, layer) for block, layer, *_ in policy.stored] == [(0, 0), (0, 1)]
    for *_, k, v in policy.stored:
        assert torch.equal(k, clean.k[0]) and torch.equal(v, clean.v[0])


@pytest.mark.parametrize("lengths", [(1, 3), (2, 2), (0, 4)])
def test_batch_elements_have_contexts_and_indices_of_their_own(lengths: tuple[int, int]) -> None:
    """Given contexts of equal or different length, each element attends as it would alone."""
    plans = [
        Plan([past(10 * element + i, i + element) for i in range(length)], [5 + element, 9])
        for element, length in enumerate(lengths)
    ]
    policies = [Scripted([plan]) for plan in plans]
    runtime = ContextRuntime(LAYOUT, ROPE, [*policies])
    runtime.begin_block(0)
    for step in range(2):
        rows = draw(step, batch=2)
        for layer, out in enumerate(run(runtime, rows, step, clean=step == 1)):
            for element, plan in enumerate(plans):
                ours = out[element].double()
                torch.testing.assert_close(ours, expected(plan, layer, rows, element), atol=1e-5, rtol=1e-5)
    for element, policy in enumerate(policies):
        for *_, k, v in policy.stored:
            assert torch.equal(k, rows.k[element]) and torch.equal(v, rows.v[element])


class Grouped(Scripted):
    """A method whose heads do what plans of their own say."""

    def __init__(self, plans: dict[tuple[int, ...], Plan], bound: int | None = None) -> None:
        super().__init__(list(plans.values()), bound)
        self.by_heads = plans

    def expose(self, layer: int) -> list[Exposure]:  # type: ignore[override]
        found = []
        for i, heads in enumerate(self.by_heads):
            self.block = i
            found.append(super().expose(layer)._replace(heads=heads))
        self.block = 0
        return found


@pytest.mark.parametrize("bound", [None, 8 * F])
@pytest.mark.parametrize("lengths", [(1, 3), (2, 2), (0, 2)])
def test_heads_have_contexts_of_their_own(lengths: tuple[int, int], bound: int | None) -> None:
    """Given two elements whose heads see frames of different number and order, each attends as its plan says."""
    grouped: list[dict[tuple[int, ...], Plan]] = []
    for element in range(2):
        plans: dict[tuple[int, ...], Plan] = {
            (head,): Plan([past(10 * head + i + element, i + head) for i in range(length)], [6, 9])
            for head, length in zip((0, 1) if element else (1, 0), lengths, strict=True)
        }
        grouped.append(plans)
    policies = [Grouped(plans, bound) for plans in grouped]
    runtime = ContextRuntime(LAYOUT, ROPE, [*policies])
    runtime.begin_block(0)
    for step in range(2):
        rows = draw(step, batch=2)
        for layer, out in enumerate(run(runtime, rows, step)):
            for element, plans in enumerate(grouped):
                for (head,), plan in plans.items():
                    wanted = expected(plan, layer, rows, element)[:, head]
                    torch.testing.assert_close(out[element, :, head].double(), wanted, atol=1e-5, rtol=1e-5)


def test_a_context_of_all_heads_and_one_by_heads_in_one_batch() -> None:
    plans: dict[tuple[int, ...], Plan] = {
        (0,): Plan([past(1, 0)], [4, 5]),
        (1,): Plan([past(2, 1), past(3, 2)], [4, 5]),
    }
    whole = Plan([past(4, 0)], [4, 5])
    runtime = ContextRuntime(LAYOUT, ROPE, [Scripted([whole]), Grouped(plans)])
    runtime.begin_block(0)
    rows = draw(7, batch=2)
    for layer, out in enumerate(run(runtime, rows)):
        torch.testing.assert_close(out[0].double(), expected(whole, layer, rows), atol=1e-5, rtol=1e-5)
        for (head,), plan in plans.items():
            wanted = expected(plan, layer, rows, 1)[:, head]
            torch.testing.assert_close(out[1, :, head].double(), wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("heads", [[(0,)], [(0, 1), (1,)], [(0,), (2,)]])
def test_every_head_is_in_one_group(heads: list[tuple[int, ...]]) -> None:
    runtime = ContextRuntime(LAYOUT, ROPE, [Grouped({each: Plan() for each in heads})])
    runtime.begin_block(0)
    with pytest.raises(ValueError, match="not each of 2 once"):
        run(runtime, draw(1))


def test_queries_are_shown_to_those_who_ask() -> None:
    """Before and after they are turned, in every pass."""
    policy, plan = Scripted([Plan(query_indices=[4, 5])]), Plan(query_indices=[4, 5])
    policy.observes_queries = True
    runtime = ContextRuntime(LAYOUT, ROPE, [policy])
    runtime.begin_block(0)
    passes = [draw(1), draw(2)]
    for step, rows in enumerate(passes):
        run(runtime, rows, step)
    assert [layer for layer, *_ in policy.observed] == [0, 1, 0, 1]
    for (_, q, q_turned), rows in zip(policy.observed, [passes[0]] * 2 + [passes[1]] * 2, strict=True):
        assert torch.equal(q, rows.q[0])
        both = zip(rows.q[0].split(F), plan.query_indices, strict=True)
        torch.testing.assert_close(q_turned.double(), torch.cat([turned(x, i) for x, i in both]), atol=1e-5, rtol=1e-5)


def test_recorded_choices_reach_the_element_that_made_them() -> None:
    policies = [Scripted([Plan()]), Scripted([Plan()])]
    runtime = ContextRuntime(LAYOUT, ROPE, [*policies])
    states = [{"chosen": torch.tensor([i])} for i in range(2)]
    runtime.begin_block(0, states)
    assert [policy.state for policy in policies] == states
    runtime.begin_block(0)
    assert [policy.state for policy in policies] == [None, None]
