"""The VAE's decoder with norm and SiLU in one kernel: what a GPU is asked for, and going without.

The kernel's values are those of tests/wan/interpreted_rows.py, checked by tests/wan/test_fused_rows.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from lrag_ray.wan import norm_silu
from lrag_ray.wan.vae import WanVae, tiny_vae
from tests.pretend_cuda import pretend_cuda

CPU = torch.device("cpu")
NORMS = 2 * 10 + 1
"""Of the tiny decoder: two in each residual block, and the last one."""


def latents() -> Tensor:
    return torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(0))


def with_layout(device: str, dtype: torch.dtype, *, fused: bool) -> WanVae:
    vae = tiny_vae()
    nn.Module.to(vae.model, device, dtype)
    vae.keep_channels_last()
    if fused:
        vae.fuse_norms()
    return vae


@pytest.fixture
def forgetful() -> Iterator[None]:
    """What was found out about devices is forgotten before and behind the test."""
    norm_silu.refusal.cache_clear()
    yield
    norm_silu.refusal.cache_clear()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
@pytest.mark.parametrize(("dtype", "launches", "tolerance"), [(torch.float32, 7, 1e-5), (torch.bfloat16, 9, 0.05)])
def test_a_gpu_launches_one_kernel_for_norm_and_activation(dtype: torch.dtype, launches: int, tolerance: float) -> None:
    launched, pixels = [], []
    with pretend_cuda() as device:
        for fused in (False, True):
            vae = with_layout("cuda", dtype, fused=fused)
            device.calls.clear()
            pixels.append(vae.decode(latents()).cpu())
            launched.append(Counter(call[0] for call in device.calls))
    assert device.races == []
    plain, ours = launched
    assert (plain["norm and SiLU"], ours["norm and SiLU"]) == (0, 2 * NORMS)
    assert plain.total() - ours.total() == 2 * NORMS * (launches - 1)
    torch.testing.assert_close(pixels[1], pixels[0], rtol=0, atol=tolerance)
    assert not torch.equal(pixels[1], pixels[0]) or dtype == torch.float32


def test_a_device_without_triton_makes_the_same_bits_as_before_and_says_why() -> None:
    plain = with_layout("cpu", torch.float32, fused=False).decode(latents())
    assert torch.equal(with_layout("cpu", torch.float32, fused=True).decode(latents()), plain)
    assert norm_silu.notes(True, CPU) == ["plain operations in place of vae.fused_norm: it runs on GPUs alone"]
    assert norm_silu.notes(False, CPU) == []


def test_a_device_whose_kernel_does_not_compile_goes_without(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel was loaded for a GPU, and is given tensors of the CPU."""
    pytest.importorskip("triton")
    from lrag_ray.wan import norm_silu_kernel  # noqa: F401

    plain = with_layout("cpu", torch.float32, fused=False).decode(latents())
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (note,) = norm_silu.notes(True, CPU)
    assert note.startswith("plain operations in place of vae.fused_norm: ") and "GPUs alone" not in note
    assert torch.equal(with_layout("cpu", torch.float32, fused=True).decode(latents()), plain)


@pytest.mark.parametrize("wrong", [torch.float32, torch.float16])
def test_a_device_that_computes_something_else_is_found_out_in_each_precision(
    wrong: torch.dtype, forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fused(x: Tensor, gamma: Tensor, bias: Tensor | None) -> Tensor:
        made = torch.nn.functional.normalize(x, dim=1) * x.shape[1] ** 0.5 * gamma
        made = torch.nn.functional.silu(made if bias is None else made + bias)
        return made * 1.01 if x.dtype == wrong else made

    monkeypatch.setattr(norm_silu, "fused", fused)
    found = norm_silu.refusal(CPU)
    assert found is not None and found.startswith("it is ") and found.endswith(f"off in {wrong}".replace("torch.", ""))
