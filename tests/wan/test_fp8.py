"""Matrix products of 8-bit floats: rounding, the layer, golden rollouts, and what a GPU is asked for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lrag_ray.conformance import recording, rollout
from lrag_ray.conformance.case import Sheet
from lrag_ray.conformance.files import Folder
from lrag_ray.context.infinity_rope import InfinityRope
from lrag_ray.wan import fp8
from lrag_ray.wan.kernels import Kernels
from tests.pretend_cuda import pretend_cuda
from tests.tiny import start, tiny_transformer


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_is_rounded_by_itself_and_to_three_bits(dtype: torch.dtype) -> None:
    x = drawn(4, 64).to(dtype)
    x[1] *= 1e4
    x[2] = 0
    found = fp8.rounded(x)
    assert torch.equal(found.values.float().abs().amax(-1), torch.tensor([448.0, 448, 0, 448]))
    exact, row_max = x.float(), x.float().abs().amax(-1, keepdim=True)
    # Half a step of 3 bits, and of the smallest step 2^-9 where values are small.
    assert ((found.exact() - exact).abs() <= exact.abs() / 16 + row_max / 448 / 1024 + 1e-30).all()
    alone = fp8.rounded(x[1:2])
    assert torch.equal(alone.values.view(torch.uint8), found.values[1:2].view(torch.uint8))


def test_the_layer_multiplies_what_the_rounded_values_stand_for() -> None:
    linear = nn.Linear(64, 32).requires_grad_(False)
    x = drawn(2, 5, 64)
    found = fp8.Fp8Linear(linear)(x)
    rows, weight = fp8.rounded(x.flatten(0, 1)), fp8.rounded(linear.weight)
    expected = rows.exact().double() @ weight.exact().double().t() + linear.bias
    torch.testing.assert_close(found.flatten(0, 1).double(), expected, rtol=1e-5, atol=1e-5)
    assert 0.01 < (found - linear(x)).abs().max() < 0.2, "it is not the exact product"


def test_a_golden_rollout_is_as_far_off_as_documented(golden: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Further than in bfloat16 (0.03 to 0.06), on latents of standard deviation 1.5."""
    load = recording.golden_transformer

    def rounded(*args: Any) -> Any:
        model = load(*args)
        fp8.use("fp8", model)
        return model

    monkeypatch.setattr(rollout, "golden_transformer", rounded)
    (case,) = (each for each in rollout.cases(Folder(golden / "rollout")) if each.name == "b_rag_avgpool")
    sheet = Sheet("", case.name)
    case.check(sheet)
    (apart,) = (row.max_abs_diff for row in sheet.rows if row.tensor == "output")
    assert apart is not None and 0.1 < apart < 0.3


def test_a_gpu_multiplies_in_one_launch_behind_one_that_rounds() -> None:
    """Six projections and two products of the feed-forward per layer and pass; the clean-context pass ends earlier."""
    with pretend_cuda() as device:
        model = tiny_transformer(Kernels(fused_layers=True), dim=32).to("cuda", torch.bfloat16)
        fp8.use("fp8", model)
        going = start(model, InfinityRope)
        device.calls.clear()
        device.waits.clear()
        (result,) = going.blocks(1)
        latents = result.latents.cpu()
        launched = Counter(call[0] for call in device.calls)
        assert launched["aten._scaled_mm.default"] == launched["round to fp8"] == 8 * (2 * 2 + 1) + 2
        assert device.races == []
    plain = tiny_transformer(dim=32).to(torch.bfloat16)
    fp8.use("fp8", plain)
    (expected,) = start(plain, InfinityRope).blocks(1)
    torch.testing.assert_close(latents, expected.latents, rtol=0, atol=0.05)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a real device")
def test_a_gpu_that_cannot_says_so_before_anything_is_generated(monkeypatch: pytest.MonkeyPatch) -> None:
    with pretend_cuda():
        model = tiny_transformer(dim=32).to("cuda")
        with pytest.raises(
            ValueError, match=r"products fp8: a GPU computes them for bfloat16, not for float32\. Fix: "
        ):
            fp8.use("fp8", model)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda of=None: (8, 0))
        fp8._product_refusal.cache_clear()
        with pytest.raises(ValueError, match=r"they need a GPU of compute capability 8\.9, and this one has 8\.0"):
            fp8.use("fp8", model.to(torch.bfloat16))
    fp8._product_refusal.cache_clear()
