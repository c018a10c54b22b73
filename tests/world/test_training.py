"""Trainings of the world: exact after a kill, and with the optimizer that they say."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lrag_ray.errors import UsageError
from lrag_ray.wan.keyed import keyed_generator
from lrag_ray.wan.vae import WanVae
from lrag_ray.world.code import CHANNELS, LinearCode
from lrag_ray.world.muon import Muon
from lrag_ray.world.training import Lesson, Recipe, Trainer
from lrag_ray.world.vae import VaeLesson, VaeRecipe, decoded, held_out_psnr

RECIPE = Recipe(seed=0, steps=8, muon=0.02, adam=1e-2, warmup=2)


class Line(Lesson):
    name = "line"

    def __init__(self, nan_at: int | None = None) -> None:
        self._nan_at = nan_at
        self.model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=keyed_generator("line", name)))

    def matrices(self) -> list[nn.Parameter]:
        return [each for each in self.model.parameters() if each.dim() == 2]

    def loss(self, step: int) -> dict[str, Tensor]:
        x = torch.randn(16, 4, generator=keyed_generator("x", step))
        loss = (self.model(x) - x[:, :2].square()).square().mean()
        return {"loss": loss * float("nan") if step == self._nan_at else loss}


def test_a_training_that_was_stopped_equals_one_that_was_not(tmp_path: Path) -> None:
    whole = Trainer(Line(), RECIPE, tmp_path / "whole", "same")
    losses = [row["loss"] for row in whole.run()]
    assert [row["loss"] for row in Trainer(Line(), RECIPE, tmp_path / "parts", "same").run(until=3)] == losses[:3]
    again = Trainer(Line(), RECIPE, tmp_path / "parts", "same")
    assert again.step == 3
    assert [row["loss"] for row in again.run()] == losses[3:]
    for name, each in whole.averaged().items():
        assert (each == again.averaged()[name]).all()
    states = [load_file(tmp_path / folder / "line.state") for folder in ("whole", "parts")]
    assert states[0].keys() == states[1].keys()
    assert all((states[0][name] == states[1][name]).all() for name in states[0])


def test_the_state_of_another_training_is_refused(tmp_path: Path) -> None:
    list(Trainer(Line(), RECIPE, tmp_path, "one").run(until=1))
    with pytest.raises(UsageError, match=r"line\.state is the state of another training \(one, and this is two\)"):
        Trainer(Line(), RECIPE, tmp_path, "two")


def test_a_loss_that_is_not_finite_ends_it_with_the_last_state_kept(tmp_path: Path) -> None:
    list(Trainer(Line(), RECIPE, tmp_path, "same").run(until=2))
    with pytest.raises(UsageError, match="the loss of step 4 is nan"):
        list(Trainer(Line(nan_at=4), RECIPE, tmp_path, "same").run())
    assert Trainer(Line(), RECIPE, tmp_path, "same").step == 2


def test_muon_is_torchs_muon_in_float32() -> None:
    draw = torch.Generator().manual_seed(0)
    ours, theirs = (
        [nn.Parameter(torch.randn(shape, generator=draw.clone_state())) for shape in ((6, 4), (4, 6), (6, 4))]
        for _ in range(2)
    )
    muon = Muon(ours)
    official = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn(a.shape, generator=draw)
            b.grad = a.grad.clone()
        muon.step(0.02)
        official.step()
    for a, b in zip(ours, theirs, strict=True):
        # torch's iteration runs in bfloat16, which has three digits.
        torch.testing.assert_close(a, b, rtol=0, atol=3e-3)


@pytest.mark.parametrize("steps_of_stills", [0, 1])
def test_the_vae_learns_its_codes_and_pixels(steps_of_stills: int) -> None:
    code = LinearCode(
        torch.randn(768, CHANNELS, generator=torch.Generator().manual_seed(1)) / 30, torch.zeros(CHANNELS)
    )
    lesson = VaeLesson(VaeRecipe(stills=2, still_steps=steps_of_stills, clips=2, latent_frames=2, cells=2), code)
    optimizer = torch.optim.Adam(lesson.model.parameters(), 2e-3)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        logged = lesson.loss(0)
        logged["loss"].backward()
        optimizer.step()
        losses.append(float(logged["loss"].detach()))
    assert losses[-1] < 0.95 * losses[0]
    assert 0 < held_out_psnr(WanVae(lesson.model), code, scenes=1, latent_frames=2) < 40


@torch.no_grad()
def test_a_vae_that_has_seen_single_frames_alone_takes_a_video_for_such() -> None:
    """Before the first step on clips, every frame is that of its latent, and every latent that of its last frame."""
    code = LinearCode(torch.zeros(768, CHANNELS), torch.zeros(CHANNELS))
    model = VaeLesson(VaeRecipe(), code).model
    draw = torch.Generator().manual_seed(2)
    codes = torch.randn(1, CHANNELS, 3, 2, 2, generator=draw)
    shown = decoded(model, codes)
    singles = torch.cat([decoded(model, codes[:, :, i : i + 1]) for i in range(3)], dim=2)
    torch.testing.assert_close(shown, singles[:, :, [0, *[1] * 4, *[2] * 4]])
    pixels = torch.rand(1, 3, 9, 32, 32, generator=draw) * 2 - 1
    last = torch.cat([model.encode(pixels[:, :, i : i + 1]).latent_dist.mode() for i in (0, 4, 8)], dim=2)
    torch.testing.assert_close(model.encode(pixels).latent_dist.mode(), last)


def test_rates_begin_again_where_the_recipe_says_so() -> None:
    recipe = Recipe(seed=0, steps=100, muon=1, adam=1, warmup=10, restarts=((60, 0.5),))
    rates = [recipe.rate(step) for step in range(100)]
    once = Recipe(seed=0, steps=60, muon=1, adam=1, warmup=10)
    assert rates[:60] == [once.rate(step) for step in range(60)]
    assert rates[60] == 0.05 and rates[69] == rates[70] == 0.5
    assert rates[59] < 0.03 and rates[99] < 0.03 and sorted(rates[70:], reverse=True) == rates[70:]
