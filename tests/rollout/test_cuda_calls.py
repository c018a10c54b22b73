"""What a rollout asks of a CUDA device, seen without one: no wait in a block, no race, replay in the same calls."""

from __future__ import annotations

import gc
import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lrag_ray.context.base import Base, BaseSettings
from lrag_ray.context.deep_forcing import DeepForcing, DeepForcingSettings
from lrag_ray.context.dummy_forcing import DummyForcing, DummyForcingSettings
from lrag_ray.context.ema_sink import EmaSink, EmaSinkSettings
from lrag_ray.context.forcing_kv import ForcingKv, ForcingKvSettings
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.memflow import MemFlow, MemFlowSettings
from lrag_ray.context.memrope import MemRope, MemRopeSettings
from lrag_ray.context.policy import ContextPolicy, Span, bank_of, host_bank
from lrag_ray.context.rag import Rag, RagSettings
from lrag_ray.context.rolling_forcing import RollingForcing, RollingForcingSettings
from lrag_ray.context.rolling_sink import RollingSink, RollingSinkSettings
from lrag_ray.context.window import KVWindow
from lrag_ray.retrieval import history
from lrag_ray.retrieval.bank_types import BankType
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.history import TieredBank, Tiers
from lrag_ray.retrieval.payload import FrameShape, make_payload
from lrag_ray.retrieval.slabs import SlabPool
from lrag_ray.wan import fused_rows, residual_norm
from lrag_ray.wan.attention import backend_of
from lrag_ray.wan.devices import generator_kind
from lrag_ray.wan.kernels import AttentionChoice, Kernels
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.streams import side_stream
from tests.pretend_cuda import Device, Stream, pretend_cuda
from tests.tiny import LATENT, gathered, start, tiny_layout, tiny_transformer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device: see test_gpu.py")

CUDA = torch.device("cuda", 0)
FRAME_BYTES = 2 * 2 * 6 * 24 * 4
SMALL_RAG = RagSettings(window=8, top_k=2, recent_exclude=1, descriptor="avg_pool")
APART = ForcingKvSettings(1, 1, 2, 1, 1, 6, 0.33, static_heads=((0,), (1,)))
METHODS = [
    (Base, BaseSettings(window=6)),
    (InfinityRope, BaseSettings(window=-1)),
    (DeepForcing, DeepForcingSettings(window=8, budget=8)),
    (RollingSink, RollingSinkSettings(window=6)),
    (EmaSink, EmaSinkSettings(window=6, sink=2)),
    (MemRope, MemRopeSettings(window=8, adaptive=True)),
    (MemFlow, MemFlowSettings(window=6, bank=2, record_interval=1)),
    (DummyForcing, DummyForcingSettings(local_blocks=1, num_dummy=1)),
    (ForcingKv, ForcingKvSettings(static_frames=2, dynamic_frames=1, patches_per_frame=6)),
    (ForcingKv, APART),
    (Rag, SMALL_RAG),
    (Rag, replace(SMALL_RAG, admission="local")),
    (RollingForcing, RollingForcingSettings(window=9)),
]


@pytest.fixture
def device() -> Iterator[Device]:
    with pretend_cuda() as made:
        yield made


@pytest.mark.parametrize(("policy", "settings"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_rollout_and_replay(policy: type[ContextPolicy[Any]], settings: object, device: Device) -> None:
    model = tiny_transformer().to("cuda")
    rollout = start(model, policy, settings, total_blocks=9)
    done = list(rollout.blocks(5))
    device.waits.clear()
    device.calls.clear()
    more = list(rollout.blocks(2))
    calls = list(device.calls)
    assert device.waits == []

    again = start(model, policy, settings, total_blocks=9)
    for result in done:
        again.replay(result.latents.cpu(), [result.state])
    device.calls.clear()
    for found, expected in zip(again.blocks(2), more, strict=True):
        assert torch.equal(found.latents.cpu(), expected.latents.cpu())
    assert _kernels(device.calls) == _kernels(calls)
    gc.collect()
    assert device.races == []


def _kernels(calls: list[tuple[object, ...]]) -> list[tuple[object, ...]]:
    """Where the choice of a kernel may change the bits: products and attention."""
    return [call for call in calls if call[0] in ("attention", "aten.addmm.default", "aten.convolution.default")]


def test_a_pass_launches_few_kernels(device: Device) -> None:
    """Each reads and writes all rows again, and a small one takes a GPU less time than the host to ask for."""
    rollout = start(tiny_transformer().to("cuda"), InfinityRope)
    list(rollout.blocks(2))
    device.calls.clear()
    list(rollout.blocks(1))
    passes, layers = 3, 2
    assert len(device.calls) / passes / layers < 45
    assert sum(map(_values, device.calls)) / passes / layers < 36_000


@pytest.mark.parametrize(
    ("dtype", "heads", "choice", "chosen"),
    [
        (torch.bfloat16, 1, "auto", "flash"),
        (torch.float32, 1, "auto", "efficient"),
        (torch.bfloat16, 2, "auto", "math"),
        (torch.bfloat16, 1, "cudnn", "cudnn"),
    ],
)
def test_the_kernel_of_attention_follows_from_precision_and_head_size(
    dtype: torch.dtype, heads: int, choice: AttentionChoice, chosen: str, device: Device
) -> None:
    """Given heads of 24 or 12 channels; flash and cuDNN need a multiple of 8."""
    assert backend_of(choice, CUDA, dtype, 24 // heads) == chosen
    model = tiny_transformer(Kernels(choice), num_heads=heads)
    list(start(model.to("cuda", dtype), InfinityRope).blocks(2))
    assert {kernel for kernel, _, _ in device.attended} == ({chosen} if chosen != "math" else set())


@pytest.mark.parametrize(
    ("policy", "settings", "ragged"),
    [
        (InfinityRope, BaseSettings(window=8), False),
        (Rag, SMALL_RAG, False),
        (DeepForcing, DeepForcingSettings(window=8, budget=8), False),
        (Base, BaseSettings(window=-1), True),
        (ForcingKv, APART, True),
    ],
)
def test_cudnn_compiles_for_few_shapes(
    policy: type[ContextPolicy[Any]], settings: object, ragged: bool, device: Device
) -> None:
    """Contexts that grow for ever, and groups of heads, go to flash beside it; the first blocks fill the window."""
    model = tiny_transformer(Kernels("cudnn"), dim=48).to("cuda", torch.bfloat16)
    rollout = start(model, policy, settings)
    list(rollout.blocks(7))
    first = {each for each in device.attended if each[0] == "cudnn"}
    device.attended.clear()
    list(rollout.blocks(3))
    assert {each for each in device.attended if each[0] == "cudnn"} <= first
    assert ("flash" in {kernel for kernel, _, _ in device.attended}) == ragged


def test_norm_rotation_and_write_are_one_launch(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever all heads attend to alike rows; where they do not, the plain operations do it."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda of: "H100")
    launched, kinds = {}, {}
    for on in (True, False):
        kernels = Kernels(fused_rows=on)
        kinds[on] = generator_kind(kernels, CUDA, torch.float32, 12)
        for policy, settings in ((InfinityRope, None), (ForcingKv, APART)):
            rollout = start(tiny_transformer(kernels).to("cuda"), policy, settings)
            list(rollout.blocks(4))
            device.calls.clear()
            list(rollout.blocks(1))
            fused = sum(call[0] == "fused rows" for call in device.calls)
            launched[on, policy] = (fused, len(device.calls))
    assert kinds[True] == f"{kinds[False]}, fused rows {fused_rows.VERSION}"
    # Two passes over two layers, and the first layer of the clean-context pass.
    assert launched[True, InfinityRope][0] == 2 * 2 + 1
    assert launched[False, InfinityRope][0] == launched[False, ForcingKv][0] == 0
    # Two norms with their scales, a rotation and a write take the place of one launch.
    assert launched[False, InfinityRope][1] - launched[True, InfinityRope][1] == 6 * (2 * 2 + 1)
    assert launched[True, ForcingKv][0] == 2 + 1, "in the layer whose heads are alike"


def test_between_matrix_products_there_is_one_launch(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two norms with modulation, one with its own scale, two gates, three sums and GELU are 13 by plain operations."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda of: "H100")
    launched, kinds = [], []
    for on in (False, True):
        kernels = Kernels(fused_layers=on)
        kinds.append(generator_kind(kernels, CUDA, torch.float32, 12))
        rollout = start(tiny_transformer(kernels).to("cuda"), InfinityRope)
        device.calls.clear()
        list(rollout.blocks(1))
        launched.append(len(device.calls))
        steps = sum(call[0] == "residual norm" for call in device.calls)
        # Two passes over two layers, the first layer of the clean-context pass, and the first norm of its last layer.
        assert steps == on * (4 * (2 * 2 + 1) + 1)
    assert kinds[1] == f"{kinds[0]}, fused layers {residual_norm.VERSION}"
    assert launched[0] - launched[1] == (13 - 4) * (2 * 2 + 1) + 3 - 1


WINDOW_8 = BaseSettings(window=8)
BUDGETS: list[tuple[type[ContextPolicy[Any]], Any, BankType, str, int, int]] = [
    (Base, WINDOW_8, "exact", "host", 398, 341_000),
    (InfinityRope, WINDOW_8, "exact", "host", 390, 341_000),
    (DeepForcing, DeepForcingSettings(window=8, budget=8), "exact", "host", 682, 420_000),
    (Rag, SMALL_RAG, "exact", "host", 434, 378_000),
    (Rag, SMALL_RAG, "exact", "device", 428, 369_000),
    (Rag, SMALL_RAG, "exact", "disk", 434, 378_000),
    (Rag, SMALL_RAG, "int8", "host", 560, 381_000),
    (Rag, SMALL_RAG, "int4", "device", 678, 398_000),
    (Rag, SMALL_RAG, "int4", "disk", 684, 401_000),
]
"""Launches, and values read and written in place, of two blocks; a history by type and tier."""


def check_budget(
    policy: type[ContextPolicy[Any]], settings: Any, kind: BankType, tier: str, launches: int, values: int,
    device: Device, folder: Path,
) -> None:  # fmt: skip
    """Given a full window, two blocks wait for nothing, and what crosses the bus on the compute stream is small."""
    frame = make_payload(kind, FrameShape(2, 6, 2, 12), torch.float32).frame_bytes
    places = {"host": Tiers(), "device": Tiers(30 * frame), "disk": Tiers(host_bytes=3 * frame, disk=folder)}
    make_bank = bank_of(kind, replace(places[tier], expected_frames=30))
    rollout = start(tiny_transformer().to("cuda"), policy, settings, make_bank=make_bank)
    list(rollout.blocks(8))
    device.calls.clear()
    device.crossed.clear()
    device.waits.clear()
    list(rollout.blocks(2))
    assert not device.waits, "waits"
    noise = 2 * 2 * 3 * math.prod(LATENT) * 4
    on_compute = sum(nbytes for stream, nbytes in device.crossed if stream is device.stream)
    assert on_compute < noise + FRAME_BYTES / 2, "copies on the compute stream"
    found = len(device.calls), sum(map(_values, device.calls))
    assert found[0] <= launches, f"launches {found}"
    assert found[1] <= values, f"values {found}"


@pytest.mark.parametrize(("policy", "settings", "kind", "tier", "launches", "values"), BUDGETS)
def test_blocks_keep_to_their_budget(
    policy: type[ContextPolicy[Any]],
    settings: Any,
    kind: BankType,
    tier: str,
    launches: int,
    values: int,
    device: Device,
    tmp_path: Path,
) -> None:
    check_budget(policy, settings, kind, tier, launches, values, device, tmp_path)


def _copied(spans: Callable[..., list[Span]]) -> Callable[..., list[Span]]:
    return lambda *args: [Span(span.k, span.v.clone()) for span in spans(*args)]


def _asked(on_latents: Callable[..., None]) -> Callable[..., None]:
    def wait(self: Rag, latents: torch.Tensor) -> None:
        latents.sum().item()
        on_latents(self, latents)

    return wait


@pytest.mark.parametrize("spoilt", ["launches", "waits", "copies on the compute stream"])
def test_budgets_notice(spoilt: str, device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Given a clone of every exposed V, a value that is asked for, or a history on the compute stream."""
    if spoilt == "launches":
        monkeypatch.setattr(KVWindow, "spans", _copied(KVWindow.spans))
    elif spoilt == "waits":
        monkeypatch.setattr(Rag, "on_latents", _asked(Rag.on_latents))
    else:
        monkeypatch.setattr(history, "side_stream", lambda on, purpose: device.stream)
    budget = next(each for each in BUDGETS if each[0] is Rag)
    with pytest.raises(AssertionError, match=spoilt):
        check_budget(*budget, device, tmp_path)


def test_heads_are_gathered_only_where_they_differ(device: Device) -> None:
    """Given a method whose heads attend alike, nothing of a pass is picked by head."""
    for policy, settings in ((Base, BaseSettings(window=6)), (ForcingKv, APART)):
        rollout = start(tiny_transformer().to("cuda"), policy, settings)
        list(rollout.blocks(4))
        device.calls.clear()
        list(rollout.blocks(1))
        gathered = sum(call[0] == "aten.index_copy_.default" for call in device.calls)
        # Nobody attends in the last layer of a clean-context pass.
        layers_of_groups, groups, passes = 1, 2, 2
        assert gathered == (layers_of_groups * groups * passes if policy is ForcingKv else 0)


def test_retrieval_adds_one_span_per_layer_to_what_is_launched(device: Device) -> None:
    """Not one per retrieved frame: [sink | retrieved | local] is one span more than [sink | local]."""
    launched = []
    for policy, settings in ((InfinityRope, BaseSettings(window=8)), (Rag, SMALL_RAG)):
        rollout = start(tiny_transformer().to("cuda"), policy, settings)
        list(rollout.blocks(6))
        device.calls.clear()
        list(rollout.blocks(1))
        launched.append(sum(call[0] not in ("copy", "cast") for call in device.calls))
    # Beside the span, the retrieved frames are put together once.
    layers, once = 2, 12
    assert launched[1] - launched[0] <= 2 * layers + once


def test_history_crosses_the_bus_beside_the_compute_stream(device: Device) -> None:
    rollout = start(tiny_transformer().to("cuda"), Rag, SMALL_RAG)
    list(rollout.blocks(6))
    device.crossed.clear()
    list(rollout.blocks(2))
    crossed: dict[object, int] = defaultdict(int)
    for stream, nbytes in device.crossed:
        crossed[stream] += nbytes
    assert crossed[side_stream(CUDA, "to host")] == 2 * 3 * FRAME_BYTES
    # At most two frames per block, and only those that are not there yet.
    fetched = crossed[side_stream(CUDA, "to device")]
    assert fetched in (FRAME_BYTES, 2 * FRAME_BYTES, 3 * FRAME_BYTES)
    # The noise of two blocks, two passes each, and similarities.
    assert crossed[device.stream] < 2 * 2 * 3 * math.prod(LATENT) * 4 + 200


@pytest.mark.parametrize("kind", ["exact", "int8", "int4_hadamard"])
def test_tiers_change_no_bit_wait_for_nothing_and_race_with_nothing(
    kind: BankType, device: Device, tmp_path: Path
) -> None:
    model = tiny_transformer().to("cuda")
    expected = list(start(model, Rag, SMALL_RAG, make_bank=bank_of(kind)).blocks(10))
    shape = FrameShape(2, 6, 2, 12)
    frame = make_payload(kind, shape, torch.float32).frame_bytes
    tiers = Tiers(device_bytes=5 * frame, host_bytes=6 * frame, disk=tmp_path, expected_frames=20)
    rollout = start(model, Rag, SMALL_RAG, make_bank=bank_of(kind, tiers))
    (bank,) = rollout._banks
    assert isinstance(bank, TieredBank)
    device.waits.clear()
    blocks = rollout.blocks(10)
    for result in expected:
        device.crossed.clear()
        before = bank.usage()
        found = next(blocks)
        assert torch.equal(found.latents.held, result.latents.held)  # type: ignore[attr-defined]
        after = bank.usage()
        side: object = side_stream(CUDA, "to device")
        to_device = sum(nbytes for stream, nbytes in device.crossed if stream is side)
        assert to_device == after.to_device_bytes - before.to_device_bytes
        # Each retrieved frame crosses whole, or not at all; what the device keeps does not.
        assert to_device <= (after.fetched - before.fetched) * frame
    assert device.waits == []
    usage = bank.usage()
    assert usage.device_frames == 5
    assert usage.disk_frames > 0
    assert usage.cached > 0
    assert usage.to_host_bytes == (usage.host_frames + usage.disk_frames) * frame

    again = start(model, Rag, SMALL_RAG, make_bank=bank_of(kind, tiers))
    for result in expected[:8]:
        again.replay(result.latents.cpu(), [result.state])
    for result, found in zip(expected[8:], again.blocks(2), strict=True):
        assert torch.equal(found.latents.cpu(), result.latents.cpu())
    del rollout, blocks, bank, again
    gc.collect()
    assert device.races == []


def test_layers_arrive_in_order_and_are_awaited_one_by_one(device: Device) -> None:
    """A reader of the first layer does not wait for the copies of the others."""
    bank = host_bank(tiny_layout("cuda"))
    bank.append(0, torch.ones(2, 2, 6, 2, 12, device="cuda"))
    bank.prefetch([0])
    side: Any = side_stream(CUDA, "to device")
    found = bank.gather([0])
    known = []
    for layer in range(2):
        found.layer(layer)
        known.append(device.stream.done[side])
    assert known[0] < known[1] == side.done[side]


def test_what_does_not_fit_page_locked_is_reported(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = SlabPool(_refuse)
    monkeypatch.setattr(history, "PAGE_LOCKED", pool)
    bank = host_bank(tiny_layout("cuda"))
    bank.append(0, torch.ones(2, 2, 6, 2, 12, device="cuda"))
    assert float(gathered(bank, [0]).sum()) == 2 * 2 * 6 * 2 * 12
    (note,) = bank.notes()
    assert "1 slabs of history could not be page-locked (CUDA error 2)" in note
    del bank
    gc.collect()
    assert device.races == []


def _refuse(slab: torch.Tensor) -> None:
    raise MemoryError("CUDA error 2")


def test_frames_are_described_in_float32_without_rounded_convolutions(device: Device) -> None:
    encoder = LatentAutoencoder(EncoderConfig(*LATENT, 24, (8, 16)))
    fill_random(encoder, seed=4)
    weights = {"encoder": encoder.requires_grad_(False).to("cuda")}
    rollout = start(
        tiny_transformer().to("cuda"), Rag, RagSettings(encoder="given", window=8, top_k=2), weights=weights
    )
    device.calls.clear()
    list(rollout.blocks(1))
    passes = 3
    assert [call[0] for call in device.calls].count("aten.convolution.default") == passes
    products = [call for call in device.calls if call[0] == "aten.addmm.default"]
    assert {tensor[2] for call in products for tensor in call[1:]} == {torch.float32}


def test_the_next_rollout_uses_the_streams_of_the_last(device: Device) -> None:
    streams = set()
    for _ in range(2):
        rollout = start(tiny_transformer().to("cuda"), Rag, SMALL_RAG)
        list(rollout.blocks(5))
        streams |= {stream for stream, _ in device.crossed}
    assert len(streams) == 3


def _values(call: tuple[object, ...]) -> int:
    """Values that a kernel gets and returns in place."""
    return sum(math.prod(shape) for shape, *_ in call[1:])  # type: ignore[misc, has-type]


@pytest.mark.parametrize("forgotten", ["wait_event", "record_stream"])
def test_the_device_sees_what_the_bank_must_not_forget(
    forgotten: str, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = Stream if forgotten == "wait_event" else torch.Tensor
    monkeypatch.setattr(of, forgotten, lambda self, other: None)
    bank = host_bank(tiny_layout("cuda"))
    for frame in range(3):
        bank.append(frame, torch.zeros(2, 2, 6, 2, 12, device="cuda"))
    bank.prefetch([0, 1])
    assert float(gathered(bank, [0, 1]).sum()) == 0
    gc.collect()
    assert device.races


def test_the_device_knows_its_tensors_from_those_of_the_host(device: Device) -> None:
    x = torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match="of the device and of the host"):
        x + torch.zeros(4)
    assert device.waits == []
    x.cpu()
    assert len(device.waits) == 1
