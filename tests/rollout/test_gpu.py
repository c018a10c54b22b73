"""On a CUDA device: the same rollouts as on the CPU, exact resume through the history bank, and no needless waiting."""

from __future__ import annotations

import copy
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from lrag_ray.context.base import Base
from lrag_ray.context.deep_forcing import DeepForcing, DeepForcingSettings
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.context.policy import ContextPolicy
from lrag_ray.context.rag import Rag, RagSettings
from lrag_ray.retrieval.encoder import EncoderConfig, LatentAutoencoder
from lrag_ray.retrieval.history import TieredBank
from lrag_ray.retrieval.payload import FrameShape, make_payload
from lrag_ray.retrieval.slabs import PAGE_LOCKED, SlabPool
from lrag_ray.wan.random_weights import fill_random
from tests.tiny import LATENT, gathered, generate, start, tiny_transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BLOCKS = 10
METHODS = [
    (Base, None),
    (InfinityRope, None),
    (DeepForcing, DeepForcingSettings()),
    (Rag, RagSettings(descriptor="avg_pool")),
    (Rag, RagSettings(descriptor="avg_pool", admission="local")),
]


@pytest.fixture(autouse=True)
def full_float32() -> Iterator[None]:
    """cuDNN rounds float32 convolutions to 10 bits unless told otherwise; the CPU does not."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


def tiny_encoder() -> LatentAutoencoder:
    encoder = LatentAutoencoder(EncoderConfig(LATENT[0], LATENT[1], LATENT[2], 24, (8, 16)))
    fill_random(encoder, seed=4)
    return encoder.eval().requires_grad_(False)


@pytest.mark.parametrize(("policy", "settings"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_rollout_is_that_of_the_cpu(policy: type[ContextPolicy[Any]], settings: object) -> None:
    expected = generate(start(tiny_transformer(), policy, settings), BLOCKS)
    found = generate(start(tiny_transformer().cuda(), policy, settings), BLOCKS)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("policy", "settings"), METHODS, ids=lambda value: getattr(value, "__name__", ""))
def test_a_replayed_rollout_goes_on_with_the_same_bits(policy: type[ContextPolicy[Any]], settings: object) -> None:
    model = tiny_transformer().cuda()
    results = list(start(model, policy, settings).blocks(BLOCKS))
    again = start(model, policy, settings)
    done = results[: BLOCKS - 3]
    again.replay(torch.cat([result.latents for result in done], dim=1), [result.state for result in done])
    for result, expected in zip(again.blocks(3), results[BLOCKS - 3 :], strict=True):
        assert torch.equal(result.latents, expected.latents)


# torch says that the mode below may miss waits; warnings are errors here.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("policy", [Base, InfinityRope, Rag])
def test_nothing_waits_for_the_device_inside_a_block(policy: type[ContextPolicy[Any]]) -> None:
    settings = RagSettings(descriptor="avg_pool") if policy is Rag else None
    rollout = start(tiny_transformer().cuda(), policy, settings)
    list(rollout.blocks(6))
    torch.cuda.set_sync_debug_mode("error")
    try:
        list(rollout.blocks(4))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_passes_are_timed_by_the_device() -> None:
    rollout = start(tiny_transformer().cuda(), Base)
    list(rollout.blocks(2))
    torch.cuda.synchronize()
    assert all(seconds > 0 for seconds in rollout.timings_s.values())


def test_a_frame_in_the_bank_is_what_it_was_when_it_was_appended() -> None:
    """Rows are overwritten right behind the append, and slabs are handed on, while the bus is still busy."""
    device = torch.device("cuda", torch.cuda.current_device())
    busy = torch.randn(2048, 2048, device=device)
    for seed in range(3):
        bank = TieredBank(device, make_payload("exact", FrameShape(4, 64, 12, 128), torch.bfloat16))
        rows = torch.empty(2, 4, 64, 12, 128, dtype=torch.bfloat16, device=device)
        for frame in range(12):
            for _ in range(8):
                busy = busy @ busy
                busy /= busy.norm()
            rows.fill_(100 * seed + frame)
            bank.append(frame, rows)
            bank.settle()
            rows.fill_(-1)
            wanted = [frame, frame // 2, 0]
            bank.prefetch(wanted[:2])
            for held, found in zip(wanted, gathered(bank, wanted, layers=4), strict=True):
                assert bool((found == 100 * seed + held).all())
        del bank
        gc.collect()


def test_the_next_bank_takes_the_slabs_of_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    make = SlabPool._made

    def counted(self: SlabPool, nbytes: int) -> torch.Tensor:
        made.append(nbytes)
        return make(self, nbytes)

    monkeypatch.setattr(SlabPool, "_made", counted)
    device = torch.device("cuda", torch.cuda.current_device())
    for _ in range(3):
        bank = TieredBank(device, make_payload("exact", FrameShape(1, 64, 1, 48), torch.bfloat16))
        bank.reserve(2)
        for frame in range(4):
            bank.append(frame, torch.zeros(2, 1, 64, 1, 48, dtype=torch.bfloat16, device=device))
        del bank
        gc.collect()
    assert made == [4096 * 3] * 4


def test_a_refused_page_lock_is_told_once_and_not_by_the_next_kernel() -> None:
    slab = PAGE_LOCKED.take(4096)
    lock = PAGE_LOCKED._lock
    assert lock is not None
    with pytest.raises(MemoryError, match="CUDA error"):
        lock(slab)  # locked already
    assert float(torch.ones(4, device="cuda").sum()) == 4
    PAGE_LOCKED.give_back([slab])


def test_descriptors_are_exact_although_convolutions_are_not() -> None:
    torch.backends.cudnn.allow_tf32 = True
    encoder = tiny_encoder()
    settings = RagSettings(encoder="given")
    expected = start(tiny_transformer(), Rag, settings, weights={"encoder": encoder})
    found = start(tiny_transformer().cuda(), Rag, settings, weights={"encoder": copy.deepcopy(encoder).cuda()})
    latents = torch.randn(3, *LATENT, generator=torch.Generator().manual_seed(1))
    for rollout, x in ((expected, latents), (found, latents.cuda())):
        (policy,) = rollout.context.policies
        assert isinstance(policy, Rag)
        policy.index.append(x)
    ours, theirs = (r.context.policies[0].index.descriptors().cpu() for r in (found, expected))  # type: ignore[attr-defined]
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
