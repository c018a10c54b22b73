"""What a rollout asks of a CUDA device, seen without one: no wait in a block, no race, replay in the same calls."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator
from dataclasses import replace
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
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.rag import Rag, RagSettings
from lrag_ray.context.rolling_forcing import RollingForcing, RollingForcingSettings
from lrag_ray.context.rolling_sink import RollingSink, RollingSinkSettings
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.history import HostBank
from lrag_ray.wan.random_weights import fill_random
from lrag_ray.wan.streams import side_stream
from tests.pretend_cuda import Device, Stream, pretend_cuda
from tests.tiny import LATENT, start, tiny_transformer

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device: see test_gpu.py")

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
    layers, once = 2, 12
    assert launched[1] - launched[0] <= layers + once


def test_history_crosses_the_bus_beside_the_compute_stream(device: Device) -> None:
    rollout = start(tiny_transformer().to("cuda"), Rag, SMALL_RAG)
    list(rollout.blocks(6))
    device.crossed.clear()
    list(rollout.blocks(2))
    frame_bytes = 2 * 2 * 6 * 24 * 4
    large: list[object] = [stream for stream, nbytes in device.crossed if nbytes >= frame_bytes]
    assert large.count(side_stream(torch.device("cuda", 0), "to host")) == 2 * 3
    assert large.count(side_stream(torch.device("cuda", 0), "to device")) == 2 * 2
    # The noise of two blocks, two passes each.
    assert large.count(device.stream) == 2 * 2


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
    bank = HostBank(torch.device("cuda"))
    for frame in range(3):
        bank.append(frame, torch.zeros(2, 1024, device="cuda"))
    bank.prefetch([0, 1])
    assert [float(rows.sum()) for rows in bank.gather([0, 1])] == [0]
    gc.collect()
    assert device.races


def test_the_device_knows_its_tensors_from_those_of_the_host(device: Device) -> None:
    x = torch.zeros(4, device="cuda")
    with pytest.raises(RuntimeError, match="of the device and of the host"):
        x + torch.zeros(4)
    assert device.waits == []
    x.cpu()
    assert len(device.waits) == 1
