"""What each method attends to, against its formula; prefixes, batches and replay."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lrag_ray.context.base import Base, BaseSettings
from lrag_ray.context.deep_forcing import DeepForcing, DeepForcingSettings
from lrag_ray.context.dummy_forcing import DummyForcing, DummyForcingSettings
from lrag_ray.context.ema_sink import EmaSink, EmaSinkSettings
from lrag_ray.context.forcing_kv import ForcingKv, ForcingKvSettings
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.memflow import MemFlow, MemFlowSettings
from lrag_ray.context.memrope import MemRope, MemRopeSettings
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.rag import ENCODER_PARAMETERS, Rag, RagSettings
from lrag_ray.context.registry import policy_class, registered
from lrag_ray.context.rolling_sink import RollingSink, RollingSinkSettings
from lrag_ray.context.trace import TraceRow
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.wan.config import SamplerConfig
from tests.tiny import LATENT, SAMPLER, generate, start, tiny_transformer

POOLED = RagSettings(descriptor="avg_pool")
CASES: list[tuple[type[ContextPolicy[Any]], Any]] = [
    (Base, BaseSettings()),
    (Base, BaseSettings(window=7, sink=0)),
    (Base, BaseSettings(window=-1, sink=2)),
    (InfinityRope, BaseSettings(window=10, sink=5)),
    (Rag, POOLED),
    (Rag, RagSettings(window=10, sink=0, top_k=4, recent_exclude=0, descriptor="avg_pool", admission="local")),
    (Rag, RagSettings(descriptor="avg_pool", choose="random", recent_exclude=1)),
    (Rag, RagSettings(window=8, top_k=5, recent_exclude=1, descriptor="avg_pool")),
    (DeepForcing, DeepForcingSettings()),
    (DeepForcing, DeepForcingSettings(recent=8, budget=11)),
    (DeepForcing, DeepForcingSettings(window=9, sink=2, compression=False)),
    (DeepForcing, DeepForcingSettings(window=11, sink=1, budget=8, first_sink_offset="released")),
    (RollingSink, RollingSinkSettings(window=9)),
    (EmaSink, EmaSinkSettings(window=9, sink=3, alpha=0.9)),
    (MemRope, MemRopeSettings()),
    (MemRope, MemRopeSettings(window=10, sink=2, adaptive=True, first_overflow="released")),
    (MemFlow, MemFlowSettings(record_interval=1)),
    (MemFlow, MemFlowSettings(window=7, sink=3, bank=2, record_interval=2)),
    (DummyForcing, DummyForcingSettings(local_blocks=1, num_dummy=1)),
    (DummyForcing, DummyForcingSettings(ar_start=3)),
    (ForcingKv, ForcingKvSettings(patches_per_frame=6)),
    (ForcingKv, ForcingKvSettings(2, 2, 1, 2, 2, 3, 0.67, static_heads=((0,), (1,)))),
    (ForcingKv, ForcingKvSettings(1, 0, 5, 4, compress=False, static_heads=((), (0, 1)))),
]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_transformer()


def frames(trace: list[TraceRow]) -> list[tuple[str, int, int]]:
    return [(row.kind, row.frame, row.temporal_index) for row in trace]


def attended(
    model: Any, policy: type[ContextPolicy[Any]], settings: Any, blocks: int
) -> list[list[tuple[str, int, int]]]:
    return [frames(result.trace[0]) for result in start(model, policy, settings).blocks(blocks)]


def test_base_keeps_absolute_indices(model: Any) -> None:
    block8 = attended(model, Base, BaseSettings(), 9)[8]
    assert block8 == [
        ("sink", 0, 0),
        *[("local", frame, frame) for frame in range(16, 24)],
        *[("current", frame, frame) for frame in range(24, 27)],
    ]


def test_infinity_rope_keeps_the_same_frames_at_slot_indices(model: Any) -> None:
    base = attended(model, Base, BaseSettings(), 9)
    relative = attended(model, InfinityRope, BaseSettings(), 9)
    for absolute_rows, relative_rows in zip(base, relative, strict=True):
        assert [row[:2] for row in absolute_rows] == [row[:2] for row in relative_rows]
        assert [row[2] for row in relative_rows] == list(range(len(relative_rows)))


def test_base_and_infinity_rope_part_when_the_window_is_full(model: Any) -> None:
    """Blocks 0 to 3 at window 12 are equal; from block 4 on the sink's distance differs."""
    base, relative = generate(start(model, Base), 6), generate(start(model, InfinityRope), 6)
    assert torch.equal(base[:, :12], relative[:, :12])
    assert (base[:, 12:15] - relative[:, 12:15]).abs().max() > 1e-3


def test_a_local_part_narrower_than_a_block_hides_the_block_s_oldest_frames(model: Any) -> None:
    blocks = attended(model, Rag, RagSettings(window=8, top_k=5, recent_exclude=0, descriptor="avg_pool"), 5)
    assert blocks[0] == [("current", frame, frame) for frame in range(3)], "the sink is part of the first block"
    assert blocks[2] == [("sink", 0, 0), ("current", 7, 6), ("current", 8, 7)]
    assert [row[0] for row in blocks[4]] == ["sink", *["retrieved"] * 4, "current", "current"]


def test_rag_without_memory_is_infinity_rope(model: Any) -> None:
    rag = generate(start(model, Rag, RagSettings(top_k=0, descriptor="avg_pool")), 7)
    assert torch.equal(rag, generate(start(model, InfinityRope), 7))


def test_rag_with_all_frames_retrieves_nothing_and_is_base_with_all_frames(model: Any) -> None:
    rag = generate(start(model, Rag, RagSettings(window=-1, descriptor="avg_pool")), 6)
    assert torch.equal(rag, generate(start(model, Base, BaseSettings(window=-1)), 6))


@pytest.mark.parametrize("admission", ["cache", "local"])
@pytest.mark.parametrize(
    ("window", "sink", "top_k", "exclude", "n"), [(12, 1, 6, 5, 3), (10, 2, 3, 1, 3), (7, 0, 2, 0, 2)]
)
def test_rag_layout_follows_the_formula(
    model: Any, window: int, sink: int, top_k: int, exclude: int, n: int, admission: Any
) -> None:
    """The golden README's formula of cache, budget and eligibility, computed here frame by frame."""
    settings = RagSettings(window, sink, top_k, exclude, descriptor="avg_pool", admission=admission)
    sampler = SamplerConfig(denoising_steps=(1000,), frames_per_block=n)
    rollout = start(model, Rag, settings, sampler=sampler)
    for result in rollout.blocks(12):
        s = result.first_frame
        end = s + n
        length = min(end, window)
        slot_frame = {j: j if j < sink else end - length + j for j in range(length)}
        budget = window - sink - top_k
        history = list(range(sink, s - window + sink)) if admission == "cache" else list(range(sink, s - (budget - n)))
        eligible = history[: max(0, len(history) - exclude)]
        rows = frames(result.trace[0])
        retrieved = [row for row in rows if row[0] == "retrieved"]
        assert len(retrieved) == min(top_k, len(eligible))
        assert {frame for _, frame, _ in retrieved} <= set(eligible)
        assert all(index == 0 for _, _, index in retrieved)
        exposed = [j for j in range(length) if j < sink or j >= max(sink, length - budget)]
        assert [(f, i) for kind, f, i in rows if kind != "retrieved"] == [(slot_frame[j], j) for j in exposed]
        similarities = [row.similarity for row in result.trace[0] if row.similarity is not None]
        assert len(similarities) == len(retrieved)
        assert similarities == sorted(similarities, reverse=True)


def test_rag_takes_the_most_similar_frames(model: Any) -> None:
    """Selections equal a brute-force ranking of the pooled latents in float64."""
    results = list(start(model, Rag, POOLED).blocks(12))
    pooled = torch.cat([r.latents for r in results], dim=1)[0].double().mean(dim=(-2, -1))
    for result in results:
        s = result.first_frame
        eligible = max(0, s - 12 - 5)
        ranking = torch.nn.functional.cosine_similarity(pooled[1 : 1 + eligible], pooled[s - 1][None], dim=-1)
        best = (ranking.argsort(descending=True)[:6] + 1).tolist() if eligible else []
        assert [row.frame for row in result.trace[0] if row.kind == "retrieved"] == best


@pytest.mark.parametrize("choose", ["random", "oldest", "uniform"])
def test_rag_controls_choose_under_the_same_rules(model: Any, choose: Any) -> None:
    settings = RagSettings(descriptor="avg_pool", choose=choose)
    rollout = start(model, Rag, settings)
    for result in rollout.blocks(14):
        eligible = max(0, result.first_frame - 12 - 5)
        chosen = [row.frame for row in result.trace[0] if row.kind == "retrieved"]
        assert len(set(chosen)) == len(chosen) == min(6, eligible)
        assert all(1 <= frame < 1 + eligible for frame in chosen)
        if choose == "oldest":
            assert chosen == list(range(1, 1 + len(chosen)))
        if choose == "uniform" and chosen:
            before, after = chosen[0] - 1, eligible - chosen[-1]
            gaps = {second - first for first, second in pairwise(chosen)}
            assert abs(before - after) <= 1 and max(gaps, default=1) - min(gaps, default=1) <= 1


def test_random_choice_depends_on_the_rollout_alone(model: Any) -> None:
    settings = RagSettings(descriptor="avg_pool", choose="random", recent_exclude=0)
    first = attended(model, Rag, settings, 14)
    assert first == attended(model, Rag, settings, 14)
    other = start(model, Rag, settings, seed=1)
    assert first != [frames(result.trace[0]) for result in other.blocks(14)]


@pytest.mark.parametrize(("policy", "settings"), CASES)
def test_shorter_rollouts_are_prefixes(model: Any, policy: type[ContextPolicy[Any]], settings: Any) -> None:
    """What `horizon_free` promises: nothing of a block depends on how long the rollout will be."""
    assert policy.horizon_free
    short, long = list(start(model, policy, settings).blocks(5)), list(start(model, policy, settings).blocks(9))
    for a, b in zip(short, long, strict=False):
        assert torch.equal(a.latents, b.latents)
        assert a.trace == b.trace


@pytest.mark.parametrize(("policy", "settings"), CASES)
@pytest.mark.parametrize("kept", [1, 6, 9])
def test_replay_continues_bit_identically(
    model: Any, policy: type[ContextPolicy[Any]], settings: Any, kept: int
) -> None:
    whole = list(start(model, policy, settings).blocks(11))
    resumed = start(model, policy, settings)
    latents = torch.cat([result.latents for result in whole[:kept]], dim=1)
    resumed.replay(latents, [result.state for result in whole[:kept]])
    assert resumed.block == kept
    for a, b in zip(whole[kept:], resumed.blocks(11 - kept), strict=True):
        assert torch.equal(a.latents, b.latents)
        assert a.trace == b.trace


@pytest.mark.parametrize(("policy", "settings"), CASES)
def test_batch_elements_are_independent(model: Any, policy: type[ContextPolicy[Any]], settings: Any) -> None:
    prompts = ("a red fox", "an empty street at night")
    together = generate(start(model, policy, settings, prompts=prompts), 9)
    for i, prompt in enumerate(prompts):
        alone = generate(start(model, policy, settings, prompts=(prompt,)), 9)
        assert torch.allclose(together[i : i + 1], alone, atol=2e-5)


@pytest.mark.parametrize(("policy", "settings"), CASES)
def test_a_row_does_not_depend_on_what_is_beside_it(
    model: Any, policy: type[ContextPolicy[Any]], settings: Any
) -> None:
    """Bit for bit: another prompt, or the row's own repeated."""
    fox, street = "a red fox", "an empty street at night"

    def rows(*prompts: str) -> Tensor:
        return generate(start(model, policy, settings, prompts=prompts), 9)

    together = rows(fox, street)
    assert torch.equal(together[0], rows(fox, fox)[0])
    assert torch.equal(together[1], rows("a bear that fishes", street)[1])
    assert not torch.equal(*together)


class _Watch:
    def __init__(self) -> None:
        self.rows: dict[tuple[int, int, int, Any], tuple[Tensor, Tensor]] = {}

    def on_pass(self, block: int, step: int, flow: Tensor, x0: Tensor) -> None: ...

    def on_attention(self, block: int, step: int, layer: int, q: Tensor, k: Tensor, v: Tensor, heads: Any) -> None:
        self.rows[block, step, layer, heads] = k.clone(), v.clone()


@pytest.mark.parametrize(("policy", "settings"), CASES)
def test_passes_of_a_block_share_their_context_rows(
    model: Any, policy: type[ContextPolicy[Any]], settings: Any
) -> None:
    """Only the current rows change between the passes of a block."""
    watch = _Watch()
    generate(start(model, policy, settings, probe=watch), 8)
    current = SAMPLER.frames_per_block * (LATENT[1] // 2) * (LATENT[2] // 2)
    for (block, step, layer, heads), (k, v) in watch.rows.items():
        first_k, first_v = watch.rows[block, 0, layer, heads]
        assert torch.equal(k[:, :-current], first_k[:, :-current])
        assert torch.equal(v[:, :-current], first_v[:, :-current])
        if step > 0:
            assert not torch.equal(k[:, -current:], first_k[:, -current:])


def test_hooks_that_are_not_asked_for_are_not_called(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("observe_queries was called")

    monkeypatch.setattr(Base, "observe_queries", fail)
    generate(start(model, Base), 2)


def test_deep_forcing_keeps_its_budget_and_reuse_limit(model: Any) -> None:
    settings = DeepForcingSettings(max_reuse=2)
    tokens = (LATENT[1] // 2) * (LATENT[2] // 2)
    reused: dict[int, int] = {}
    for result in start(model, DeepForcing, settings).blocks(12):
        rows = [row for row in result.trace[0] if row.layer == 0]
        assert sum(row.tokens for row in rows) <= 12 * tokens
        for row in rows:
            if row.kind == "compressed":
                reused[row.frame] = reused.get(row.frame, 0) + 1
    assert reused
    assert max(reused.values()) <= 2


class _Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 16, generator=torch.Generator().manual_seed(0)))

    def encode(self, x: Tensor) -> Tensor:
        return x.mean(dim=(-2, -1)) @ self.weight.T


def test_descriptor_ae_asks_for_its_encoder(model: Any) -> None:
    (file,) = Rag.weight_files(RagSettings())
    assert (file.key, file.used, file.address(RagSettings(encoder="e.pt"))) == ("encoder", True, "e.pt")
    assert not any(Rag.weight_files(settings)[0].used for settings in (POOLED, RagSettings(top_k=0)))
    with pytest.raises(ValueError, match=r"weights\['encoder'\] are not given .* needs the checkpoint of a retrieval"):
        start(model, Rag, RagSettings())
    encoder = _Encoder()
    rounded = RagSettings(descriptor_dtype="bfloat16")
    assert generate(start(model, Rag, rounded, weights={"encoder": encoder}), 8).isfinite().all()
    assert encoder.weight.dtype == torch.float32, "the caller's encoder must not be changed"


@pytest.mark.parametrize(
    ("policy", "settings", "n", "message"),
    [
        (Rag, RagSettings(window=9, admission="local"), 3, "window 9 leaves 2 latent frames .* at least 10"),
        (Rag, RagSettings(window=3), 3, "window 3 leaves 2 latent frames .* at least 4"),
        (Rag, RagSettings(window=6, sink=0), 3, "window 6 without a sink leaves nothing to attend to"),
        (Base, BaseSettings(window=3, sink=1), 3, "window 3 leaves 2 latent frames"),
        (DeepForcing, DeepForcingSettings(recent=2), 3, "recent 2 must be at least a block's 3"),
    ],
)
def test_settings_that_leave_no_room_are_refused(
    model: Any, policy: type[ContextPolicy[Any]], settings: Any, n: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        start(model, policy, settings, sampler=SamplerConfig(frames_per_block=n))


@pytest.mark.parametrize(
    "build",
    [
        lambda: BaseSettings(window=0),
        lambda: BaseSettings(sink=-1),
        lambda: RagSettings(top_k=-1),
        lambda: RagSettings(recent_exclude=-1),
        lambda: DeepForcingSettings(sink=9, recent=4),
        lambda: DeepForcingSettings(max_reuse=0),
    ],
)
def test_impossible_settings_are_refused(build: Any) -> None:
    with pytest.raises(ValueError, match=r"must|exceed"):
        build()


def test_absolute_methods_end_at_the_released_table(model: Any) -> None:
    with pytest.raises(ValueError, match=r"1026 latent frames: .* ends at 1024"):
        next(start(model, Base).blocks(342))


def test_history_frames_counts_what_the_bank_holds(model: Any) -> None:
    for settings in (POOLED, RagSettings(descriptor="avg_pool", admission="local")):
        rollout = start(model, Rag, settings)
        generate(rollout, 11)
        policy = rollout.context.policies[0]
        assert isinstance(policy, Rag)
        tokens = (LATENT[1] // 2) * (LATENT[2] // 2)
        per_frame = 2 * 2 * tokens * 24 * 4
        # The bank takes frames in when a block begins: at the start of block 10 it holds what block 10 dropped.
        held = policy.bank.nbytes() // per_frame
        expected = Rag.history_frames(settings, 3, 33 if settings.admission == "cache" else 30)
        assert held == expected


def test_rag_holds_retrieved_frames_and_its_encoder_on_the_device() -> None:
    with torch.device("meta"):
        encoder = LatentAutoencoder(EncoderConfig())
    assert sum(p.numel() for p in encoder.parameters()) == ENCODER_PARAMETERS
    assert Rag.device_bytes(RagSettings(), 3, 480, 287_539_200) == 12 * 287_539_200 + 4 * ENCODER_PARAMETERS
    assert Rag.device_bytes(POOLED, 3, 480, 287_539_200) == 12 * 287_539_200
    assert Base.device_bytes(BaseSettings(), 3, 480, 287_539_200) == 0


@pytest.mark.parametrize(("policy", "settings"), CASES)
def test_exposing_and_storing_begin_once_before_the_first_layer(
    model: Any, policy: type[ContextPolicy[Any]], settings: Any
) -> None:
    """Given two layers and three passes a block, the hooks of a block come in the order of `ContextPolicy`."""
    heard: list[str] = []

    class Heard(policy):  # type: ignore[valid-type, misc]
        pass

    def listen(name: str) -> None:
        def hook(self: Any, *given: Any) -> Any:
            heard.append(" ".join([name, *(str(value) for value in given if isinstance(value, int))]))
            return getattr(policy, name)(self, *given)

        setattr(Heard, name, hook)

    for name in ("begin_block", "begin_expose", "expose", "end_expose", "on_latents", "begin_store", "store"):
        listen(name)
    listen("end_block")
    rollout = start(model, Heard, settings)
    whole = generate(rollout, 2)
    exposing = ["begin_expose", "expose 0", "expose 1", "end_expose"]
    storing = ["on_latents", "begin_store", "store 0", "store 1", "end_block"]
    assert heard == ["begin_block 0", *exposing, *storing, "begin_block 1", *exposing, *storing]

    heard.clear()
    start(model, Heard, settings).replay(whole[:, :3])
    layers = ["begin_expose", "expose 0", "begin_store", "store 0", "expose 1", "end_expose", "store 1"]
    assert heard == ["begin_block 0", "on_latents", *layers, "end_block"]


def test_registry_names_the_nearest_method() -> None:
    assert {"base", "infinity_rope", "deep_forcing", "rag", "memrope", "rolling_sink"} <= set(registered())
    assert policy_class("lrag_ray.context.rag:Rag") is Rag
    with pytest.raises(ValueError, match="did you mean 'deep_forcing'"):
        policy_class("deep_forsing")
    with pytest.raises(ValueError, match="cannot import 'no_such_module'"):
        policy_class("no_such_module:Policy")
    with pytest.raises(ValueError, match="has no 'Nope'"):
        policy_class("lrag_ray.context.rag:Nope")
    with pytest.raises(ValueError, match=r"is not a lrag_ray\.context"):
        policy_class("lrag_ray.context.rag:RagSettings")
